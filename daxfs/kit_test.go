package daxfs_test

import (
	"bytes"
	"crypto/sha256"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"testing"

	"github.com/daxfs/daxfs-snapshotter/daxfs"
	"golang.org/x/sys/unix"
)

// memFile is a file in memory. Writing beyond its end fills the gap with zeros.
type memFile struct{ b []byte }

func (m *memFile) ReadAt(p []byte, off int64) (int, error) {
	if off >= int64(len(m.b)) {
		return 0, io.EOF
	}
	n := copy(p, m.b[off:])
	if n < len(p) {
		return n, io.EOF
	}
	return n, nil
}

func (m *memFile) WriteAt(p []byte, off int64) (int, error) {
	m.grow(off + int64(len(p)))
	return copy(m.b[off:], p), nil
}

func (m *memFile) Truncate(size int64) error {
	if size < int64(len(m.b)) {
		m.b = m.b[:size:size] // bytes behind the end must not come back
	}
	m.grow(size)
	return nil
}

func (m *memFile) grow(size int64) {
	if old := int64(len(m.b)); size > old {
		m.b = slices.Grow(m.b, int(size-old))[:size]
		clear(m.b[old:])
	}
}

// store keeps contents like a pool: page aligned, zero tails, equal ones once.
type store struct {
	f    memFile
	next int64
	have map[[32]byte]daxfs.Data
}

func newStore(start int64) *store {
	s := &store{next: start, have: map[[32]byte]daxfs.Data{}}
	s.f.Truncate(start)
	return s
}

func (s *store) put(p []byte) daxfs.Data {
	if len(p) == 0 {
		return daxfs.Data{}
	}
	d := daxfs.Data{Off: s.next, Size: int64(len(p)), Sum: sha256.Sum256(p)}
	if old, ok := s.have[d.Sum]; ok {
		return old
	}
	s.have[d.Sum] = d
	s.f.WriteAt(p, s.next)
	s.next = (s.next + d.Size + daxfs.BlockSize - 1) / daxfs.BlockSize * daxfs.BlockSize
	s.f.Truncate(s.next)
	return d
}

func (s *store) get(d daxfs.Data) []byte {
	if d.Size == 0 {
		return nil
	}
	return s.f.b[d.Off : d.Off+d.Size]
}

// fileImage plans root and writes it behind the data of s, which starts at BlockSize. It checks the image.
func (s *store) fileImage(t testing.TB, root *daxfs.Node, o daxfs.Options) (*daxfs.Plan, []byte) {
	t.Helper()
	p, err := daxfs.NewPlan(root, o)
	if err != nil {
		t.Fatal(err)
	}
	if err := p.Place(daxfs.Placement{Meta: s.next, End: s.next + p.MetaSize()}); err != nil {
		t.Fatal(err)
	}
	if err := p.WriteTo(&s.f); err != nil {
		t.Fatal(err)
	}
	if got, want := int64(len(s.f.b)), s.next+p.MetaSize(); got != want {
		t.Fatalf("image has %d bytes, expected %d", got, want)
	}
	mustCheck(t, s.f.b)
	return p, s.f.b
}

// windowImage plans root and writes its segment at image, below the data of s. It returns the checked window.
func (s *store) windowImage(t testing.TB, root *daxfs.Node, image int64) (*daxfs.Plan, []byte) {
	t.Helper()
	p, err := daxfs.NewPlan(root, daxfs.Options{})
	if err != nil {
		t.Fatal(err)
	}
	end := max(s.next, image+daxfs.BlockSize+p.MetaSize())
	s.f.Truncate(end)
	if err := p.Place(daxfs.Placement{Image: image, Meta: image + daxfs.BlockSize, End: end}); err != nil {
		t.Fatal(err)
	}
	if err := p.WriteTo(io.NewOffsetWriter(&s.f, image)); err != nil {
		t.Fatal(err)
	}
	mustCheck(t, s.f.b[image:])
	return p, s.f.b[image:]
}

func writeTemp(t testing.TB, b []byte) string {
	t.Helper()
	name := filepath.Join(t.TempDir(), "image.daxfs")
	if err := os.WriteFile(name, b, 0o600); err != nil {
		t.Fatal(err)
	}
	return name
}

func dir(entries map[string]*daxfs.Node) *daxfs.Node {
	return &daxfs.Node{Mode: unix.S_IFDIR | 0o755, Entries: entries}
}

func symlink(target string) *daxfs.Node {
	return &daxfs.Node{Mode: unix.S_IFLNK | 0o777, Target: target}
}

// acl returns a POSIX ACL in the form of getxattr(2): owner, a named user, group, mask, others.
func acl(uid uint32) []byte {
	b := []byte{2, 0, 0, 0}
	for _, e := range [][3]uint32{
		{1, 7, 1<<32 - 1},
		{2, 5, uid},
		{4, 5, 1<<32 - 1},
		{16, 7, 1<<32 - 1},
		{32, 1, 1<<32 - 1},
	} {
		b = append(b, byte(e[0]), 0, byte(e[1]), 0, byte(e[2]), byte(e[2]>>8), byte(e[2]>>16), byte(e[2]>>24))
	}
	return b
}

// capability is a security.capability value: cap_net_bind_service+ep, version 2.
var capability = []byte{1, 0, 0, 2, 0, 4, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0}

// randomTree makes about n inodes of all kinds. Equal seeds give equal trees.
func randomTree(seed uint64, n int, s *store) *daxfs.Node {
	r := rand.New(rand.NewPCG(seed, 1))
	g := &generator{r: r, s: s, root: dir(map[string]*daxfs.Node{})}
	g.attrs(g.root)
	dirs := []*daxfs.Node{g.root}
	var others []*daxfs.Node
	for i := 1; i < n; i++ {
		parent := dirs[r.IntN(len(dirs))]
		name := g.name()
		if parent.Entries[name] != nil {
			continue
		}
		if len(others) > 0 && r.IntN(12) == 0 {
			parent.Entries[name] = others[r.IntN(len(others))] // hard link, of any type
			continue
		}
		c := g.node()
		parent.Entries[name] = c
		if c.Mode&unix.S_IFMT == unix.S_IFDIR {
			dirs = append(dirs, c)
		} else {
			others = append(others, c)
		}
	}
	return g.root
}

type generator struct {
	r    *rand.Rand
	s    *store
	root *daxfs.Node
}

func (g *generator) name() string {
	n := 1 + g.r.IntN(14)
	if g.r.IntN(20) == 0 {
		n = 1 + g.r.IntN(255)
	}
	b := make([]byte, n)
	for {
		for i := range b {
			b[i] = byte('a' + g.r.IntN(26))
			if g.r.IntN(3) == 0 {
				b[i] = byte(1 + g.r.IntN(255))
			}
			if b[i] == '/' {
				b[i] = '.'
			}
		}
		if s := string(b); s != "." && s != ".." {
			return s
		}
	}
}

func (g *generator) bytes(n int) []byte {
	b := make([]byte, n)
	for i := range b {
		b[i] = byte(g.r.Uint32())
	}
	return b
}

func (g *generator) node() *daxfs.Node {
	n := &daxfs.Node{}
	switch k := g.r.IntN(20); {
	case k < 10:
		n.Mode = unix.S_IFREG
		size := g.r.IntN(300)
		switch g.r.IntN(10) {
		case 0:
			size = g.r.IntN(100_000)
		case 1, 2:
			size = g.r.IntN(10_000)
		case 3:
			size = 4096 * g.r.IntN(3)
		}
		n.Data = g.s.put(g.bytes(size))
	case k < 14:
		n.Mode = unix.S_IFDIR
		n.Entries = map[string]*daxfs.Node{}
	case k < 17:
		n.Mode = unix.S_IFLNK
		size := 1 + g.r.IntN(60)
		if g.r.IntN(6) == 0 {
			size = 1 + g.r.IntN(4095)
		}
		n.Target = string(bytes.ReplaceAll(g.bytes(size), []byte{0}, []byte{'x'}))
	case k < 18:
		n.Mode = unix.S_IFCHR
		n.Rdev = unix.Mkdev(uint32(g.r.IntN(4096)), uint32(g.r.IntN(1<<20)))
	case k < 19:
		n.Mode = unix.S_IFBLK
		n.Rdev = unix.Mkdev(uint32(g.r.IntN(4096)), uint32(g.r.IntN(1<<20)))
	default:
		n.Mode = []uint32{unix.S_IFIFO, unix.S_IFSOCK}[g.r.IntN(2)]
	}
	g.attrs(n)
	return n
}

func (g *generator) attrs(n *daxfs.Node) {
	r := g.r
	n.Mode |= r.Uint32() & 0o7777
	if n.Mode&unix.S_IFMT == unix.S_IFLNK {
		n.Mode |= 0o777
	}
	n.UID, n.GID = r.Uint32N(70_000), r.Uint32N(1000)
	if r.IntN(8) == 0 {
		n.UID, n.GID = 1<<32-2, r.Uint32N(1<<32-1)
	}
	n.Mtime = daxfs.Time{Sec: 1_600_000_000}
	switch r.IntN(4) {
	case 0:
		n.Mtime = daxfs.Time{Sec: r.Int64N(1 << 34), Nsec: r.Uint32N(1e9)}
	case 1:
		n.Mtime = daxfs.Time{Sec: -r.Int64N(1 << 33), Nsec: r.Uint32N(1e9)}
	}
	if r.IntN(3) > 0 {
		return
	}
	n.Xattrs = append(n.Xattrs, daxfs.Xattr{Name: "trusted.shared", Value: []byte("the same everywhere")})
	typ := n.Mode & unix.S_IFMT
	if typ == unix.S_IFREG || typ == unix.S_IFDIR {
		for i := range r.IntN(4) {
			n.Xattrs = append(n.Xattrs,
				daxfs.Xattr{Name: fmt.Sprintf("user.%d.%x", i, g.bytes(r.IntN(20))), Value: g.bytes(r.IntN(50))})
		}
		if r.IntN(30) == 0 {
			n.Xattrs = append(n.Xattrs, daxfs.Xattr{Name: "user.big", Value: g.bytes(r.IntN(65536))})
		}
		n.Xattrs = append(n.Xattrs, daxfs.Xattr{Name: "system.posix_acl_access", Value: acl(r.Uint32N(5))})
	}
	if typ == unix.S_IFREG {
		n.Xattrs = append(n.Xattrs, daxfs.Xattr{Name: "security.capability", Value: capability})
	}
	if typ == unix.S_IFDIR {
		n.Xattrs = append(n.Xattrs, daxfs.Xattr{Name: "system.posix_acl_default", Value: acl(r.Uint32N(5))})
	}
	r.Shuffle(len(n.Xattrs), func(i, j int) { n.Xattrs[i], n.Xattrs[j] = n.Xattrs[j], n.Xattrs[i] })
}

// goldenImage has one of everything. Its layout is pinned by testdata/golden.txt.
func goldenImage(t testing.TB) (*daxfs.Plan, []byte) {
	s := newStore(daxfs.BlockSize)
	at := func(sec int64, nsec uint32, n *daxfs.Node) *daxfs.Node {
		n.Mtime = daxfs.Time{Sec: sec, Nsec: nsec}
		return n
	}
	mark := daxfs.Xattr{Name: "user.mark", Value: []byte("the same for three")}
	null := &daxfs.Node{Mode: unix.S_IFCHR | 0o666, Rdev: unix.Mkdev(1, 3)}
	hello := at(-1, 999_999_999, &daxfs.Node{
		Mode: unix.S_IFREG | 0o755, UID: 1000, GID: 70_000, Data: s.put([]byte("hello")),
		Xattrs: []daxfs.Xattr{mark, {Name: "security.capability", Value: capability}},
	})
	root := at(1_700_000_000, 5, dir(map[string]*daxfs.Node{
		"bin": at(1_700_000_000, 5, dir(map[string]*daxfs.Node{
			"hello": hello,
			"hi":    hello,
			"sh":    at(1_700_000_000, 5, symlink("hello")),
		})),
		"dev": {Mode: unix.S_IFDIR | 0o1777, Entries: map[string]*daxfs.Node{
			"fifo": {Mode: unix.S_IFIFO | 0o600},
			"null": null,
			"sda":  {Mode: unix.S_IFBLK | 0o660, Rdev: unix.Mkdev(8, 300)},
			"sock": {Mode: unix.S_IFSOCK | 0o700},
		}, Xattrs: []daxfs.Xattr{mark, {Name: "system.posix_acl_default", Value: acl(1000)}}},
		"null-again": null,
		"empty":      at(1_700_000_000, 5, &daxfs.Node{Mode: unix.S_IFREG | 0o600, Xattrs: []daxfs.Xattr{mark}}),
		"data": at(1_700_000_000, 5,
			&daxfs.Node{Mode: unix.S_IFREG | 0o4755, Data: s.put(bytes.Repeat([]byte("data."), 1000))}),
		"long": symlink(string(bytes.Repeat([]byte("x"), 4095))),
		"-":    symlink("."),
	}))
	return s.fileImage(t, root, daxfs.Options{Label: "golden"})
}

func imageSum(img []byte) string {
	return fmt.Sprintf("sha256 %x bytes %d\n", sha256.Sum256(img), len(img))
}
