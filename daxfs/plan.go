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
	// Take uses the tree up while it is planned, also if that fails: directories lose their entries. A tree of millions of
	// files is then not in memory beside its plan.
	Take bool
}

// Plan is the layout of an image: every inode and every offset, before a byte is written. The same tree and options
// give an equal plan, whatever the order in which maps were filled. A plan holds no reference to the tree.
//
// Place says where the metadata goes; it may be called again for another place. WriteTo writes it. A Plan may be read
// by several goroutines as long as none calls Place.
type Plan struct {
	label  string
	inodes parts[inode] // depth first, names sorted; the root is the first
	sums   parts[[32]byte]
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
	ino      uint32 // from 1; those of the DAXFS half come first
	parent   int32  // the directory of the first name; the root is its own
	nth      int32  // the entry of parent that is the first name
	sum      int32  // of the contents of a regular file with any, in Plan.sums
	nsec     uint32 // of the modification time
	extended bool
	inline   bool // the last block follows inode and xattrs
	sec      int64
	size     int64 // as the EROFS half stores it; of a regular file, the size of its contents
	addr     int64 // of the contents
	off      int64 // of the inode in the core
	*inodeMore
}

func (i *inode) mtime() Time { return Time{i.sec, i.nsec} }

// inodeMore is what a directory, a symbolic link, a device and an inode with xattrs have besides. The others share
// noMore, which is never written to.
type inodeMore struct {
	rdev      uint32 // as EROFS stores it
	target    string
	kids      []dirent
	xattrs    []int32 // numbers of Plan.xattrs, sorted by name
	nshared   int     // how many of xattrs are references; they come first
	xbytes    int     // bytes of xattrs after the inode
	blocks    int64   // of the whole blocks of a directory or symlink in the core; 0 = none
	v8Off     int64   // of the DAXFS entries or target in the core
	v8Entries int     // entries of a directory in the DAXFS half
	// Of a directory or symlink in a live tree, whose directories have other bytes; see LivePlan.
	liveBlocks int64 // of its whole blocks in the run, if it has any
	liveSize   int64 // of a directory in bytes
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
	return Data{Off: i.addr, Size: i.size, Sum: *p.sums.at(i.sum)}
}

// name is the first name of an inode that is not the root.
func (p *Plan) name(i *inode) string { return p.inodes.at(i.parent).kids[i.nth].name }

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
// and bad options with an error that wraps ErrInvalid. Without Options.Take the tree is as it was afterwards, and may be
// changed.
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
		debug.FreeOSMemory() // what follows needs memory, too
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

// walker turns nodes into planned inodes.
type walker struct {
	plan    *Plan
	take    bool
	entries map[string]int32 // xattr entries by their bytes
	scratch []byte
}

// collectEvery is how many nodes of a tree that is used up are planned before their memory is given back. Else the
// collector would come when all memory has grown by a part of it, and the plan would come to lie beside the tree after all.
const collectEvery = 1 << 18

// add plans n, its first name being entry nth of the directory parent, and everything below it. n's path has depth bytes.
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

// unmark makes the nodes of a tree, which may be none, what they were before they were planned.
func unmark(n *Node) {
	n.planned = 0
	for _, kid := range n.Entries {
		if kid != nil && kid.planned > 0 {
			unmark(kid)
		}
	}
}

func (w *walker) fail(idx int32, err error) error { return &TreeError{w.plan.path(idx), err} }

// path is the absolute path of an inode by its first name.
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

// number gives every inode its number: first the inodes of the DAXFS half, dense from 1, which is what its table
// needs, then the others. So the number is the same in both halves. It also lists what the DAXFS half leaves out.
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
	for i := range p.inodes.len() {
		if in := p.inodes.at(i); in.hasData() {
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
