package lease

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/daxfs/daxfs-snapshotter/pool"
	"github.com/daxfs/daxfs-snapshotter/pool/region"
)

var (
	guest1 = Reader{Name: "guest1", Machine: [16]byte{1}}
	guest2 = Reader{Name: "guest2", Machine: [16]byte{2}}
	poolA  = [16]byte{0xa}
)

func img(n int) pool.Image {
	return pool.Image{Key: fmt.Sprint(n), Slot: n, UUID: [16]byte{9, byte(n)}}
}

// newRegion makes a file of zeros.
func newRegion(t testing.TB, size int64) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "a.lease")
	if err := os.WriteFile(path, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Truncate(path, size); err != nil {
		t.Fatal(err)
	}
	return path
}

func open(t testing.TB, path string, r Reader) *Lease {
	t.Helper()
	l, err := Open(path, r)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	return l
}

func claim(t testing.TB, l *Lease, n int, want bool) {
	t.Helper()
	if held, err := l.Claim(poolA, img(n)); err != nil || held != want {
		t.Fatalf("claim of image %d: held %v, %v; expected held %v", n, held, err, want)
	}
}

func regions(t testing.TB, specs ...string) *Regions {
	t.Helper()
	r, err := NewRegions(specs)
	if err != nil {
		t.Fatal(err)
	}
	return r
}

func users(t testing.TB, r *Regions, n int) string {
	t.Helper()
	list, err := r.Users(poolA, img(n))
	if err != nil {
		t.Fatal(err)
	}
	return strings.Join(list, " ")
}

func TestClaim(t *testing.T) {
	path := newRegion(t, MinSize)
	owner := regions(t, path)
	if list, err := owner.List(); err != nil || len(list) != 1 || list[0].Reader != "" || len(list[0].Claims) != 0 {
		t.Errorf("zeros: %+v, %v", list, err)
	}
	l := open(t, path, guest1)
	claim(t, l, 3, false)
	claim(t, l, 3, true)
	claim(t, l, 4, false)
	if got := users(t, owner, 3) + users(t, owner, 4) + users(t, owner, 5); got != "guest1guest1" {
		t.Errorf("users %q", got)
	}
	if got, err := owner.Users([16]byte{0xb}, img(3)); err != nil || len(got) != 0 {
		t.Errorf("another pool is used by %q, %v", got, err)
	}
	for _, m := range []pool.Image{{Slot: 4, UUID: img(3).UUID}, {Slot: 3, UUID: img(4).UUID}} {
		if got, err := owner.Users(poolA, m); err != nil || len(got) != 0 {
			t.Errorf("image %+v is used by %q, %v", m, got, err)
		}
	}
	if err := l.Release(poolA, img(3)); err != nil {
		t.Fatal(err)
	}
	if err := l.Release(poolA, img(3)); err != nil {
		t.Errorf("release again: %v", err)
	}
	if users(t, owner, 3) != "" || users(t, owner, 4) != "guest1" {
		t.Error("the wrong claim was released")
	}
	// The reader's process restarts: the claims are still there.
	l.Close()
	l = open(t, path, guest1)
	claim(t, l, 4, true)
	if got, err := owner.Any(poolA); err != nil || !slices.Equal(got, []string{"guest1"}) {
		t.Errorf("the pool is used by %q, %v", got, err)
	}
	if got, err := owner.Any([16]byte{0xb}); err != nil || len(got) != 0 {
		t.Errorf("another pool is used by %q, %v", got, err)
	}
}

// The bytes of a region are those of docs/pool-format.md, because other programs read and write them.
func TestFormat(t *testing.T) {
	path := newRegion(t, MinSize)
	claim(t, open(t, path, guest2), 3, false)
	got, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	le := binary.LittleEndian
	sum := func(b []byte) uint32 { return crc32.Checksum(b, crc32.MakeTable(crc32.Castagnoli)) }
	want := make([]byte, MinSize)
	copy(want, "DAXFSLS\x01\x01\x00\x00\x00\x40\x00\x00\x00")
	want[16] = 2                // the machine
	copy(want[32:40], got[32:]) // the boot is random
	want[40] = 6
	copy(want[64:], "guest2")
	le.PutUint32(want[4092:], sum(want[:4092]))
	want[4096] = 0xa // the pool
	want[4112], want[4113] = 9, 3
	want[4128] = 3 // the slot
	copy(want[4136:4144], got[32:])
	le.PutUint32(want[4156:], sum(want[4096:4156]))
	if !bytes.Equal(got, want) {
		t.Errorf("header\n%x\nexpected\n%x\nentry\n%x\nexpected\n%x", got[:128], want[:128], got[4096:4160],
			want[4096:4160])
	}
}

func TestClaimFull(t *testing.T) {
	l := open(t, newRegion(t, MinSize), guest1)
	for i := range 64 {
		claim(t, l, i, false)
	}
	if _, err := l.Claim(poolA, img(64)); !errors.Is(err, ErrFull) {
		t.Errorf("one claim more: %v, expected ErrFull", err)
	}
	claim(t, l, 63, true)
	if err := l.Release(poolA, img(10)); err != nil {
		t.Fatal(err)
	}
	claim(t, l, 64, false)
}

// TestTwoReaders opens a region with a second reader: another process, or another machine.
func TestTwoReaders(t *testing.T) {
	path := newRegion(t, MinSize)
	l := open(t, path, guest1)
	if _, err := Open(path, guest1); !errors.Is(err, region.ErrBusy) {
		t.Errorf("another process: %v, expected ErrBusy", err)
	}
	claim(t, l, 1, false)
	l.Close()
	_, err := Open(path, guest2)
	if taken, ok := errors.AsType[*TakenError](err); !ok || !errors.Is(err, ErrTaken) || taken.Reader != "guest1" {
		t.Errorf("another machine: %v, expected ErrTaken by guest1", err)
	}
	if users(t, regions(t, path), 1) != "guest1" {
		t.Error("the claim is gone")
	}
}

// TestCloned boots a second machine with the same identity: the first notices, and claims stay.
func TestCloned(t *testing.T) {
	path := newRegion(t, MinSize)
	first := open(t, path, guest1)
	claim(t, first, 1, false)
	// Act like a machine that does not share the lock.
	h := first.h
	h.run[0] ^= 1
	if err := first.m.store(h.encode(), 0); err != nil {
		t.Fatal(err)
	}
	if _, err := first.Claim(poolA, img(2)); !errors.Is(err, ErrLost) {
		t.Errorf("claim: %v, expected ErrLost", err)
	}
	if err := first.Release(poolA, img(1)); !errors.Is(err, ErrLost) {
		t.Errorf("release: %v, expected ErrLost", err)
	}
	if users(t, regions(t, path), 1) != "guest1" {
		t.Error("the claim is gone")
	}
}

// TestRebooted: claims of an earlier boot hold until they are ended or the new boot takes them over.
func TestRebooted(t *testing.T) {
	path := newRegion(t, MinSize)
	l := open(t, path, guest1)
	claim(t, l, 1, false)
	claim(t, l, 2, false)
	old := l.h.run
	l.h.run[0] ^= 1 // another boot
	if err := l.m.store(l.h.encode(), 0); err != nil {
		t.Fatal(err)
	}
	claim(t, l, 1, true)
	claim(t, l, 3, false)
	owner := regions(t, path)
	list, err := owner.List()
	if err != nil || len(list) != 1 || len(list[0].Claims) != 3 || old == l.h.run {
		t.Fatalf("%+v, %v", list, err)
	}
	for _, c := range list[0].Claims {
		if c.Earlier != (c.Slot == 2) {
			t.Errorf("claim %+v", c)
		}
	}
	if n, err := owner.Void("guest1", true); err != nil || n != 1 {
		t.Errorf("voided %d, %v", n, err)
	}
	if got := users(t, owner, 1) + "," + users(t, owner, 2) + "," + users(t, owner, 3); got != "guest1,,guest1" {
		t.Errorf("users %q", got)
	}
	claim(t, l, 1, true)
}

func TestVoid(t *testing.T) {
	path := newRegion(t, MinSize)
	l := open(t, path, guest1)
	claim(t, l, 1, false)
	owner := regions(t, path)
	if _, err := owner.Void("guest2", false); !errors.Is(err, pool.ErrNotFound) {
		t.Errorf("unknown reader: %v, expected ErrNotFound", err)
	}
	if n, err := owner.Void(path, false); err != nil || n != 1 {
		t.Errorf("voided %d, %v", n, err)
	}
	if users(t, owner, 1) != "" {
		t.Error("the claim is still there")
	}
	// A reader that lives after all must not go on.
	if _, err := l.Claim(poolA, img(1)); !errors.Is(err, ErrLost) {
		t.Errorf("claim: %v, expected ErrLost", err)
	}
	l.Close()
	claim(t, open(t, path, guest2), 1, false) // the region is free for others
}

// TestLaunched tests that claims end when nobody holds the lock of a region.
func TestLaunched(t *testing.T) {
	path := newRegion(t, MinSize)
	launcher, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer launcher.Close()
	if err := unix.Flock(int(launcher.Fd()), unix.LOCK_EX); err != nil {
		t.Fatal(err)
	}
	l := open(t, path, guest1)
	claim(t, l, 1, false)
	for _, spec := range []string{launched + path, launched + filepath.Dir(path)} {
		if got := users(t, regions(t, spec), 1); got != "guest1" {
			t.Errorf("%q: the launcher lives: %q", spec, got)
		}
	}
	l.Close()
	if got := users(t, regions(t, launched+path), 1); got != "guest1" {
		t.Errorf("the reader ended and its launcher lives: %q", got)
	}
	launcher.Close()
	if got := users(t, regions(t, path), 1); got != "guest1" {
		t.Errorf("not told that there is a launcher: %q", got)
	}
	if got := users(t, regions(t, launched+filepath.Dir(path)), 1); got != "" {
		t.Errorf("the launcher is gone: %q", got)
	}
	claim(t, open(t, path, guest2), 1, false)
}

// TestTorn tests torn entries: for the owner they hold everything, and a reader that opens the region
// clears them.
func TestTorn(t *testing.T) {
	path := newRegion(t, MinSize)
	l := open(t, path, guest1)
	claim(t, l, 1, false)
	if err := l.put(5, append([]byte{1}, make([]byte, entrySize-1)...)); err != nil {
		t.Fatal(err)
	}
	owner := regions(t, path)
	if users(t, owner, 77) != "guest1" {
		t.Error("a torn entry does not hold an image")
	}
	l.Close()
	open(t, path, guest1)
	if users(t, owner, 77) != "" || users(t, owner, 1) != "guest1" {
		t.Error("the reader has not cleared the torn entry alone")
	}
}

func TestOpenRefuses(t *testing.T) {
	dir := t.TempDir()
	write := func(name string, b []byte) string {
		path := filepath.Join(dir, name)
		if err := os.WriteFile(path, b, 0o600); err != nil {
			t.Fatal(err)
		}
		return path
	}
	data := write("data", []byte(strings.Repeat("data", MinSize)))
	link := filepath.Join(dir, "link")
	if err := os.Symlink(newRegion(t, MinSize), link); err != nil {
		t.Fatal(err)
	}
	for spec, want := range map[string]error{
		data:                                    region.ErrForeign,
		write("short", make([]byte, MinSize-1)): region.ErrSize,
		write("page", nil):                      region.ErrSize,
		dir:                                     unix.EISDIR,
		link:                                    unix.ELOOP,
		"/dev/null":                             region.ErrKind,
		filepath.Join(dir, "none"):              os.ErrNotExist,
		newRegion(t, MinSize) + "@4096+8192":    region.ErrSize,
		newRegion(t, MinSize) + "@1048576+8388608": region.ErrSize,
	} {
		if l, err := Open(spec, guest1); !errors.Is(err, want) {
			t.Errorf("%q: %v, %v; expected %v", spec, l, err, want)
		}
	}
	for _, r := range []Reader{{}, {Name: strings.Repeat("a", 65)}, {Name: "\xff"}, {Name: "a\x00b"}} {
		if _, err := Open(newRegion(t, MinSize), r); !errors.Is(err, pool.ErrInvalid) {
			t.Errorf("reader %+v: %v, expected ErrInvalid", r, err)
		}
	}
	for _, spec := range []string{"relative", "flock:relative", "flock:/a@4096+8192", "/a@1+2", "12+x", ""} {
		if _, err := NewRegions([]string{spec}); err == nil {
			t.Errorf("regions %q were accepted", spec)
		}
	}
	// A region that the owner cannot read holds everything.
	if got, err := regions(t, filepath.Join(dir, "short")).Users(poolA, img(1)); err == nil {
		t.Errorf("a region that is too small: %q", got)
	}
	if got, err := regions(t, data).Users(poolA, img(1)); err != nil || len(got) != 1 {
		t.Errorf("a region of other data: %q, %v; expected that it holds all", got, err)
	}
	if got, err := regions(t, filepath.Join(dir, "none")).Users(poolA, img(1)); err != nil || len(got) != 0 {
		t.Errorf("a region that is not there: %q, %v", got, err)
	}
}

// TestRange puts two readers into one file, side by side.
func TestRange(t *testing.T) {
	path := newRegion(t, 4*MinSize)
	a, b := fmt.Sprintf("%s@%d+%d", path, 0, MinSize), fmt.Sprintf("%s@%d+%d", path, MinSize, MinSize)
	la, lb := open(t, a, guest1), open(t, b, guest2)
	claim(t, la, 1, false)
	claim(t, lb, 2, false)
	owner := regions(t, a, b)
	if users(t, owner, 1) != "guest1" || users(t, owner, 2) != "guest2" {
		t.Errorf("users %q and %q", users(t, owner, 1), users(t, owner, 2))
	}
	if _, err := Open(a, guest1); !errors.Is(err, region.ErrBusy) {
		t.Errorf("the same range: %v, expected ErrBusy", err)
	}
}

// TestWithin finds regions that lie in a pool.
func TestWithin(t *testing.T) {
	path := newRegion(t, 4<<20)
	link := path + ".link"
	if err := os.Symlink(path, link); err != nil {
		t.Fatal(err)
	}
	file, phys := region.Info{Path: path}, region.Info{Path: "/dev/mem", HasPhys: true, Phys: 1 << 30}
	for _, c := range []struct {
		spec string
		mem  region.Info
		want bool
	}{
		{path, file, true},
		{link, file, true},
		{launched + path, file, true},
		{path + "@2093056+8192", file, true},
		{path + "@2097152+8192", file, false},
		{newRegion(t, MinSize), file, false},
		{filepath.Dir(path), file, false},
		{filepath.Join(t.TempDir(), "none"), file, false},
		{"0x40000000+8192", phys, true},
		{"0x3ffff000+8192", phys, true},
		{"0x40200000+8192", phys, false},
		{"0x3fffe000+8192", phys, false},
		{"0x40000000+8192", file, false},
	} {
		if got, err := Within(c.spec, c.mem, 2<<20); err != nil || got != c.want {
			t.Errorf("%q in %+v: %v, %v; expected %v", c.spec, c.mem, got, err, c.want)
		}
	}
	if _, err := Within("relative", file, 2<<20); err == nil {
		t.Error("a region that is none was accepted")
	}
}

// TestBlock opens a block device in the reader, and the file behind it in the owner.
func TestBlock(t *testing.T) {
	if unavailable := os.Getuid() != 0 || testing.Short(); unavailable {
		t.Skip("needs root, and not -short")
	}
	path := newRegion(t, MaxSize)
	out, err := exec.Command("losetup", "--find", "--show", path).Output()
	if err != nil {
		t.Fatalf("losetup: %v", err)
	}
	device := strings.TrimSpace(string(out))
	t.Cleanup(func() {
		if err := exec.Command("losetup", "--detach", device).Run(); err != nil {
			t.Error(err)
		}
	})
	l := open(t, device, guest1)
	claim(t, l, 1, false)
	claim(t, l, 70, false)
	for _, owner := range []*Regions{regions(t, path), regions(t, device)} {
		if got := users(t, owner, 1) + "," + users(t, owner, 70) + "," + users(t, owner, 2); got != "guest1,guest1," {
			t.Errorf("users %q", got)
		}
	}
	if _, err := Open(device, guest1); !errors.Is(err, region.ErrBusy) {
		t.Errorf("another process: %v, expected ErrBusy", err)
	}
	if err := l.Release(poolA, img(1)); err != nil {
		t.Fatal(err)
	}
	owner := regions(t, path)
	if users(t, owner, 1) != "" || users(t, owner, 70) != "guest1" {
		t.Error("the wrong claim was released")
	}
	if n, err := regions(t, device).Void(device, false); err != nil || n != 1 {
		t.Errorf("voided %d, %v", n, err)
	}
	if _, err := l.Claim(poolA, img(70)); !errors.Is(err, ErrLost) {
		t.Errorf("claim: %v, expected ErrLost", err)
	}
}

// FuzzRegion lets a reader write arbitrary bytes into its region. The owner must not panic, must read
// a bounded amount, and must never overlook a claim.
func FuzzRegion(f *testing.F) {
	h := header{reader: guest1}
	f.Add(h.encode()[:128], entryOf(poolA, img(1), h.run).encode(), true)
	f.Add([]byte("x"), []byte{1}, false)
	path := newRegion(f, MinSize)
	owner := regions(f, path)
	f.Fuzz(func(t *testing.T, head, entries []byte, mine bool) {
		b := make([]byte, MinSize)
		copy(b[headerSize:], entries)
		copy(b[:headerSize], head)
		if mine {
			copy(b[MinSize-entrySize:], entryOf(poolA, img(1), [8]byte{}).encode())
		}
		if err := os.WriteFile(path, b, 0o600); err != nil {
			t.Fatal(err)
		}
		list, err := owner.List()
		if err != nil || len(list) != 1 || len(list[0].Claims)+list[0].Torn > 64 {
			t.Fatalf("%+v, %v", list, err)
		}
		if got, err := owner.Users(poolA, img(1)); err != nil || mine && len(got) != 1 {
			t.Fatalf("users %q, %v", got, err)
		}
		l, err := Open(path, guest1)
		if err != nil {
			return
		}
		defer l.Close()
		if _, err := l.Claim(poolA, img(2)); err != nil && !errors.Is(err, ErrFull) {
			t.Fatal(err)
		}
		if mine && users(t, owner, 1) == "" {
			t.Fatal("the claim is gone")
		}
	})
}
