package daxfs

import (
	"bytes"
	"cmp"
	"errors"
	"fmt"
	"math"
	"runtime/debug"
	"slices"
	"strings"

	"github.com/daxfs/daxfs-snapshotter/daxfs/internal/disk"
	"golang.org/x/sys/unix"
)

// MaxLabel is the maximum length of Options.Label in bytes. Linux 6.6 and many other kernels refuse to
// mount an image whose label has no NUL behind it.
const MaxLabel = disk.ErofsLabelSize - 1

// Options are the properties of an image that do not come from its tree. The zero value is a good default.
type Options struct {
	// Label is the volume name of the EROFS half, up to MaxLabel bytes without NUL.
	Label string
	// Digests adds a digest table, with which Prove verifies every byte of the image. Every Data.Sum must
	// be correct. Only an image file can have a table: the contents of a window lie behind its metadata.
	Digests bool
	// Take lets NewPlan consume the tree, even if it fails: directories lose their entries. A tree of
	// millions of files then does not stay in memory beside its plan.
	Take bool
}

// Plan is the layout of an image: it fixes every inode and every offset before a byte is written. Equal
// trees and options give equal plans, independent of map order. A plan keeps no reference to the tree.
//
// Place sets the position of the metadata and may be called again; WriteTo writes the image. Several
// goroutines may read a Plan as long as none calls Place.
type Plan struct {
	label  string
	inodes parts[inode] // depth first, names sorted; the root is the first
	sums   parts[[32]byte]
	xattrs []xattr
	stats  Stats
	left   []LeftOut
	uuid   [16]byte
	epoch  Time // modification time of every compact inode

	// The core is the metadata without the overlay pair. Its offsets count from its first byte.
	pieces   []piece // of the EROFS part, in order of offset
	shared   []int32 // shared xattrs in order of offset
	v8Table  int64
	v8Names  int64
	coreSize int64
	// The digest table follows the core, if there is one.
	digests    []int32 // one inode for each distinct contents, in order of address
	digestSize int64   // 0 without a table

	place *spot
}

// inode is one planned inode. There may be millions, so rarely used fields are in inodeMore.
type inode struct {
	mode     uint32
	uid, gid uint32
	nlink    uint32
	ino      uint32 // from 1; inodes of the DAXFS half come first
	parent   int32  // directory of the first name; the root is its own parent
	nth      int32  // index of the first name among the entries of parent
	sum      int32  // index in Plan.sums, for a regular file with contents
	nsec     uint32 // modification time, nanoseconds
	extended bool
	inline   bool // the last block follows the inode and its xattrs
	sec      int64
	size     int64 // as stored in the EROFS half; for a regular file, the size of its contents
	addr     int64 // address of the contents
	off      int64 // offset of the inode in the core
	*inodeMore
}

func (i *inode) mtime() Time { return Time{i.sec, i.nsec} }

// inodeMore holds the extra fields of a directory, symbolic link, device or inode with xattrs. All
// other inodes share noMore, which is read-only.
type inodeMore struct {
	rdev      uint32 // in the encoding of EROFS
	target    string
	kids      []dirent
	xattrs    []int32 // indexes in Plan.xattrs, sorted by name
	nshared   int     // how many of xattrs are stored as references; they come first
	xbytes    int     // bytes of xattrs after the inode
	blocks    int64   // offset of a directory's or symlink's whole blocks in the core; 0 = none
	v8Off     int64   // offset of the DAXFS entries or target in the core
	v8Entries int     // entries of a directory in the DAXFS half
	// A live tree stores directories and symlinks differently; see LivePlan.
	liveBlocks int64 // offset of the whole blocks in the run, if there are any
	liveSize   int64 // bytes of a directory
}

var noMore inodeMore

type dirent struct {
	name  string
	child int32 // index in Plan.inodes
}

// xattr is one distinct pair of name and value; enc is its entry on disk.
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

// hasData reports whether the inode is a regular file with contents.
func (i *inode) hasData() bool { return i.isRegular() && i.size > 0 }

// data returns the contents of an inode; Size is 0 if it has none.
func (p *Plan) data(i *inode) Data {
	if !i.hasData() {
		return Data{}
	}
	return Data{Off: i.addr, Size: i.size, Sum: *p.sums.at(i.sum)}
}

// name returns the first name of an inode other than the root.
func (p *Plan) name(i *inode) string { return p.inodes.at(i.parent).kids[i.nth].name }

// inV8 reports whether the DAXFS half can hold the inode.
func (i *inode) inV8() bool { return i.isDir() || i.isSymlink() || i.isRegular() }

// Stats are the counts of a plan.
type Stats struct {
	Inodes      int   // distinct inodes, the root included
	Names       int   // directory entries, without "." and ".."
	Directories int   // the root included
	Files       int   // regular files
	Symlinks    int   //
	Others      int   // devices, fifos and sockets
	Xattrs      int   // inodes with extended attributes, which the DAXFS half does not show
	V8Inodes    int   // inodes of the DAXFS half
	V8Names     int   // directory entries of the DAXFS half
	FileBytes   int64 // sum of the sizes of all regular files, hard links once
	MetaBytes   int64 // MetaSize
}

// maxLeftOut bounds the bytes of listed paths: many devices deep in a tree are small in a layer and in
// an image, but their paths are long.
const maxLeftOut = 16 << 20

// LeftOut is one name missing from the DAXFS half because its kernel module refuses such inodes.
type LeftOut struct {
	Path   string // absolute, "/dev/null"
	Reason string // "character device"
}

// ErrInvalid is wrapped by every error about a tree, option or placement that cannot become an image.
var ErrInvalid = errors.New("invalid image input")

// TreeError reports a node that an image cannot hold. It wraps ErrInvalid.
type TreeError struct {
	Path string // absolute, the first name of the node
	Err  error
}

func (e *TreeError) Error() string { return fmt.Sprintf("%q: %v", e.Path, e.Err) }

func (e *TreeError) Unwrap() error { return e.Err }

func invalid(format string, args ...any) error {
	return fmt.Errorf("%w: %s", ErrInvalid, fmt.Sprintf(format, args...))
}

// NewPlan lays out the tree below root, which must be a directory. It returns a *TreeError for a node
// that an image cannot hold, and an error that wraps ErrInvalid for bad options. Without Options.Take
// the tree is unchanged afterwards and may be modified.
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

// newTree checks a tree and plans its inodes, but not their offsets.
func newTree(root *Node, o Options) (*Plan, error) {
	if len(o.Label) > MaxLabel || strings.IndexByte(o.Label, 0) >= 0 {
		return nil, invalid("label %q: expected at most %d bytes without NUL", o.Label, MaxLabel)
	}
	w := walker{plan: &Plan{label: o.Label}, take: o.Take, entries: map[string]int32{}}
	if root == nil || root.Mode&unix.S_IFMT != unix.S_IFDIR {
		return nil, &TreeError{"/", invalid("the root is not a directory")}
	}
	_, err := w.add(root, 0, 0, 0)
	if !o.Take {
		unmark(root)
	}
	if err != nil {
		return nil, err
	}
	p := w.plan
	if o.Take && p.inodes.len() >= collectEvery {
		debug.FreeOSMemory() // the next steps need memory, too
	}
	if err := p.checkContents(); err != nil {
		return nil, err
	}
	p.stats.Inodes = int(p.inodes.len())
	p.hash()
	return p, nil
}

// finish numbers and lays out the inodes of a dual image.
func (p *Plan) finish() error {
	p.number()
	return p.layout()
}

type walker struct {
	plan    *Plan
	take    bool
	entries map[string]int32 // xattr entries by their bytes
	scratch []byte
}

// collectEvery is the number of nodes planned between two collections while the tree is consumed. Left alone,
// the collector waits until the heap has grown by a fraction, and tree and plan would be in memory together.
const collectEvery = 1 << 18

// add plans n and all below it. Its first name is entry nth of parent; its path has depth bytes.
func (w *walker) add(n *Node, parent int32, nth, depth int) (int32, error) {
	p := w.plan
	idx := p.inodes.len()
	p.inodes.add(inode{parent: parent, nth: int32(nth), inodeMore: &noMore})
	if p.inodes.len() == math.MaxInt32 {
		return 0, w.fail(idx, invalid("too many inodes: expected fewer than %d", math.MaxInt32))
	}
	if err := checkNode(n); err != nil {
		return 0, w.fail(idx, err)
	}
	n.planned = idx + 1
	if w.take && p.inodes.len()%collectEvery == 0 {
		debug.FreeOSMemory()
	}
	i := inode{
		mode: n.Mode, uid: n.UID, gid: n.GID, nlink: 1, parent: parent, nth: int32(nth), sec: n.Mtime.Sec,
		nsec: n.Mtime.Nsec,
		size: n.Data.Size, inodeMore: &noMore,
	}
	xattrs, err := w.addXattrs(n.Mode, n.Xattrs)
	if err != nil {
		return 0, w.fail(idx, err)
	}
	if len(xattrs) > 0 {
		p.stats.Xattrs++
	}
	rdev := disk.ErofsEncodeDev(unix.Major(n.Rdev), unix.Minor(n.Rdev))
	if i.isDir() || i.isSymlink() || len(xattrs) > 0 || rdev != 0 {
		i.inodeMore = &inodeMore{target: n.Target, xattrs: xattrs, rdev: rdev}
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
	}
	if i.hasData() {
		i.addr, i.sum = n.Data.Off, p.sums.len()
		p.sums.add(n.Data.Sum)
	}
	*p.inodes.at(idx) = i
	if len(n.Entries) == 0 {
		return idx, nil
	}

	kids := make([]dirent, 0, len(n.Entries))
	for name := range n.Entries {
		kids = append(kids, dirent{name: name})
	}
	slices.SortFunc(kids, func(a, b dirent) int { return cmp.Compare(a.name, b.name) })
	p.inodes.at(idx).kids = kids
	p.stats.Names += len(kids)
	for k := range kids {
		name := kids[k].name
		if err := checkName(name); err != nil {
			return 0, w.fail(idx, err)
		}
		kid := n.Entries[name]
		if w.take {
			n.Entries[name] = nil
		}
		if kid != nil && kid.planned > 0 {
			c := kid.planned - 1
			if p.inodes.at(c).isDir() {
				return 0,
					w.fail(idx, invalid("entry %q is the directory %q: a directory has one name", name, p.path(c)))
			}
			p.inodes.at(c).nlink++
			kids[k].child = c
			continue
		}
		c, err := w.add(kid, idx, k, depth+1+len(name))
		if err != nil {
			return 0, err
		}
		if p.inodes.at(c).isDir() {
			p.inodes.at(idx).nlink++
		}
		kids[k].child = c
	}
	if w.take {
		n.Entries = nil
	}
	return idx, nil
}

// unmark resets the planning marks of a tree. It stops at nodes that were never planned.
func unmark(n *Node) {
	n.planned = 0
	for _, kid := range n.Entries {
		if kid != nil && kid.planned > 0 {
			unmark(kid)
		}
	}
}

func (w *walker) fail(idx int32, err error) error { return &TreeError{w.plan.path(idx), err} }

// path returns the absolute path of an inode by its first name.
func (p *Plan) path(idx int32) string {
	if idx == 0 {
		return "/"
	}
	var names []string
	for ; idx != 0; idx = p.inodes.at(idx).parent {
		names = append(names, p.name(p.inodes.at(idx)))
	}
	slices.Reverse(names)
	return "/" + strings.Join(names, "/")
}

// number assigns inode numbers: first to the inodes of the DAXFS half, whose table must be dense from 1,
// then to the others. Both halves thus use the same number. It also lists what the DAXFS half leaves out.
func (p *Plan) number() {
	listed := 0
	next := uint32(0)
	for i := range p.inodes.len() {
		if p.inodes.at(i).inV8() {
			next++
			p.inodes.at(i).ino = next
		}
	}
	p.stats.V8Inodes = int(next)
	for i := range p.inodes.len() {
		in := p.inodes.at(i)
		if !in.inV8() {
			next++
			in.ino = next
		}
		dir := ""
		for _, k := range in.kids {
			c := p.inodes.at(k.child)
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

// MetaSize returns the size of the metadata run in bytes, a multiple of BlockSize. It includes the
// digest table, if there is one, and the DAXFS overlay pair, but not block 0.
func (p *Plan) MetaSize() int64 { return p.coreSize + p.digestSize + disk.V8OverlaySize }

// UUID identifies the tree and its contents: it is derived from everything that a reader of the image sees.
func (p *Plan) UUID() [16]byte { return p.uuid }

// Stats returns the counts of the plan.
func (p *Plan) Stats() Stats { return p.stats }

// LeftOut lists the names that only the EROFS half has, sorted by path and cut off after 16 MiB of
// paths. Their total number is Stats.Names - Stats.V8Names.
func (p *Plan) LeftOut() []LeftOut { return slices.Clone(p.left) }

// Contents calls f for every regular file with contents, hard links once, in the order of the tree.
// Contents shared by several files are passed once for each file.
func (p *Plan) Contents(f func(Data)) {
	for i := range p.inodes.len() {
		if in := p.inodes.at(i); in.hasData() {
			f(p.data(in))
		}
	}
}

// String returns the output of Dump.
func (p *Plan) String() string {
	var b bytes.Buffer
	_ = p.Dump(&b) // a bytes.Buffer takes everything
	return b.String()
}
