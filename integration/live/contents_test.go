package live

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"math/rand/v2"
	"path"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/daxfs/daxfs-snapshotter/daxfs"
)

// errForeign reports bytes that do not belong to the file.
var errForeign = errors.New("foreign bytes")

// line is the unit of contents: each line names its contents and its offset.
const line = 32

// contents returns the bytes of a file. They depend only on id and size, and any 32 of them reveal the id.
func contents(id uint64, size int) []byte {
	b := make([]byte, (size+line-1)/line*line)
	x := id*0x9e3779b97f4a7c15 + 1
	for at := 0; at < len(b); at += line {
		x ^= x << 13
		x ^= x >> 7
		x ^= x << 17
		binary.LittleEndian.PutUint64(b[at:], id)
		binary.LittleEndian.PutUint64(b[at+8:], uint64(at))
		binary.LittleEndian.PutUint64(b[at+16:], x)
		binary.LittleEndian.PutUint64(b[at+24:], x*id)
	}
	return b[:size]
}

// compare returns an error that wraps errForeign unless got is the part of contents(id, size) at off.
func compare(got []byte, id uint64, size, off int) error {
	want := contents(id, size)[off:]
	if len(got) > len(want) {
		return fmt.Errorf("%w: %d bytes at %d, expected at most %d", errForeign, len(got), off, len(want))
	}
	want = want[:len(got)]
	if bytes.Equal(got, want) {
		return nil
	}
	at := 0
	for got[at] == want[at] {
		at++
	}
	at = at / line * line
	whose := "a short rest"
	switch {
	case at+line <= len(got) && bytes.Equal(got[at:at+line], make([]byte, line)):
		whose = "zeros"
	case at+line <= len(got):
		le := binary.LittleEndian
		whose = fmt.Sprintf("those of contents %#x at %d", le.Uint64(got[at:]), le.Uint64(got[at+8:]))
	}
	return fmt.Errorf("%w: at %d of contents %#x are %s", errForeign, off+at, id, whose)
}

// entry is one name of an image.
type entry struct {
	mode   uint32
	uid    uint32
	mtime  daxfs.Time
	xattrs map[string]string
	id     uint64 // of the contents of a regular file
	size   int
	link   string // target of a symlink
	rdev   uint64
	nlink  int    // of a regular file
	first  string // the first name of a group of hard links, else ""
}

func (e entry) regular() bool { return e.mode&unix.S_IFMT == unix.S_IFREG }
func (e entry) dir() bool     { return e.mode&unix.S_IFMT == unix.S_IFDIR }

// shape describes images.
type shape struct {
	Common int   // the number of common files
	Take   int   // about how many of them an image has
	Own    int   // files that no other image has
	Sizes  []int // of files; repeated values are more frequent
	Odd    bool  // with symlinks, special files, hard links and extended attributes
}

// shapes maps names to shapes, also for workers.
var shapes = map[string]shape{
	// With everything that an image can have.
	"rich": {
		Common: 300, Take: 60, Own: 8, Odd: true,
		Sizes: []int{0, 1, 31, 300, 4095, 4096, 4097, 9000, 20_000, 20_000, 60_000, 60_000, 300_000},
	},
	// With few sizes, so that the next image takes freed space.
	"reuse": {Common: 20, Take: 6, Own: 10, Sizes: []int{3000, 3000, 20_000, 20_000, 70_000, 300_000}},
	// Small files, for many images.
	"small": {Common: 40, Take: 6, Own: 4, Sizes: []int{0, 200, 3000, 9000}},
}

// image returns the contents of image n of a shape, by path; "" is the root.
func image(s shape, seed uint64, n int) map[string]entry {
	r := rand.New(rand.NewPCG(seed, uint64(n)+1<<32))
	out := map[string]entry{"": directory(r)}
	dirs := []string{""}
	for i := range 3 + r.IntN(5) {
		d := path.Join(dirs[r.IntN(len(dirs))], fmt.Sprintf("dir%d", i))
		dirs = append(dirs, d)
		out[d] = directory(r)
	}
	put := func(name string, e entry) string {
		p := path.Join(dirs[r.IntN(len(dirs))], name)
		out[p] = e
		return p
	}
	for range s.Take {
		i := r.IntN(s.Common)
		e := commonFile(s, seed, i)
		put(fmt.Sprintf("common%d%s", i, strings.Repeat("n", r.IntN(40))), e)
		if s.Odd && r.IntN(10) == 0 { // the same file again, but no hard link
			put(fmt.Sprintf("again%d", i), e)
		}
	}
	for i := range s.Own {
		id := uint64(n+1)<<24 | uint64(i)
		put(fmt.Sprintf("own%d", i), entry{
			mode: unix.S_IFREG | 0o644, uid: uint32(n % 5), mtime: daxfs.Time{Sec: int64(n)}, id: id,
			size: s.Sizes[r.IntN(len(s.Sizes))], nlink: 1,
		})
	}
	if !s.Odd {
		return out
	}
	for i := range r.IntN(3) {
		e := entry{mode: unix.S_IFREG | 0o600, mtime: daxfs.Time{Sec: 7}, id: 1<<20 | uint64(i), size: 5000}
		e.nlink = 2 + r.IntN(2)
		for k := range e.nlink {
			p := put(fmt.Sprintf("link%d-%d", i, k), e)
			if k == 0 {
				e.first = p
				out[p] = e
			}
		}
	}
	for i := range r.IntN(8) {
		put(fmt.Sprintf("symlink%d", i), entry{mode: unix.S_IFLNK | 0o777, link: strings.Repeat("../x", 1+r.IntN(500))})
	}
	put("fifo", entry{mode: unix.S_IFIFO | 0o622, mtime: daxfs.Time{Sec: 5}})
	put("null", entry{mode: unix.S_IFCHR | 0o666, rdev: unix.Mkdev(1, 3)})
	return out
}

func directory(r *rand.Rand) entry {
	return entry{mode: unix.S_IFDIR | 0o755, mtime: daxfs.Time{Sec: r.Int64N(1 << 30), Nsec: uint32(r.IntN(1e9))}}
}

// commonFile is a file that many images have.
func commonFile(s shape, seed uint64, i int) entry {
	r := rand.New(rand.NewPCG(seed, uint64(i)))
	e := entry{
		mode: unix.S_IFREG | []uint32{0o644, 0o755, 0o4755, 0o600}[r.IntN(4)], uid: []uint32{0, 0, 1000}[r.IntN(3)],
		mtime: daxfs.Time{Sec: r.Int64N(1 << 30), Nsec: uint32(r.IntN(1e9))}, id: uint64(i + 1),
		size: s.Sizes[r.IntN(len(s.Sizes))], nlink: 1,
	}
	if s.Odd && r.IntN(6) == 0 {
		e.xattrs = map[string]string{"user.note": strings.Repeat("v", r.IntN(200)), "trusted.daxfs": fmt.Sprint(i)}
	}
	return e
}
