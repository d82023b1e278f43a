package layer_test

import (
	"archive/tar"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"reflect"
	"runtime"
	"strings"
	"testing"
	"testing/iotest"
	"time"

	"golang.org/x/sys/unix"

	"github.com/daxfs/daxfs-snapshotter/converter/layer"
	"github.com/daxfs/daxfs-snapshotter/daxfs"
	"github.com/daxfs/daxfs-snapshotter/internal/treetest"
)

func fromTar(t testing.TB, lim layer.Limits, files ...treetest.File) (*layer.Layer, error) {
	t.Helper()
	return layer.FromTar(context.Background(), bytes.NewReader(treetest.Tar(files...)), new(treetest.Store), lim)
}

// TestNames has the forms of names. Their effect on a tree is tested with tree.Merge, against containerd.
func TestNames(t *testing.T) {
	n255 := strings.Repeat("n", 255)
	for _, test := range []struct {
		name string
		want string // op and path; "" for no change
	}{
		{"a", "add a"},
		{"./a", "add a"},
		{"a/", "add a"},
		{"/a", "add a"},
		{"//a//b", "add a/b"},
		{"a/./b", "add a/b"},
		{"../../a", "add a"},
		{"a/../b", "add b"},
		{"./", ""},
		{".", ""},
		{"/", ""},
		{"..", ""},
		{"a/..", ""},
		{".wh.a", "remove a"},
		{"a/.wh.b", "remove a/b"},
		{"./a/.wh.b/", "remove a/b"},
		{"a/.wh." + n255, "remove a/" + n255},
		{".wh..a", "remove .a"},
		{".wh...a", "remove ..a"},
		{"a/.wh..wh..opq", "opaque a"},
		{".wh..wh..opq", "opaque "},
		{".wh..wh.plnk", "remove .wh.plnk"},
		{".wh..wh.plnk/b", "add .wh..wh.plnk/b"},
		{".wh..wh..opqx", "remove .wh..opqx"},
		{".wh", "add .wh"},
		{"a.wh.b", "add a.wh.b"},
		{" .wh.b", "add  .wh.b"},
		{"\xff\xfe\n", "add \xff\xfe\n"},
		{n255, "add " + n255},
		{strings.Repeat("a/", 2047) + "b", "add " + strings.Repeat("a/", 2047) + "b"},
	} {
		l, err := fromTar(t, layer.Limits{}, treetest.Dir(test.name))
		if err != nil {
			t.Errorf("%q: %v", test.name, err)
			continue
		}
		got := ""
		for _, c := range treetest.Changes(l) {
			got += c.Op.String() + " " + c.Path
		}
		if got != test.want || l.Stats.Entries != 1 {
			t.Errorf("%q gives %q of %d entries, want %q of 1", test.name, got, l.Stats.Entries, test.want)
		}
	}
}

func TestRefused(t *testing.T) {
	long := strings.Repeat("x", 256)
	deep := strings.Repeat("a/", 2048) + "b"
	cap3 := "\x00\x00\x00\x03" + strings.Repeat("\x00", 20)
	for _, test := range []struct {
		what string
		file treetest.File
		want error // nil: accepted
	}{
		{"whiteout of nothing", treetest.Reg("a/.wh.", ""), layer.ErrInvalid},
		{"whiteout of .", treetest.Reg("a/.wh..", ""), layer.ErrInvalid},
		{"whiteout of ..", treetest.Reg("a/.wh...", ""), layer.ErrInvalid},
		{"name of 256 bytes", treetest.Reg(long, ""), layer.ErrLimit},
		{"name of 256 bytes in a parent", treetest.Reg("a/"+long+"/b", ""), layer.ErrLimit},
		{"whiteout of 256 bytes", treetest.Reg(".wh."+long, ""), layer.ErrLimit},
		{"path of 4097 bytes", treetest.Reg(deep, ""), layer.ErrLimit},
		{"symbolic link to nothing", treetest.Sym("a", ""), layer.ErrInvalid},
		{"symbolic link of 4095 bytes", treetest.Sym("a", strings.Repeat("t", 4095)), nil},
		{"symbolic link of 4096 bytes", treetest.Sym("a", strings.Repeat("t", 4096)), layer.ErrLimit},
		{"hard link of 4096 bytes", treetest.Hard("a", strings.Repeat("t", 4096)), layer.ErrLimit},
		{"contiguous file", treetest.Special(tar.TypeCont, "a", 0, 0), layer.ErrUnsupported},
		{"unknown type", treetest.Special('Z', "a", 0, 0), layer.ErrUnsupported},
		{"user id 2^32-1", treetest.Reg("a", "").Own(1<<32-1, 0), nil},
		{"user id 2^32", treetest.Reg("a", "").Own(1<<32, 0), layer.ErrInvalid},
		{"group id 2^32", treetest.Reg("a", "").Own(0, 1<<32), layer.ErrInvalid},
		{"major number 2^32", gnu(treetest.Special(tar.TypeChar, "a", 1<<32, 0)), layer.ErrInvalid},
		{"minor number 2^32", gnu(treetest.Special(tar.TypeBlock, "a", 0, 1<<32)), layer.ErrInvalid},
		{"xattr without a name", treetest.Reg("a", "").X("", "x"), layer.ErrInvalid},
		{"xattr with nothing behind its namespace", treetest.Reg("a", "").X("user.", "x"), layer.ErrInvalid},
		{"xattr name of 255 bytes", treetest.Reg("a", "").X("user."+long[:250], "x"), nil},
		{"xattr name of 256 bytes", treetest.Reg("a", "").X("user."+long[:251], "x"), layer.ErrInvalid},
		{"xattr of 65535 bytes", treetest.Reg("a", "").X("user.a", strings.Repeat("x", 65535)), nil},
		{"xattr of 65536 bytes", treetest.Reg("a", "").X("user.a", strings.Repeat("x", 65536)), layer.ErrLimit},
		{"capability of version 3", treetest.Reg("a", "").X("security.capability", cap3), nil},
		{
			"capability of version 2 with the length of 3",
			treetest.Reg("a", "").X("security.capability", strings.Replace(cap3, "\x03", "\x02", 1)), layer.ErrInvalid,
		},
		{"capability without a value", treetest.Reg("a", "").X("security.capability", ""), layer.ErrInvalid},
		{"xattr of an unknown namespace", treetest.Reg("a", "").X("com.example.a", "x"), nil},
	} {
		_, err := fromTar(t, layer.Limits{}, treetest.Reg("before", ""), test.file)
		if !errors.Is(err, test.want) || test.want == nil && err != nil {
			t.Errorf("%s: %v, want %v", test.what, err, test.want)
		}
		if entry, ok := errors.AsType[*layer.EntryError](err); err != nil &&
			(!ok || entry.Entry != test.file.Name || entry.After) {
			t.Errorf("%s: error %q does not name the entry", test.what, err)
		}
	}
}

func gnu(f treetest.File) treetest.File {
	f.Format, f.ModTime = tar.FormatGNU, time.Unix(1, 0)
	return f
}

func TestLimits(t *testing.T) {
	files := []treetest.File{
		treetest.Dir("d"), treetest.Reg("d/ab", "12345").X("user.a", "123"),
		treetest.Sym("d/s", "ab"), treetest.Hard("h", "d/ab"),
	}
	exact := layer.Limits{
		MaxEntries: 4, MaxBytes: 5, MaxMetaBytes: 1 + 4 + 3 + 2 + 1 + 4 + 9, MaxXattrBytes: 9,
		MaxPath: 4, MaxDepth: 2,
	}
	if _, err := fromTar(t, exact, files...); err != nil {
		t.Fatalf("at the limits: %v", err)
	}
	for what, less := range map[string]func(*layer.Limits){
		"entries": func(l *layer.Limits) { l.MaxEntries-- }, "contents": func(l *layer.Limits) { l.MaxBytes-- },
		"attributes": func(l *layer.Limits) { l.MaxMetaBytes-- }, "xattrs": func(l *layer.Limits) { l.MaxXattrBytes-- },
		"a path": func(l *layer.Limits) { l.MaxPath-- }, "elements": func(l *layer.Limits) { l.MaxDepth-- },
	} {
		lim := exact
		less(&lim)
		if _, err := fromTar(t, lim, files...); !errors.Is(err, layer.ErrLimit) ||
			!strings.Contains(err.Error(), what) {
			t.Errorf("one less of %q: %v, want ErrLimit about it", what, err)
		}
	}
}

// TestXattrsCount: many xattrs in few entries count like entries, because they take as much memory.
func TestXattrsCount(t *testing.T) {
	f := treetest.Reg("a", "")
	for i := range 10 {
		f = f.X(fmt.Sprintf("user.%d", i), "")
	}
	l, err := fromTar(t, layer.Limits{MaxEntries: 1 + 4 + 1}, f, treetest.Reg("b", "").X("user.a", "").X("user.b", ""))
	if err != nil || l.Cost() != 6 || l.Stats.Entries != 2 {
		t.Errorf("%v, want a layer of 2 entries that cost 6, not %+v", err, l)
	}
	if _, err := fromTar(t, layer.Limits{MaxEntries: 4}, f); !errors.Is(err, layer.ErrLimit) {
		t.Errorf("%v, want ErrLimit", err)
	}
}

// TestBomb has a sparse file of 8 EiB in two kilobytes of tar: it must be refused before it is read.
func TestBomb(t *testing.T) {
	f := treetest.Reg("bomb", "1\n0\n0\n"+strings.Repeat("\x00", 506))
	f.PAXRecords = map[string]string{
		"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.name": "bomb",
		"GNU.sparse.realsize": "9223372036854775807",
	}
	b := strings.NewReplacer("QQQ.sparse", "GNU.sparse").Replace(string(treetest.Tar(renamed(f))))
	_, err := layer.FromTar(context.Background(), strings.NewReader(b), failStore{t}, layer.Limits{})
	if !errors.Is(err, layer.ErrLimit) {
		t.Errorf("%v, want ErrLimit", err)
	}
}

// renamed hides GNU.sparse records from archive/tar, which refuses to write them.
func renamed(f treetest.File) treetest.File {
	records := make(map[string]string)
	for k, v := range f.PAXRecords {
		records[strings.Replace(k, "GNU", "QQQ", 1)] = v
	}
	f.PAXRecords = records
	return f
}

type failStore struct{ t *testing.T }

func (s failStore) Put(context.Context, int64, io.Reader) (daxfs.Data, error) {
	s.t.Error("contents were read")
	return daxfs.Data{}, errors.New("unexpected")
}

// TestTruncated cuts a stream at every byte.
func TestTruncated(t *testing.T) {
	whole := treetest.Tar(treetest.Reg("first", strings.Repeat("1", 700)),
		treetest.Reg("second", strings.Repeat("2", 700)).X("user.a", "b"))
	full, err := layer.FromTar(context.Background(), bytes.NewReader(whole), new(treetest.Store), layer.Limits{})
	if err != nil {
		t.Fatal(err)
	}
	for n := range whole {
		l, err := layer.FromTar(context.Background(), iotest.OneByteReader(bytes.NewReader(whole[:n])),
			new(treetest.Store), layer.Limits{})
		if err != nil && !errors.Is(err, io.ErrUnexpectedEOF) {
			t.Fatalf("%d of %d bytes: %v, want io.ErrUnexpectedEOF", n, len(whole), err)
		}
		// In padding, a missing end marker passes as the end: the layer's digest detects it. No entry is cut short.
		if err != nil {
			continue
		}
		if got := treetest.Changes(l); len(got) > 0 && !reflect.DeepEqual(got, treetest.Changes(full)[:len(got)]) {
			t.Fatalf("%d of %d bytes: %+v", n, len(whole), got)
		}
	}
	errBroken := errors.New("broken pipe")
	_, err = layer.FromTar(context.Background(),
		io.MultiReader(bytes.NewReader(whole[:2000]), iotest.ErrReader(errBroken)), new(treetest.Store), layer.Limits{})
	if !errors.Is(err, errBroken) || !strings.Contains(err.Error(), `"first"`) {
		t.Errorf("%v, want the error of the stream and the entry", err)
	}
}

func TestCanceled(t *testing.T) {
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	if _, err := layer.FromTar(ctx, bytes.NewReader(treetest.Tar(treetest.Dir("a"))), new(treetest.Store),
		layer.Limits{}); !errors.Is(err, context.Canceled) {
		t.Errorf("tar: %v, want context.Canceled", err)
	}
	dir := t.TempDir()
	if err := unix.Mkfifo(dir+"/fifo", 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := layer.FromDir(ctx, dir, new(treetest.Store), layer.Limits{}); !errors.Is(err, context.Canceled) {
		t.Errorf("directory: %v, want context.Canceled", err)
	}
}

// TestBoundedTimes has the times that containerd replaces.
func TestBoundedTimes(t *testing.T) {
	zero, max := time.Unix(0, 0), time.Unix(0, 1<<63-1)
	for at, want := range map[time.Time]time.Time{
		zero: zero, zero.Add(-1): zero, time.Unix(-1<<40, 0): zero, zero.Add(1): zero.Add(1), max: max,
		max.Add(1): zero, time.Unix(1<<60, 0): zero,
		time.Unix(1<<63-1, 0): zero,
	} {
		l, err := fromTar(t, layer.Limits{}, treetest.Dir("a").At(at))
		if err != nil {
			t.Fatal(err)
		}
		if got := treetest.Changes(l)[0].Node.Mtime; time.Unix(got.Sec, int64(got.Nsec)) != want {
			t.Errorf("%v became %v, want %v", at, got, want)
		}
	}
}

// TestGlobalHeader: a malformed one is ignored, because its name in the tar reader is random.
func TestGlobalHeader(t *testing.T) {
	raw := treetest.Tar(treetest.Reg("global", "11 path=qd\n10 size=x\n").At(time.Unix(1, 0)))
	raw[156] = tar.TypeXGlobalHeader
	treetest.SetChecksum(raw)
	for range 50 {
		l, err := layer.FromTar(t.Context(), bytes.NewReader(raw), new(treetest.Store), layer.Limits{})
		if err != nil {
			t.Fatal(err)
		}
		if l.Len() > 0 {
			t.Fatalf("%+v, want nothing", treetest.Changes(l))
		}
	}
}

func TestStats(t *testing.T) {
	l, err := fromTar(t, layer.Limits{}, treetest.Dir("./"), treetest.Dir("d").X("trusted.a", ""),
		treetest.Reg("d/a", "123").X("other.a", ""),
		treetest.Reg("d/a", "4567"), treetest.Reg("d/empty", ""), treetest.Hard("h", "d/a"), treetest.Reg(".wh.x", ""))
	if want := (layer.Stats{Entries: 7, Files: 2, Bytes: 7, IgnoredXattrs: 2}); err != nil || l.Stats != want {
		t.Errorf("%+v (%v), want %+v", l.Stats, err, want)
	}
}

// TestMemory: names are slices of the records, so a layer must not keep a megabyte of useless records
// in memory.
func TestMemory(t *testing.T) {
	var files []treetest.File
	for i := range 10 {
		f := treetest.Reg(fmt.Sprintf("%d-", i)+strings.Repeat("n", 120), "")
		f.PAXRecords = map[string]string{"comment": strings.Repeat("x", 900<<10)}
		files = append(files, f)
	}
	stream := treetest.Tar(files...)
	inUse := func() uint64 {
		runtime.GC()
		var m runtime.MemStats
		runtime.ReadMemStats(&m)
		return m.HeapAlloc
	}
	before := inUse()
	l, err := layer.FromTar(context.Background(), bytes.NewReader(stream), new(treetest.Store), layer.Limits{})
	if err != nil {
		t.Fatal(err)
	}
	if kept := int64(inUse()) - int64(before); kept > 2<<20 {
		t.Errorf("a layer of %d entries holds %d bytes", l.Len(), kept)
	}
	runtime.KeepAlive(l)
	runtime.KeepAlive(stream)
}
