package region

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// testRegion tests the contract of Region with every kind that can be made here.
func testRegion(t *testing.T, r Region) {
	t.Helper()
	size := r.Size()
	if size < MinSize || size%Align != 0 {
		t.Fatalf("size %d", size)
	}
	rng := rand.New(rand.NewPCG(1, 2))
	model := make([]byte, size)
	if err := r.Punch(0, size); err != nil {
		t.Fatal(err)
	}
	for i := range 200 {
		n := 1 + rng.Int64N(3*Align)
		if i%2 == 0 {
			n = 1 + rng.Int64N(10000)
		}
		off := rng.Int64N(size - n)
		if rng.IntN(4) == 0 {
			if err := r.Punch(off, n); err != nil {
				t.Fatalf("punch %d+%d: %v", off, n, err)
			}
			clear(model[off : off+n])
			continue
		}
		b := bytes.Repeat([]byte{byte(i + 1)}, int(n))
		if k, err := r.WriteAt(b, off); err != nil || k != len(b) {
			t.Fatalf("write %d+%d: %d, %v", off, n, k, err)
		}
		copy(model[off:], b)
		if err := r.Sync(off, n); err != nil {
			t.Fatalf("sync %d+%d: %v", off, n, err)
		}
	}
	got := make([]byte, size)
	if n, err := r.ReadAt(got, 0); n != len(got) || err != nil && err != io.EOF {
		t.Fatalf("read: %d, %v", n, err)
	}
	if !bytes.Equal(got, model) {
		t.Error("the region does not hold what was written")
	}
	if n, err := r.ReadAt(make([]byte, 100), size-10); n != 10 || err != io.EOF {
		t.Errorf("read over the end: %d, %v", n, err)
	}
	if n, err := r.ReadAt(make([]byte, 100), size); n != 0 || err != io.EOF {
		t.Errorf("read after the end: %d, %v", n, err)
	}
	for _, bad := range [][2]int64{{-1, 1}, {size, 1}, {size - 1, 2}, {0, size + 1}} {
		if n, err := r.WriteAt(make([]byte, bad[1]), bad[0]); n != 0 || !errors.Is(err, ErrRange) {
			t.Errorf("write %d+%d: %d, %v; expected ErrRange", bad[0], bad[1], n, err)
		}
		if err := r.Punch(bad[0], bad[1]); !errors.Is(err, ErrRange) {
			t.Errorf("punch %d+%d: %v, expected ErrRange", bad[0], bad[1], err)
		}
		if err := r.Sync(bad[0], bad[1]); !errors.Is(err, ErrRange) {
			t.Errorf("sync %d+%d: %v, expected ErrRange", bad[0], bad[1], err)
		}
	}
}

func mustOpen(t *testing.T, c Config) Region {
	t.Helper()
	r, err := Open(c)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { r.Close() })
	return r
}

// shmDir is a directory on tmpfs.
func shmDir(t *testing.T) string {
	t.Helper()
	dir, err := os.MkdirTemp("/dev/shm", "regiontest")
	if err != nil {
		t.Skip("no tmpfs at /dev/shm: ", err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	return dir
}

func allocated(t *testing.T, path string) int64 {
	t.Helper()
	var st unix.Stat_t
	if err := unix.Stat(path, &st); err != nil {
		t.Fatal(err)
	}
	return st.Blocks * 512
}

func TestFileAndTmpfs(t *testing.T) {
	for kind, dir := range map[string]string{KindFile: t.TempDir(), KindTmpfs: shmDir(t)} {
		t.Run(kind, func(t *testing.T) {
			path := filepath.Join(dir, "pool")
			r := mustOpen(t, Config{Kind: kind, Path: path, Size: 16<<20 + 5, Create: true})
			if n := allocated(t, path); n > 1<<20 {
				t.Errorf("a new region takes %d bytes", n)
			}
			testRegion(t, r)
			if err := r.Punch(0, r.Size()); err != nil {
				t.Fatal(err)
			}
			if n := allocated(t, path); n > 1<<20 {
				t.Errorf("after punching all it takes %d bytes", n)
			}
			info := r.Info()
			want := map[string]Persistence{KindFile: PersistsReboot, KindTmpfs: PersistsProcess}[kind]
			if info.Kind != kind || info.Path != path || info.Persistent != want || !info.Sparse ||
				info.DAX || info.HasPhys {
				t.Errorf("info %+v", info)
			}
		})
	}
}

// TestSyncFailsForGood lets one sync fail: the kernel calls the next a success despite lost writes.
func TestSyncFailsForGood(t *testing.T) {
	r := mustOpen(t,
		Config{Kind: KindFile, Path: filepath.Join(t.TempDir(), "pool"), Size: 16 << 20, Create: true}).(*file)
	real := r.fdatasync
	r.fdatasync = func() error { return unix.EIO }
	if err := r.Sync(0, 4096); !errors.Is(err, unix.EIO) {
		t.Errorf("sync: %v, expected EIO", err)
	}
	r.fdatasync = real
	if err := r.Sync(0, 4096); !errors.Is(err, unix.EIO) || !strings.Contains(err.Error(), "open the pool anew") {
		t.Errorf("sync again: %v, expected the same error and what to do", err)
	}
}

func TestReadOnly(t *testing.T) {
	path := filepath.Join(t.TempDir(), "pool")
	w := mustOpen(t, Config{Kind: KindFile, Path: path, Size: MinSize, Create: true})
	r := mustOpen(t, Config{Kind: KindFile, Path: path, ReadOnly: true})
	if _, err := w.WriteAt([]byte("seen"), 4096); err != nil {
		t.Fatal(err)
	}
	got := make([]byte, 4)
	if _, err := r.ReadAt(got, 4096); err != nil || string(got) != "seen" {
		t.Errorf("the reader sees %q, %v", got, err)
	}
	if _, err := r.WriteAt([]byte("x"), 0); err == nil {
		t.Error("a region opened to be read was written")
	}
}

func TestOpenErrors(t *testing.T) {
	dir, shm := t.TempDir(), shmDir(t)
	small := filepath.Join(dir, "small")
	big := filepath.Join(dir, "big")
	onShm := filepath.Join(shm, "f")
	for path, size := range map[string]int64{small: 4 << 20, big: 16 << 20, onShm: 16 << 20} {
		if err := os.WriteFile(path, nil, 0o600); err != nil {
			t.Fatal(err)
		}
		if err := os.Truncate(path, size); err != nil {
			t.Fatal(err)
		}
	}
	for _, test := range []struct {
		name string
		c    Config
		want error
	}{
		{"unknown kind", Config{Kind: "floppy", Path: big}, ErrKind},
		{"no path", Config{Kind: KindFile}, ErrKind},
		{"too small", Config{Kind: KindFile, Path: small}, ErrSize},
		{
			"too small to make",
			Config{Kind: KindFile, Path: filepath.Join(dir, "new"), Size: 1 << 20, Create: true},
			ErrSize,
		},
		{"no size to make", Config{Kind: KindFile, Path: filepath.Join(dir, "new"), Create: true}, ErrSize},
		{"negative", Config{Kind: KindFile, Path: big, Size: -1}, ErrSize},
		{"another size", Config{Kind: KindFile, Path: big, Size: 32 << 20}, ErrSize},
		{"missing", Config{Kind: KindFile, Path: filepath.Join(dir, "missing")}, os.ErrNotExist},
		{"directory", Config{Kind: KindFile, Path: dir, ReadOnly: true}, ErrKind},
		{"file on tmpfs", Config{Kind: KindFile, Path: onShm}, ErrKind},
		{"tmpfs on disk", Config{Kind: KindTmpfs, Path: big}, ErrKind},
		{"hugetlbfs on disk", Config{Kind: KindHugetlbfs, Path: big}, ErrKind},
		{"pmem is a file", Config{Kind: KindPmem, Path: big}, ErrKind},
		{"devdax is a file", Config{Kind: KindDevDAX, Path: big}, ErrKind},
		{"devdax is /dev/null", Config{Kind: KindDevDAX, Path: "/dev/null"}, ErrKind},
		{"heap is a file", Config{Kind: KindDMABuf, Path: big, Size: MinSize}, unix.ENOTTY},
		{"phys without size", Config{Kind: KindPhys, Phys: 1 << 32}, ErrSize},
		{"heap without size", Config{Kind: KindDMABuf, Path: big}, ErrSize},
		{"closed buffer", Config{Kind: KindDMABuf, FD: 1 << 20}, unix.EBADF},
		{"buffer without a size", Config{Kind: KindDMABuf, FD: pipe(t)}, unix.ESPIPE},
		{"small buffer", Config{Kind: KindDMABuf, FD: memfd(t, 4096)}, ErrSize},
		{"phys misaligned", Config{Kind: KindPhys, Phys: 1<<32 + 4096, Size: MinSize}, ErrSize},
	} {
		t.Run(test.name, func(t *testing.T) {
			r, err := Open(test.c)
			if err == nil {
				r.Close()
			}
			if !errors.Is(err, test.want) {
				t.Errorf("%v, expected %v", err, test.want)
			}
		})
	}
	if _, err := os.Stat(filepath.Join(dir, "new")); !errors.Is(err, os.ErrNotExist) {
		t.Error("an open that failed has left a file")
	}
}

// pipe returns a descriptor of a pipe.
func pipe(t *testing.T) int {
	t.Helper()
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { r.Close(); w.Close() })
	return int(r.Fd())
}

// memfd returns a descriptor of memory, which stands for a dma-buf.
func memfd(t *testing.T, size int64) int {
	t.Helper()
	fd, err := unix.MemfdCreate("buffer", unix.MFD_CLOEXEC)
	if err != nil {
		t.Skip("no memfd: ", err)
	}
	t.Cleanup(func() { unix.Close(fd) })
	if err := unix.Ftruncate(fd, size); err != nil {
		t.Fatal(err)
	}
	return fd
}

func TestLock(t *testing.T) {
	path := filepath.Join(t.TempDir(), "pool")
	a := mustOpen(t, Config{Kind: KindFile, Path: path, Size: MinSize, Create: true})
	b := mustOpen(t, Config{Kind: KindFile, Path: path})
	if err := a.(Locker).Lock(); err != nil {
		t.Fatal(err)
	}
	err := b.(Locker).Lock()
	var busy *BusyError
	if !errors.As(err, &busy) || !errors.Is(err, ErrBusy) || busy.PID != os.Getpid() {
		t.Errorf("second owner: %v, expected to be told process %d", err, os.Getpid())
	}
	if want := fmt.Sprintf("%q is in use by process %d", path, os.Getpid()); err.Error() != want {
		t.Errorf("second owner: %v, expected %s", err, want)
	}
	if pid := LockHolder(path); pid != os.Getpid() {
		t.Errorf("the holder is process %d, expected %d", pid, os.Getpid())
	}
	a.Close()
	if err := b.(Locker).Lock(); err != nil {
		t.Errorf("after the first has closed: %v", err)
	}
	if pid := LockHolder(path + ".missing"); pid != 0 {
		t.Errorf("process %d holds the lock of no file", pid)
	}
}

func TestHugetlbfs(t *testing.T) {
	const knob = "/proc/sys/vm/nr_hugepages"
	before, err := os.ReadFile(knob)
	if err != nil {
		t.Skip("no huge pages: ", err)
	}
	had, err := strconv.Atoi(strings.TrimSpace(string(before)))
	if err != nil {
		t.Fatal(err)
	}
	const pages = 8
	if err := os.WriteFile(knob, []byte(strconv.Itoa(had+pages)), 0); err != nil {
		t.Skip("cannot reserve huge pages: ", err)
	}
	defer func() {
		if err := os.WriteFile(knob, before, 0); err != nil {
			t.Error(err)
		}
	}()
	dir := t.TempDir()
	if err := unix.Mount("none", dir, "hugetlbfs", 0, "pagesize=2M"); err != nil {
		t.Skip("cannot mount hugetlbfs: ", err)
	}
	defer unix.Unmount(dir, 0)
	path := filepath.Join(dir, "pool")
	r, err := Open(Config{Kind: KindHugetlbfs, Path: path, Size: pages * Align, Create: true})
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	testRegion(t, r)
	if err := r.Punch(0, r.Size()); err != nil {
		t.Fatal(err)
	}
	if n := allocated(t, path); n != 0 {
		t.Errorf("after punching all it takes %d bytes", n)
	}
	_, err = Open(Config{Kind: KindHugetlbfs, Path: filepath.Join(dir, "more"), Size: 1 << 40, Create: true})
	if !errors.Is(err, unix.ENOMEM) || !strings.Contains(err.Error(), "nr_hugepages") {
		t.Errorf("more huge pages than there are: %v, expected ENOMEM and what to do", err)
	}
	if _, err := os.Stat(filepath.Join(dir, "more")); !errors.Is(err, os.ErrNotExist) {
		t.Error("an open that failed has left a file")
	}
	checkStrangers(t, Config{Kind: KindHugetlbfs, Path: path}, dir)
}

// checkStrangers checks that the file of a pool is refused if others can reach it.
func checkStrangers(t *testing.T, c Config, dir string) {
	t.Helper()
	name := filepath.Join(dir, "name")
	for what, change := range map[string]struct{ do, undo func() error }{
		"of another user": {
			func() error { return os.Chown(c.Path, 65534, 65534) }, func() error { return os.Chown(c.Path, 0, 0) },
		},
		"that others can write": {
			func() error { return os.Chmod(c.Path, 0o666) }, func() error { return os.Chmod(c.Path, 0o600) },
		},
		"with a second name": {
			func() error { return os.Link(c.Path, name) }, func() error { return os.Remove(name) },
		},
	} {
		if err := change.do(); err != nil {
			t.Fatal(err)
		}
		if _, err := Open(c); !errors.Is(err, ErrForeign) {
			t.Errorf("a file %s: %v, expected ErrForeign", what, err)
		}
		if err := change.undo(); err != nil {
			t.Fatal(err)
		}
	}
	link := c
	link.Path = filepath.Join(t.TempDir(), "link")
	if err := os.Symlink(c.Path, link.Path); err != nil {
		t.Fatal(err)
	}
	if _, err := Open(link); !errors.Is(err, ErrForeign) {
		t.Errorf("a symbolic link: %v, expected ErrForeign", err)
	}
	r, err := Open(c)
	if err != nil {
		t.Fatal(err)
	}
	if err := r.Close(); err != nil {
		t.Error(err)
	}
}

// TestDMABuf uses a memfd as the buffer: it is mapped and passed around the same way.
func TestDMABuf(t *testing.T) {
	fd := memfd(t, MinSize)
	r := mustOpen(t, Config{Kind: KindDMABuf, FD: fd})
	testRegion(t, r)
	info := r.Info()
	if info.Persistent != PersistsNothing || info.FD < 0 || info.FD == fd {
		t.Errorf("info %+v", info)
	}
	var st unix.Stat_t
	if err := unix.Fstat(info.FD, &st); err != nil || st.Size != MinSize {
		t.Errorf("Info.FD: %v, %d bytes", err, st.Size)
	}
}

// TestDirectIO runs the I/O of kind pmem on an ordinary file, opened like a device.
func TestDirectIO(t *testing.T) {
	path := filepath.Join(t.TempDir(), "device")
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE|unix.O_DIRECT, 0o600)
	if err != nil {
		t.Skip("no direct I/O in the temporary directory: ", err)
	}
	const size = 8 << 20
	if err := f.Truncate(size); err != nil {
		t.Fatal(err)
	}
	r := &pmem{f: f, size: size, info: Info{Kind: KindPmem}}
	defer r.Close()
	testRegion(t, r)
}

func TestGuard(t *testing.T) {
	path := filepath.Join(t.TempDir(), "f")
	if err := os.WriteFile(path, make([]byte, 8192), 0o600); err != nil {
		t.Fatal(err)
	}
	f, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	m, err := mapFile(f, 0, 8192, true)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Munmap(m)
	if err := os.Truncate(path, 0); err != nil {
		t.Fatal(err)
	}
	buf := make([]byte, 8192)
	if err := Guard(func() { copy(buf, m) }); err == nil {
		t.Error("reading a page that is gone is no error")
	}
	defer func() {
		if recover() == nil {
			t.Error("Guard hides other panics")
		}
	}()
	_ = Guard(func() { var none []int; _ = none[len(buf)] })
}

func TestFlush(t *testing.T) {
	b := make([]byte, 1000)
	for _, part := range [][]byte{nil, b[:1], b[63:65], b} {
		if err := flush(part); err != nil {
			t.Error(err)
		}
	}
}

func TestKindsAreDocumented(t *testing.T) {
	for _, kind := range Kinds() {
		_, err := Open(Config{Kind: kind, Path: "/nonexistent/region", Size: MinSize, Phys: Align})
		if err == nil || strings.Contains(err.Error(), fmt.Sprintf("%q is not one of", kind)) {
			t.Errorf("kind %q: %v", kind, err)
		}
	}
}
