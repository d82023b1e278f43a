package layer_test

import (
	"archive/tar"
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"reflect"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/daxfs/daxfs-snapshotter/converter/layer"
	"github.com/daxfs/daxfs-snapshotter/daxfs"
	"github.com/daxfs/daxfs-snapshotter/internal/treetest"
)

// everything has every operation, type and field.
func everything(t testing.TB) *layer.Layer {
	t.Helper()
	l, err := fromTar(t, layer.Limits{}, treetest.Dir("a").Perm(0o1777), treetest.Reg("a/empty", ""),
		treetest.Reg("a/file", "contents").Own(1<<32-2, 1<<32-1),
		treetest.Reg("a/file", strings.Repeat("other ", 2000)).X("user.a", "").X("user.b", "\x00\xff"),
		treetest.Sym("a/sym", "../x/../y"),
		treetest.Hard("b", "./a//file").At(time.Unix(0, 1)), treetest.Special(tar.TypeChar, "c", 1, 3),
		treetest.Special(tar.TypeBlock, "d", 259, 1<<19),
		treetest.Special(tar.TypeFifo, "e", 0, 0), treetest.Reg("a/.wh.b", ""), treetest.Reg("a/.wh..wh..opq", ""),
		treetest.Reg(".wh..wh..opq", ""),
		treetest.Dir(strings.Repeat("x/", 1000)), treetest.Dir(strings.Repeat("x/", 1000)+"y"))
	if err != nil {
		t.Fatal(err)
	}
	return l
}

func TestBinary(t *testing.T) {
	for _, l := range []*layer.Layer{{}, {Source: layer.FromDirectory}, everything(t), fromDirOf(t)} {
		b, err := l.MarshalBinary()
		if err != nil {
			t.Fatal(err)
		}
		var back layer.Layer
		if err := back.UnmarshalBinary(b); err != nil {
			t.Fatal(err)
		}
		if !equal(l, &back) {
			t.Errorf("layer of %d changes is not what it was:\n%v", l.Len(), treetest.Changes(&back))
		}
		for i := 0; i < len(b); i += 1 + i/100 {
			if err := back.UnmarshalBinary(b[:i]); !errors.Is(err, layer.ErrInvalid) {
				t.Fatalf("%d of %d bytes: %v, want ErrInvalid", i, len(b), err)
			}
			bad := bytes.Clone(b)
			bad[i] ^= 0x10
			if err := back.UnmarshalBinary(bad); !errors.Is(err, layer.ErrInvalid) &&
				!errors.Is(err, layer.ErrUnsupported) {
				t.Fatalf("byte %d changed: %v, want ErrInvalid", i, err)
			}
		}
	}
}

// TestBinaryMany: a layer of many changes survives encoding, and does not refer to the encoded bytes.
func TestBinaryMany(t *testing.T) {
	l := &layer.Layer{}
	for i := range 5000 {
		n := &daxfs.Node{
			Mode: unix.S_IFREG | 0o644,
			Data: daxfs.Data{Off: int64(i) * 4096, Size: 7, Sum: [32]byte{byte(i)}},
		}
		l.Append(layer.Change{Op: layer.OpAdd, Path: fmt.Sprintf("directory-%d/file-%d", i/100, i), Node: n})
	}
	b, err := l.MarshalBinary()
	if err != nil {
		t.Fatal(err)
	}
	again := bytes.Clone(b)
	var back layer.Layer
	if err := back.UnmarshalBinary(again); err != nil {
		t.Fatal(err)
	}
	clear(again)
	if !equal(l, &back) {
		t.Error("the layer is not what it was")
	}
	if c, err := back.MarshalBinary(); err != nil || !bytes.Equal(b, c) {
		t.Errorf("the layer has other bytes than before: %v", err)
	}
	var used layer.Layer
	if err := used.UnmarshalBinary(b); err != nil {
		t.Fatal(err)
	}
	c, err := used.DrainBinary([]byte("before"))
	if err != nil || string(c) != "before"+string(b) || used.Len() != 0 {
		t.Errorf("%d bytes and %d changes left, %v, expected %d and none", len(c), used.Len(), err, len(b)+6)
	}
	n := 0
	for range back.Drain() {
		n++
	}
	if n != l.Len() || back.Len() != 0 {
		t.Errorf("%d changes, and %d left, expected %d", n, back.Len(), l.Len())
	}
}

// equal compares layers.
func equal(a, b *layer.Layer) bool {
	return a.Source == b.Source && a.Stats == b.Stats && a.Len() == b.Len() && a.Cost() == b.Cost() &&
		a.Names() == b.Names() && a.HasOpaque() == b.HasOpaque() &&
		reflect.DeepEqual(treetest.Changes(a), treetest.Changes(b))
}

func TestBinaryVersion(t *testing.T) {
	b, err := everything(t).MarshalBinary()
	if err != nil {
		t.Fatal(err)
	}
	b[4]++
	if err := new(layer.Layer).UnmarshalBinary(b); !errors.Is(err, layer.ErrUnsupported) {
		t.Errorf("%v, want ErrUnsupported", err)
	}
}

// sealed appends a checksum, so that a fuzzer passes it.
func sealed(body []byte) []byte {
	return binary.LittleEndian.AppendUint32(bytes.Clone(body), crc32.Checksum(body, crc32.MakeTable(crc32.Castagnoli)))
}

// TestBinaryBomb has paths that unfold from three bytes to four thousand.
func TestBinaryBomb(t *testing.T) {
	const changes = 300_000
	long := strings.Repeat(strings.Repeat("x", 250)+"/", 16) + "y"
	b := append([]byte("DXLY\x02\x00"), 0, 0, 0, 0)
	b = binary.AppendUvarint(b, changes)
	for i := range changes {
		if i == 0 {
			b = append(b, byte(layer.OpRemove), 0)
			b = append(binary.AppendUvarint(b, uint64(len(long))), long...)
			continue
		}
		b = append(b, byte(layer.OpRemove))
		b = append(binary.AppendUvarint(b, uint64(len(long))), 0)
	}
	err := new(layer.Layer).UnmarshalBinary(sealed(b))
	if !errors.Is(err, layer.ErrInvalid) || !strings.Contains(fmt.Sprint(err), "bytes of paths") {
		t.Errorf("%v, want ErrInvalid about the bytes of paths", err)
	}
}

// FuzzUnmarshal: a layer that can be read can be written and read again without a difference.
func FuzzUnmarshal(f *testing.F) {
	for _, l := range []*layer.Layer{{}, everything(f)} {
		b, err := l.MarshalBinary()
		if err != nil {
			f.Fatal(err)
		}
		f.Add(b[:len(b)-4])
	}
	f.Fuzz(func(t *testing.T, body []byte) {
		var l, back layer.Layer
		err := l.UnmarshalBinary(sealed(body))
		if err != nil {
			if !errors.Is(err, layer.ErrInvalid) && !errors.Is(err, layer.ErrUnsupported) {
				t.Fatalf("error without a kind: %v", err)
			}
			return
		}
		b, err := l.MarshalBinary()
		if err != nil {
			t.Fatal(err)
		}
		if err := back.UnmarshalBinary(b); err != nil {
			t.Fatal(err)
		}
		if !equal(&l, &back) {
			t.Errorf("%+v became %+v", l, back)
		}
	})
}

func BenchmarkBinary(b *testing.B) {
	var files []treetest.File
	for i := range 20_000 {
		files = append(files,
			treetest.Reg(fmt.Sprintf("usr/lib/python3/dist-packages/package%d/module%d.py", i/40, i), "x"))
	}
	l, err := fromTar(b, layer.Limits{}, files...)
	if err != nil {
		b.Fatal(err)
	}
	data, err := l.MarshalBinary()
	if err != nil {
		b.Fatal(err)
	}
	b.Run("marshal", func(b *testing.B) {
		b.SetBytes(int64(len(data)))
		for b.Loop() {
			_, _ = l.MarshalBinary()
		}
	})
	b.Run("unmarshal", func(b *testing.B) {
		b.SetBytes(int64(len(data)))
		b.ReportAllocs()
		for b.Loop() {
			if err := new(layer.Layer).UnmarshalBinary(data); err != nil {
				b.Fatal(err)
			}
		}
	})
}

func fromDirOf(t *testing.T) *layer.Layer {
	t.Helper()
	l, err := layer.FromDir(context.Background(), dirWithTraps(t), new(treetest.Store), layer.Limits{})
	if err != nil {
		t.Fatal(err)
	}
	return l
}
