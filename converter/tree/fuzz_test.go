package tree

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"hash/crc32"
	"io"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/daxfs/daxfs-snapshotter/converter/layer"
	"github.com/daxfs/daxfs-snapshotter/daxfs"
)

// fuzzLimits keep a fuzzer from spending its time on size.
var fuzzLimits = layer.Limits{MaxEntries: 2000, MaxBytes: 1 << 20, MaxMetaBytes: 1 << 20}

// sumStore hashes contents and keeps none. It assigns them consecutive places.
type sumStore struct{ next int64 }

func (s *sumStore) Put(_ context.Context, size int64, r io.Reader) (daxfs.Data, error) {
	if _, err := io.CopyN(io.Discard, r, size); err != nil {
		return daxfs.Data{}, err
	}
	s.next += daxfs.BlockSize
	d := daxfs.Data{Off: s.next, Size: size}
	s.next += (size - 1) / daxfs.BlockSize * daxfs.BlockSize
	return d, nil
}

// FuzzLayer parses hostile tar streams, two at a time. Errors must have a kind, parsed layers that
// merge must give a tree that can become an image, and layers must survive storing and merging.
func FuzzLayer(f *testing.F) {
	for _, r := range rules {
		tars := r.s.tars()
		if len(tars) == 1 {
			tars = append(tars, nil)
		}
		if len(tars[0])+len(tars[1]) < 64<<10 {
			f.Add(tars[0], tars[1])
		}
	}
	f.Fuzz(func(t *testing.T, a, b []byte) {
		var layers []*layer.Layer
		store := &sumStore{}
		for _, stream := range [][]byte{a, b} {
			l, err := layer.FromTar(context.Background(), bytes.NewReader(stream), store, fuzzLimits)
			if err != nil {
				if _, ok := errors.AsType[*layer.EntryError](err); !ok {
					t.Fatalf("%v does not name an entry", err)
				}
				return
			}
			layers = append(layers, l)
		}
		root := mergeFuzz(t, layers)
		var stored []*layer.Layer
		for _, l := range layers {
			bin, err := l.MarshalBinary()
			if err != nil {
				t.Fatal(err)
			}
			back := new(layer.Layer)
			if err := back.UnmarshalBinary(bin); err != nil {
				t.Fatal(err)
			}
			stored = append(stored, back)
		}
		if again := mergeFuzz(t, stored); (root == nil) != (again == nil) {
			t.Fatal("stored layers merge otherwise")
		}
	})
}

// FuzzMerge merges untrusted stored layers, two at a time.
func FuzzMerge(f *testing.F) {
	for _, r := range rules {
		var bins [2][]byte
		store := &sumStore{}
		for i, b := range r.s.tars() {
			l, err := layer.FromTar(context.Background(), bytes.NewReader(b), store, layer.Limits{})
			if err != nil || i > 1 {
				continue
			}
			l.Source = layer.Source(len(r.name) % 2)
			bin, err := l.MarshalBinary()
			if err != nil {
				f.Fatal(err)
			}
			bins[i] = bin[:len(bin)-4]
		}
		if len(bins[0])+len(bins[1]) < 8<<10 {
			f.Add(bins[0], bins[1])
		}
	}
	f.Fuzz(func(t *testing.T, a, b []byte) {
		var layers []*layer.Layer
		for _, body := range [][]byte{a, b} {
			l := new(layer.Layer)
			if err := l.UnmarshalBinary(binary.LittleEndian.AppendUint32(bytes.Clone(body),
				crc32.Checksum(body, crc32.MakeTable(crc32.Castagnoli)))); err == nil {
				layers = append(layers, l)
			}
		}
		root, err := Merge(layers)
		if err == nil {
			checkTree(t, root, "", nil)
		}
	})
}

// mergeFuzz merges layers into a tree that a plan accepts, or returns nil.
func mergeFuzz(t *testing.T, layers []*layer.Layer) *daxfs.Node {
	t.Helper()
	root, err := Merge(layers)
	if err != nil {
		if _, ok := errors.AsType[*Error](err); !ok {
			t.Fatalf("%v does not name layer and entry", err)
		}
		return nil
	}
	checkTree(t, root, "", nil)
	if _, err := daxfs.NewPlan(root, daxfs.Options{}); err != nil {
		t.Fatalf("plan: %v", err)
	}
	return root
}

// checkTree fails for impossible names, directories with two names, and links through directories.
func checkTree(t *testing.T, n *daxfs.Node, p string, above []*daxfs.Node) {
	t.Helper()
	if len(p) > 2*maxPath {
		t.Fatalf("path of %d bytes", len(p))
	}
	if n.Mode&unix.S_IFMT != unix.S_IFDIR {
		if n.Entries != nil {
			t.Fatalf("%q has entries and mode %o", p, n.Mode)
		}
		return
	}
	for _, dir := range above {
		if dir == n {
			t.Fatalf("%q is in itself", p)
		}
	}
	for name, c := range n.Entries {
		if c == nil || name == "" || name == "." || name == ".." || strings.ContainsAny(name, "/\x00") ||
			len(name) > 255 {
			t.Fatalf("%q has an entry %q: %v", p, name, c)
		}
		checkTree(t, c, p+"/"+name, append(above, n))
	}
}
