package layer

import (
	"iter"

	"github.com/daxfs/daxfs-snapshotter/daxfs"
)

// changes is a list of changes in binary form, which takes a sixth of the memory: there may be millions.
type changes struct {
	parts  [][]byte // a change never crosses the end of a part
	count  int
	last   string // path of the last change
	opaque bool   // one change is an OpOpaque

	paths, names int64 // bytes of all paths, and of all names, targets and attributes
	xattrCost    int64 // cost of the attributes for Limits.MaxEntries
}

// Parts have about partSize bytes, so that reading can free them one by one.
const (
	partSize  = 64 << 10
	partSpare = 8 << 10 // most changes fit
)

// Append adds a change at the end. It keeps no reference to the change's node.
func (l *Layer) Append(c Change) {
	n := len(l.parts)
	switch {
	case n == 0:
		l.parts = append(l.parts, nil)
	case len(l.parts[n-1]) >= partSize:
		l.parts = append(l.parts, make([]byte, 0, partSize+partSpare))
	}
	part := &l.parts[len(l.parts)-1]
	*part = appendChange(*part, l.last, &c)
	l.note(&c)
}

// note counts a change at the end.
func (l *changes) note(c *Change) {
	l.count++
	l.last = c.Path
	l.opaque = l.opaque || c.Op == OpOpaque
	l.paths += int64(len(c.Path))
	l.names += int64(len(c.Path) + len(c.LinkTo))
	if c.Node == nil {
		return
	}
	l.names += int64(len(c.Node.Target))
	for _, x := range c.Node.Xattrs {
		l.names += int64(len(x.Name) + len(x.Value))
	}
	l.xattrCost += xattrCost(len(c.Node.Xattrs))
}

// Len returns the number of changes.
func (l *Layer) Len() int { return l.count }

// Names returns the number of bytes of all paths, link targets and extended attributes.
func (l *Layer) Names() int64 { return l.names }

// HasOpaque reports whether a change is an OpOpaque.
func (l *Layer) HasOpaque() bool { return l.opaque }

// All yields the changes with their indexes. A change and its node are valid until the next one is
// requested; the reader keeps the node by setting the change's Node to nil.
func (l *Layer) All() iter.Seq2[int, *Change] {
	return func(yield func(int, *Change) bool) { l.read(false, yield) }
}

// Drain is All, but frees changes once read, so that a large layer does not stay in memory beside its
// result. The layer is empty afterwards, even if reading stops early.
func (l *Layer) Drain() iter.Seq2[int, *Change] {
	return func(yield func(int, *Change) bool) {
		l.read(true, yield)
		l.changes = changes{}
	}
}

func (l *Layer) read(forget bool, yield func(int, *Change) bool) {
	d := decoder{own: true}
	last, n := "", 0
	var nodes nodeSlab
	var node *daxfs.Node
	for i := range l.parts {
		d.rest = l.parts[i]
		for len(d.rest) > 0 {
			if node == nil {
				node = nodes.node()
			}
			c := d.change(last, node)
			if d.err != nil {
				panic("layer: its own binary form: " + d.err.Error()) // Append and UnmarshalBinary prevent this
			}
			last = c.Path
			used := c.Node != nil
			if !yield(n, &c) {
				return
			}
			n++
			if used {
				if c.Node == nil {
					node = nil
				} else {
					*node = daxfs.Node{}
				}
			}
		}
		if forget {
			l.parts[i] = nil
		}
	}
}

// nodeSlab allocates nodes in bulk: as many as fit an 8 KiB size class of the Go runtime.
type nodeSlab []daxfs.Node

const slabNodes = 60

func (s *nodeSlab) node() *daxfs.Node {
	if len(*s) == 0 {
		*s = make([]daxfs.Node, slabNodes)
	}
	n := &(*s)[0]
	*s = (*s)[1:]
	return n
}
