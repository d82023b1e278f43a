package layer

import (
	"context"
	"io"

	"github.com/daxfs/daxfs-snapshotter/daxfs"
)

// Op says what a Change does.
type Op uint8

const (
	// OpAdd puts an inode at Path. It replaces what is there, except that a directory on a directory only changes
	// its attributes.
	OpAdd Op = iota + 1
	// OpLink makes Path another name of the inode at LinkTo, which may come from a lower layer.
	OpLink
	// OpRemove removes Path and all below it, and is content when there is nothing.
	OpRemove
	// OpOpaque hides everything that lower layers put into the directory Path, wherever among the layer's changes
	// it stands.
	OpOpaque
)

// String returns the name of the operation, as used in messages.
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

// KeepID in the UID or GID of a Change's Node means that the owner stays as it is: a new inode belongs to root. It
// is what chown(2) makes of 2^32-1.
const KeepID = 1<<32 - 1

// Change is one step from the tree below a layer to the tree with it.
type Change struct {
	Op Op
	// Path is clean and relative to the root, without "." and ".." elements; the root itself is "". Elements before
	// the last one may name symbolic links of this layer or of a lower one.
	Path string
	// LinkTo is the target of an OpLink exactly as the layer has it: it may be absolute, unclean and lead through
	// symbolic links.
	LinkTo string
	// Node holds the attributes, and for a regular file the stored contents, of an OpAdd; Entries is nil. With an
	// OpLink it holds the attributes (mode bits without a type, owner, time, xattrs) that the link gives to the inode
	// it refers to, or is nil if it gives none. It is nil with other operations.
	Node *daxfs.Node
}

// Source says what a layer was made from, and with it how its attributes are meant.
type Source uint8

const (
	// FromTarStream marks a layer whose entries carry what a tar header carries: xattrs of a directory are laid over
	// those that it has already.
	FromTarStream Source = iota
	// FromDirectory marks a layer whose entries carry all attributes of an inode on disk: they replace what was there.
	FromDirectory
)

// Layer is one layer as a list of changes, which All reads. Their order matters: see the package comment. A layer that is not
// being changed by Append, Drain or UnmarshalBinary may be read concurrently. The zero value is a layer without changes.
type Layer struct {
	Source Source
	Stats  Stats
	changes
}

// Stats counts what a layer holds.
type Stats struct {
	// Entries is the number of tar entries or directory entries that were read.
	Entries int64
	// Files is the number of regular files with contents, hard links not counted again.
	Files int64
	// Bytes is the sum of the sizes of all regular files, holes and duplicates included.
	Bytes int64
	// IgnoredXattrs is the number of extended attributes left out because no layer may carry them: trusted.* of a
	// tar stream, and unknown namespaces.
	IgnoredXattrs int64
	// Whiteouts is the number of names in a directory that are whiteouts to overlayfs: FromDir keeps them as the character
	// devices that they are, FromUpper makes them removals.
	Whiteouts int64
	// OverlayXattrs is the number of attributes of a directory that overlayfs takes for its own: FromDir keeps them, FromUpper
	// does what they say.
	OverlayXattrs int64
}

// Cost is what the layer counts as against Limits.MaxEntries.
func (l *Layer) Cost() int64 { return l.Stats.Entries + l.xattrCost }

// xattrCost is what n xattrs of an entry count as, beside the entry.
func xattrCost(n int) int64 { return int64(max(n-1, 0) / 2) }

// Store takes the contents of files.
type Store interface {
	// Put reads exactly size bytes from r, size > 0, and returns where they are kept. Fewer bytes than size are an
	// error (io.ErrUnexpectedEOF, wrapped or not). Put may be called concurrently; r is only valid during the call.
	Put(ctx context.Context, size int64, r io.Reader) (daxfs.Data, error)
}

// builder collects the changes of a layer and holds them against its limits.
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

// node returns a zero node, which lasts until its change was added.
func (b *builder) node() *daxfs.Node {
	b.cur = daxfs.Node{}
	return &b.cur
}

// entry counts one entry that was read.
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

// keep counts n bytes of names and attributes that stay in memory with the layer.
func (b *builder) keep(n int) error {
	b.meta += int64(n)
	if b.meta > b.lim.MaxMetaBytes {
		return limitError("bytes of names and attributes", b.lim.MaxMetaBytes)
	}
	return nil
}

// add appends a change whose path was checked.
func (b *builder) add(c Change) error {
	if err := b.keep(len(c.Path) + len(c.LinkTo)); err != nil {
		return err
	}
	b.layer.Append(c)
	return nil
}
