package daxfs

import (
	"bytes"
	"cmp"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"math"
	"slices"
	"strings"

	"github.com/daxfs/daxfs-snapshotter/daxfs/internal/disk"
	"golang.org/x/sys/unix"
)

// MaxLabel bounds Options.Label, in bytes. Linux 6.6 and many others mount no image whose label has
// no NUL behind it.
const MaxLabel = disk.ErofsLabelSize - 1

// Options are the choices of an image that its tree does not make. The zero value is a good default.
type Options struct {
	// Label is the volume name of the EROFS half, up to MaxLabel bytes without NUL.
	Label string
	// Digests adds a digest table, by which Prove proves every byte of the image. It is for image files: a window, whose
	// contents lie behind the metadata, cannot have one. Every Data.Sum has to be right.
	Digests bool
}

// Plan is the layout of an image: every inode and every offset, before a byte is written. The same tree and options
// give an equal plan, whatever the order in which maps were filled. A plan holds no reference to the tree.
//
// Place says where the metadata goes; it may be called again for another place. WriteTo writes it. A Plan may be read
// by several goroutines as long as none calls Place.
type Plan struct {
	label  string
	inodes []inode // depth first, names sorted; the root is the first
	sums   [][32]byte
	xattrs []xattr
	stats  Stats
	left   []LeftOut
	uuid   [16]byte
	epoch  Time // modification time of every compact inode

	// The core is the metadata without the overlay pair. Offsets in it count from its first byte.
	pieces   []piece // of the EROFS part, in the order of their offsets
	shared   []int32 // shared xattrs in the order of their offsets
	v8Table  int64
	v8Names  int64
	coreSize int64
	// The digest table follows the core, if there is one.
	digests    []int32 // an inode for each distinct contents, in the order of their addresses
	digestSize int64   // 0 without a table

	place *spot
}

// inode is one planned inode. There may be millions: what most of them lack is in inodeMore.
type inode struct {
	mode     uint32
	uid, gid uint32
	nlink    uint32
	rdev     uint32 // as EROFS stores it
	ino      uint32 // from 1; those of the DAXFS half come first
	parent   int32  // the directory of the first name; the root is its own
	nth      int32  // the entry of parent that is the first name
	sum      int32  // of the contents of a regular file with any, in Plan.sums
	extended bool
	inline   bool // the last block follows inode and xattrs
	mtime    Time
	size     int64 // as the EROFS half stores it; of a regular file, the size of its contents
	addr     int64 // of the contents
	off      int64 // of the inode in the core
	*inodeMore
}

// inodeMore is what a directory, a symbolic link and an inode with xattrs have besides. The others share noMore, which
// is never written to.
type inodeMore struct {
	target    string
	kids      []dirent
	xattrs    []int32 // numbers of Plan.xattrs, sorted by name
	nshared   int     // how many of xattrs are references; they come first
	xbytes    int     // bytes of xattrs after the inode
	blocks    int64   // of the whole blocks of a directory or symlink in the core; 0 = none
	v8Off     int64   // of the DAXFS entries or target in the core
	v8Entries int     // entries of a directory in the DAXFS half
}

var noMore inodeMore

type dirent struct {
	name  string
	child int32 // index in Plan.inodes
}

// xattr is one distinct name and value. Its bytes are those of an entry on disk.
type xattr struct {
	name   string
	enc    string
	uses   int
	shared bool
	off    int64 // in the core, if shared
}

func (i *inode) isDir() bool     { return i.mode&unix.S_IFMT == unix.S_IFDIR }
func (i *inode) isSymlink() bool { return i.mode&unix.S_IFMT == unix.S_IFLNK }
func (i *inode) isRegular() bool { return i.mode&unix.S_IFMT == unix.S_IFREG }

// hasData tells whether the inode is a regular file with contents.
func (i *inode) hasData() bool { return i.isRegular() && i.size > 0 }

// data returns the contents of an inode, which are of size 0 if it has none.
func (p *Plan) data(i *inode) Data {
	if !i.hasData() {
		return Data{}
	}
	return Data{Off: i.addr, Size: i.size, Sum: p.sums[i.sum]}
}

// name is the first name of an inode that is not the root.
func (p *Plan) name(i *inode) string { return p.inodes[i.parent].kids[i.nth].name }

// inV8 tells whether the DAXFS half can hold the inode.
func (i *inode) inV8() bool { return i.isDir() || i.isSymlink() || i.isRegular() }

// Stats are the counts of a plan.
type Stats struct {
	Inodes      int   // distinct inodes, the root included
	Names       int   // directory entries, without "." and ".."
	Directories int   // the root included
	Files       int   // regular files
	Symlinks    int   //
	Others      int   // devices, fifos and sockets
	Xattrs      int   // inodes that have extended attributes: the DAXFS half shows none of them
	V8Inodes    int   // inodes of the DAXFS half
	V8Names     int   // directory entries of the DAXFS half
	FileBytes   int64 // sum of the sizes of all regular files, hard links once
	MetaBytes   int64 // MetaSize
}

// maxLeftOut bounds the bytes of the paths that are listed: many devices deep in a tree are small in a layer and in an
// image, but their paths are not.
const maxLeftOut = 16 << 20

// LeftOut is one name that the DAXFS half does not have because its kernel module refuses such inodes.
type LeftOut struct {
	Path   string // absolute, "/dev/null"
	Reason string // "character device"
}

// ErrInvalid is wrapped by every error that says that a tree, an option or a placement cannot become an image.
var ErrInvalid = errors.New("invalid image input")

// TreeError is the error of a node that an image cannot hold. It wraps ErrInvalid.
type TreeError struct {
	Path string // absolute, the first name of the node
	Err  error
}

func (e *TreeError) Error() string { return fmt.Sprintf("%q: %v", e.Path, e.Err) }

func (e *TreeError) Unwrap() error { return e.Err }

func invalid(format string, args ...any) error {
	return fmt.Errorf("%w: %s", ErrInvalid, fmt.Sprintf(format, args...))
}

// NewPlan lays out the tree below root, which is a directory. It refuses what an image cannot hold with a *TreeError,
// and bad options with an error that wraps ErrInvalid. The tree is not changed and may be changed afterwards.
func NewPlan(root *Node, o Options) (*Plan, error) {
	p, err := newTree(root, o)
	if err != nil {
		return nil, err
	}
	if err := p.finish(); err != nil {
		return nil, err
	}
	if o.Digests {
		if err := p.layoutDigests(); err != nil {
			return nil, err
		}
	}
	p.stats.MetaBytes = p.MetaSize()
	return p, nil
}

// newTree checks a tree and plans its inodes, but not where they go.
func newTree(root *Node, o Options) (*Plan, error) {
	if len(o.Label) > MaxLabel || strings.IndexByte(o.Label, 0) >= 0 {
		return nil, invalid("label %q: expected at most %d bytes without NUL", o.Label, MaxLabel)
	}
	w := walker{plan: &Plan{label: o.Label}, seen: map[*Node]int32{}, entries: map[string]int32{}}
	if root == nil || root.Mode&unix.S_IFMT != unix.S_IFDIR {
		return nil, &TreeError{"/", invalid("the root is not a directory")}
	}
	// At once where that can be told: inodes are large, and growing step by step takes three times their memory.
	n := countNames(root, 1, maxPath)
	w.plan.inodes, w.plan.sums = make([]inode, 0, n), make([][32]byte, 0, n)
	if _, err := w.add(root, 0, 0, 0); err != nil {
		return nil, err
	}
	p := w.plan
	if err := p.checkContents(); err != nil {
		return nil, err
	}
	p.stats.Inodes = len(p.inodes)
	p.hash()
	return p, nil
}

// finish numbers and lays out the inodes of a dual image.
func (p *Plan) finish() error {
	p.number()
	return p.layout()
}

// countNames returns n and the names below a directory, but stops at a million, and at the depth that paths have at most: the
// tree has not been checked yet, and may be none.
func countNames(root *Node, n, depth int) int {
	for _, e := range root.Entries {
		if n >= 1<<20 || depth == 0 || e == nil {
			return n
		}
		n = countNames(e, n+1, depth-1)
	}
	return n
}

// walker turns nodes into planned inodes.
type walker struct {
	plan    *Plan
	seen    map[*Node]int32
	entries map[string]int32 // xattr entries by their bytes
	scratch []byte
}

// add plans n, its first name being entry nth of the directory parent, and everything below it. n's path has depth bytes.
func (w *walker) add(n *Node, parent int32, nth, depth int) (int32, error) {
	p := w.plan
	idx := int32(len(p.inodes))
	p.inodes = append(p.inodes, inode{parent: parent, nth: int32(nth), inodeMore: &noMore})
	if len(p.inodes) == math.MaxInt32 {
		return 0, w.fail(idx, invalid("too many inodes: expected fewer than %d", math.MaxInt32))
	}
	if err := checkNode(n); err != nil {
		return 0, w.fail(idx, err)
	}
	w.seen[n] = idx
	i := inode{
		mode: n.Mode, uid: n.UID, gid: n.GID, nlink: 1, parent: parent, nth: int32(nth), mtime: n.Mtime,
		size: n.Data.Size, inodeMore: &noMore,
	}
	xattrs, err := w.addXattrs(n.Mode, n.Xattrs)
	if err != nil {
		return 0, w.fail(idx, err)
	}
	if len(xattrs) > 0 {
		p.stats.Xattrs++
	}
	if i.isDir() || i.isSymlink() || len(xattrs) > 0 {
		i.inodeMore = &inodeMore{target: n.Target, xattrs: xattrs}
	}
	switch n.Mode & unix.S_IFMT {
	case unix.S_IFDIR:
		p.stats.Directories++
		i.nlink = 2
		if depth > maxPath {
			return 0, w.fail(idx, invalid("the path of a directory has %d bytes, expected at most %d", depth, maxPath))
		}
	case unix.S_IFREG:
		p.stats.Files++
		p.stats.FileBytes += i.size
	case unix.S_IFLNK:
		p.stats.Symlinks++
		i.size = int64(len(n.Target))
	default:
		p.stats.Others++
		i.rdev = disk.ErofsEncodeDev(unix.Major(n.Rdev), unix.Minor(n.Rdev))
	}
	if i.hasData() {
		i.addr, i.sum = n.Data.Off, int32(len(p.sums))
		p.sums = append(p.sums, n.Data.Sum)
	}
	p.inodes[idx] = i
	if len(n.Entries) == 0 {
		return idx, nil
	}

	kids := make([]dirent, 0, len(n.Entries))
	for name := range n.Entries {
		kids = append(kids, dirent{name: name})
	}
	slices.SortFunc(kids, func(a, b dirent) int { return cmp.Compare(a.name, b.name) })
	p.inodes[idx].kids = kids
	p.stats.Names += len(kids)
	for k := range kids {
		name := kids[k].name
		if err := checkName(name); err != nil {
			return 0, w.fail(idx, err)
		}
		n := n.Entries[name]
		if c, ok := w.seen[n]; ok {
			if p.inodes[c].isDir() {
				return 0, w.fail(idx, invalid("entry %q is the directory %q: a directory has one name", name, p.path(c)))
			}
			p.inodes[c].nlink++
			kids[k].child = c
			continue
		}
		c, err := w.add(n, idx, k, depth+1+len(name))
		if err != nil {
			return 0, err
		}
		if p.inodes[c].isDir() {
			p.inodes[idx].nlink++
		}
		kids[k].child = c
	}
	return idx, nil
}

func (w *walker) fail(idx int32, err error) error { return &TreeError{w.plan.path(idx), err} }

// path is the absolute path of an inode by its first name.
func (p *Plan) path(idx int32) string {
	if idx == 0 {
		return "/"
	}
	var names []string
	for ; idx != 0; idx = p.inodes[idx].parent {
		names = append(names, p.name(&p.inodes[idx]))
	}
	slices.Reverse(names)
	return "/" + strings.Join(names, "/")
}

// number gives every inode its number: first the inodes of the DAXFS half, dense from 1, which is what its table
// needs, then the others. So the number is the same in both halves. It also lists what the DAXFS half leaves out.
func (p *Plan) number() {
	listed := 0
	next := uint32(0)
	for i := range p.inodes {
		if p.inodes[i].inV8() {
			next++
			p.inodes[i].ino = next
		}
	}
	p.stats.V8Inodes = int(next)
	for i := range p.inodes {
		in := &p.inodes[i]
		if !in.inV8() {
			next++
			in.ino = next
		}
		dir := ""
		for _, k := range in.kids {
			c := &p.inodes[k.child]
			if c.inV8() {
				in.v8Entries++
				continue
			}
			if listed > maxLeftOut {
				continue
			}
			if dir == "" {
				dir = p.path(int32(i))
			}
			p.left = append(p.left, LeftOut{joinPath(dir, k.name), typeName(c.mode)})
			listed += len(dir) + len(k.name)
		}
		p.stats.V8Names += in.v8Entries
	}
	slices.SortFunc(p.left, func(a, b LeftOut) int { return cmp.Compare(a.Path, b.Path) })
}

func joinPath(dir, name string) string {
	if dir == "/" {
		return dir + name
	}
	return dir + "/" + name
}

func typeName(mode uint32) string {
	switch mode & unix.S_IFMT {
	case unix.S_IFREG:
		return "regular file"
	case unix.S_IFDIR:
		return "directory"
	case unix.S_IFLNK:
		return "symbolic link"
	case unix.S_IFCHR:
		return "character device"
	case unix.S_IFBLK:
		return "block device"
	case unix.S_IFIFO:
		return "fifo"
	case unix.S_IFSOCK:
		return "socket"
	}
	return fmt.Sprintf("file type %#o", mode&unix.S_IFMT)
}

// hash derives the UUID from everything that a reader of the image can see, and from nothing else: not from where the
// contents lie. Every field has a fixed width or its length before it, so that no two trees have one description.
func (p *Plan) hash() {
	h := sha256.New()
	b := make([]byte, 0, 64<<10)
	le := binary.LittleEndian
	str := func(s string) {
		b = le.AppendUint32(b, uint32(len(s)))
		b = append(b, s...)
	}
	str("daxfs dual image 2")
	str(p.label)
	for idx := range p.inodes {
		i := &p.inodes[idx]
		for _, v := range [...]uint32{i.mode, i.uid, i.gid, i.rdev, i.mtime.Nsec} {
			b = le.AppendUint32(b, v)
		}
		b = le.AppendUint64(b, uint64(i.mtime.Sec))
		d := p.data(i)
		b = le.AppendUint64(b, uint64(d.Size))
		b = append(b, d.Sum[:]...)
		str(i.target)
		b = le.AppendUint32(b, uint32(len(i.xattrs)))
		for _, x := range i.xattrs {
			str(p.xattrs[x].enc)
		}
		b = le.AppendUint32(b, uint32(len(i.kids)))
		for _, k := range i.kids {
			str(k.name)
			b = le.AppendUint32(b, uint32(k.child))
		}
		if len(b) > 60<<10 {
			h.Write(b)
			b = b[:0]
		}
	}
	h.Write(b)
	copy(p.uuid[:], h.Sum(nil))
	p.uuid[6] = p.uuid[6]&0x0f | 0x80 // version 8: made by a rule of our own
	p.uuid[8] = p.uuid[8]&0x3f | 0x80 // the RFC 9562 variant
}

// MetaSize is the number of bytes of the metadata run, a multiple of BlockSize, wherever it is placed. Block 0 is not
// counted. It includes the digest table, if there is one, and the DAXFS overlay pair.
func (p *Plan) MetaSize() int64 { return p.coreSize + p.digestSize + disk.V8OverlaySize }

// UUID identifies the tree and its contents: it is derived from all that a reader of the image sees.
func (p *Plan) UUID() [16]byte { return p.uuid }

// Stats are the counts of the plan.
func (p *Plan) Stats() Stats { return p.stats }

// LeftOut lists the names that the DAXFS half does not have, sorted by path: all of them, or 16 MiB. There are
// Stats.Names - Stats.V8Names. The EROFS half has them all.
func (p *Plan) LeftOut() []LeftOut { return slices.Clone(p.left) }

// Contents calls f for the contents of every regular file that has any, hard links once, in the order of the tree.
// Contents that several files share are named once for each file.
func (p *Plan) Contents(f func(Data)) {
	for i := range p.inodes {
		if in := &p.inodes[i]; in.hasData() {
			f(p.data(in))
		}
	}
}

// String is the plan as Dump writes it.
func (p *Plan) String() string {
	var b bytes.Buffer
	_ = p.Dump(&b) // a bytes.Buffer takes everything
	return b.String()
}
