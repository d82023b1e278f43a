package layer

import (
	"context"
	"io"

	"github.com/daxfs/daxfs-snapshotter/daxfs"
)

// Op is the kind of a Change.
type Op uint8

const (
	// OpAdd puts an inode at Path and replaces the old one, except that a directory on a directory only
	// changes its attributes.
	OpAdd Op = iota + 1
	// OpLink makes Path another name of the inode at LinkTo, which may come from a lower layer.
	OpLink
	// OpRemove removes Path and everything below it, if it exists.
	OpRemove
	// OpOpaque hides everything that lower layers put into the directory Path. Its position among the
	// layer's changes does not matter.
	OpOpaque
)

// String returns the name of the operation for messages.
func (o Op) String() string {
	switch o {
	case OpAdd:
		return "add"
	case OpLink:
		return "link"
	case OpRemove:
		return "remove"
	case OpOpaque:
		return "opaque"
	}
	return "invalid"
}

// KeepID as the UID or GID of a Change's Node leaves the owner unchanged; a new inode belongs to root.
// chown(2) treats 2^32-1 in the same way.
const KeepID = 1<<32 - 1

// Change is one step from the tree below a layer to the tree that includes it.
type Change struct {
	Op Op
	// Path is clean and relative to the root, without "." and ".." elements; the root is "". Elements
	// before the last one may be symbolic links of this layer or a lower one.
	Path string
	// LinkTo is the target of an OpLink exactly as stored in the layer: it may be absolute or unclean and
	// lead through symbolic links.
	LinkTo string
	// Node holds the attributes and stored contents of an OpAdd; Entries is nil. For an OpLink it holds
	// the attributes (mode bits without type, owner, time, xattrs) that the link gives to its inode, or is
	// nil if it gives none. For other operations it is nil.
	Node *daxfs.Node
}

// Source is the origin of a layer, which determines the meaning of its attributes.
type Source uint8

const (
	// FromTarStream marks tar attributes: the xattrs of a directory add to those it already has.
	FromTarStream Source = iota
	// FromDirectory marks complete attributes of inodes on disk, which replace the old ones.
	FromDirectory
)

// Layer is one layer as a list of changes, which All reads. Their order matters: see the package
// comment. A Layer may be read concurrently unless Append, Drain or UnmarshalBinary is changing it.
// The zero value has no changes.
type Layer struct {
	Source Source
	Stats  Stats
	changes
}

// Stats holds the counts of a layer.
type Stats struct {
	// Entries is the number of tar entries or directory entries that were read.
	Entries int64
	// Files is the number of regular files with contents, hard links counted once.
	Files int64
	// Bytes is the sum of the sizes of all regular files, holes and duplicates included.
	Bytes int64
	// IgnoredXattrs is the number of extended attributes left out because layers must not carry them:
	// trusted.* of a tar stream, and unknown namespaces.
	IgnoredXattrs int64
	// Whiteouts is the number of names in a directory that overlayfs treats as whiteouts. FromDir keeps
	// them as character devices, FromUpper turns them into removals.
	Whiteouts int64
	// OverlayXattrs is the number of a directory's attributes that belong to overlayfs. FromDir keeps
	// them, FromUpper applies them.
	OverlayXattrs int64
}

// Cost returns what the layer counts against Limits.MaxEntries.
func (l *Layer) Cost() int64 { return l.Stats.Entries + l.xattrCost }

// xattrCost returns the additional cost of an entry with n xattrs.
func xattrCost(n int) int64 { return int64(max(n-1, 0) / 2) }

// Store takes the contents of files.
type Store interface {
	// Put reads exactly size bytes from r, size > 0, and returns where they are stored. Fewer bytes are an error
	// (io.ErrUnexpectedEOF, wrapped or not). Put may be called concurrently; r is only valid during the call.
	Put(ctx context.Context, size int64, r io.Reader) (daxfs.Data, error)
}

// builder collects the changes of a layer and enforces its limits.
type builder struct {
	layer *Layer
	lim   Limits
	meta  int64 // bytes of paths, link targets and xattrs so far
	cost  int64 // see Limits.MaxEntries
	cur   daxfs.Node
}

func newBuilder(src Source, lim Limits) *builder {
	return &builder{layer: &Layer{Source: src}, lim: lim.withDefaults()}
}

// node returns a zero node, valid until its change is added.
func (b *builder) node() *daxfs.Node {
	b.cur = daxfs.Node{}
	return &b.cur
}

func (b *builder) entry() error {
	b.layer.Stats.Entries++
	return b.spend(1)
}

func (b *builder) spend(cost int64) error {
	if b.cost += cost; b.cost > b.lim.MaxEntries {
		return limitError("entries (many xattrs count as entries)", b.lim.MaxEntries)
	}
	return nil
}

// content counts a regular file of size bytes.
func (b *builder) content(size int64) error {
	if size < 0 {
		return invalidf("size %d is negative", size)
	}
	if size > b.lim.MaxBytes-b.layer.Stats.Bytes {
		return limitError("bytes of contents", b.lim.MaxBytes)
	}
	b.layer.Stats.Bytes += size
	if size > 0 {
		b.layer.Stats.Files++
	}
	return nil
}

// keep counts n bytes of names and attributes that stay in memory.
func (b *builder) keep(n int) error {
	b.meta += int64(n)
	if b.meta > b.lim.MaxMetaBytes {
		return limitError("bytes of names and attributes", b.lim.MaxMetaBytes)
	}
	return nil
}

// add appends a change with a checked path.
func (b *builder) add(c Change) error {
	if err := b.keep(len(c.Path) + len(c.LinkTo)); err != nil {
		return err
	}
	b.layer.Append(c)
	return nil
}
