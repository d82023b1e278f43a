package tree

import (
	"errors"
	"fmt"
	"hash/maphash"
	"iter"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/daxfs/daxfs-snapshotter/converter/layer"
	"github.com/daxfs/daxfs-snapshotter/daxfs"
)

// Error is an error of one change of one layer.
type Error struct {
	// Layer counts from 0, the bottom layer.
	Layer int
	// Change is the index of the change in the layer.
	Change int
	Op     layer.Op
	Path   string
	Err    error
}

// Error names the layer and the entry.
func (e *Error) Error() string {
	return fmt.Sprintf("merge: layer %d: %v %q: %v", e.Layer, e.Op, e.Path, e.Err)
}

// Unwrap returns the cause: ErrNotDir, ErrNotExist, ErrIsDir, ErrTooManyLinks, or one of package layer.
func (e *Error) Unwrap() error { return e.Err }

// Causes of an Error besides layer.ErrInvalid and layer.ErrLimit. Containerd fails on the same layers.
var (
	// ErrNotDir: the parent of an entry is neither a directory nor a symbolic link.
	ErrNotDir = errors.New("not a directory")
	// ErrNotExist: the target of a hard link is missing, or a directory of the layer is gone when the layer ends.
	ErrNotExist = errors.New("no such file or directory")
	// ErrIsDir: a hard link to a directory.
	ErrIsDir = errors.New("is a directory")
	// ErrTooManyLinks: following the symbolic links of a parent does not end.
	ErrTooManyLinks = errors.New("too many levels of symbolic links")
)

// Merge applies layers, bottom first, and returns the root of the resulting tree. The nodes belong to
// the caller and share nothing with the layers, which stay usable; Merge may run concurrently on the
// same layers. Without layers the tree is an empty directory. The error is an *Error.
func Merge(layers []*layer.Layer) (*daxfs.Node, error) {
	m := NewMerger()
	for _, l := range layers {
		if err := m.Apply(l); err != nil {
			return nil, err
		}
	}
	return m.Root(), nil
}

// Merger merges layers that arrive one after another. It belongs to one goroutine.
type Merger struct {
	root  *daxfs.Node
	layer int
	exact bool // attributes are complete; see layer.FromDirectory
	steps int  // remaining budget of path resolution
	// inherited is the total size of inherited ACLs in all layers.
	inherited int64

	// fresh holds the names that the current layer made; nil if the layer has no opaque directory.
	fresh map[entry]struct{}
	// opaque holds the directories that the current layer made opaque.
	opaque map[*daxfs.Node]struct{}
	// For tests: spared counts entries that an opaque directory kept although containerd's walk would
	// remove them; implied counts directories that the current layer made without an entry for them.
	spared, implied int

	// lastDir caches the directory of lastPath: entries of a directory come together. It is reset when a
	// symbolic link appears or when a directory or link is removed.
	lastPath string
	lastDir  *daxfs.Node

	slab  []daxfs.Node
	names [1024]string // see keep
}

type entry struct {
	dir  *daxfs.Node
	name string
}

// NewMerger returns a Merger whose tree is an empty directory.
func NewMerger() *Merger {
	return &Merger{root: &daxfs.Node{Mode: unix.S_IFDIR | 0o755}, steps: 1 << 24}
}

// Root returns the root of the tree. The next Apply may change it.
func (m *Merger) Root() *daxfs.Node { return m.root }

// Take is Apply for a layer that nobody else uses. It frees each change once applied, so that a large
// layer does not stay in memory beside its tree. The layer is empty afterwards.
func (m *Merger) Take(l *layer.Layer) error { return m.apply(l, l.Drain()) }

// Apply applies the next layer. After an error, which is an *Error, the tree is unusable.
func (m *Merger) Apply(l *layer.Layer) error { return m.apply(l, l.All()) }

func (m *Merger) apply(l *layer.Layer, changes iter.Seq2[int, *layer.Change]) error {
	defer func() { m.layer++ }()
	m.exact = l.Source == layer.FromDirectory
	m.steps += 200 * l.Len()
	m.fresh, m.opaque, m.implied = nil, nil, 0
	if l.HasOpaque() {
		m.fresh = make(map[entry]struct{})
		m.opaque = make(map[*daxfs.Node]struct{})
	}
	type dirTime struct {
		change int
		path   string
		mtime  daxfs.Time
	}
	var times []dirTime
	for i, c := range changes {
		isDir := c.Op == layer.OpAdd && c.Node != nil && c.Node.Mode&unix.S_IFMT == unix.S_IFDIR
		if err := m.change(c); err != nil {
			return &Error{Layer: m.layer, Change: i, Op: c.Op, Path: c.Path, Err: err}
		}
		if isDir {
			times = append(times, dirTime{i, c.Path, c.Node.Mtime})
		}
	}
	// New entries change a directory's time, so these times are set last. They are set by name, as in
	// containerd: the name may stand for another inode by then.
	for _, t := range times {
		n, err := m.lookup(t.path)
		if err != nil {
			return &Error{Layer: m.layer, Change: t.change, Op: layer.OpAdd, Path: t.path, Err: err}
		}
		n.Mtime = t.mtime
	}
	return nil
}

func (m *Merger) change(c *layer.Change) error {
	if err := checkChange(c); err != nil {
		return err
	}
	if c.Op == layer.OpOpaque {
		dir, err := m.mkdir(c.Path)
		if err != nil {
			return err
		}
		m.hideLower(dir)
		return nil
	}
	if c.Path == "" {
		return m.setAttributes(m.root, c.Node)
	}
	parent, name := split(c.Path)
	dir, err := m.mkdir(parent)
	if err != nil {
		return err
	}
	switch c.Op {
	case layer.OpRemove:
		m.remove(dir, name)
		return nil
	case layer.OpLink:
		return m.link(dir, name, c)
	default:
		return m.addNode(dir, name, c)
	}
}

// checkChange refuses changes that package layer does not make: a handmade layer must not break the tree.
func checkChange(c *layer.Change) error {
	if len(c.Path) > maxPath {
		return fmt.Errorf("%w: more than %d bytes of a path", layer.ErrLimit, maxPath)
	}
	if strings.HasPrefix(c.Path, "/") || strings.HasSuffix(c.Path, "/") {
		return fmt.Errorf("%w: path %q is not clean", layer.ErrInvalid, c.Path)
	}
	isDir := c.Node != nil && c.Node.Mode&unix.S_IFMT == unix.S_IFDIR
	switch {
	case c.Op < layer.OpAdd || c.Op > layer.OpOpaque:
		return fmt.Errorf("%w: operation %d", layer.ErrInvalid, c.Op)
	case c.Op == layer.OpAdd && c.Node == nil:
		return fmt.Errorf("%w: no attributes", layer.ErrInvalid)
	case c.Path == "" && c.Op != layer.OpOpaque && !(c.Op == layer.OpAdd && isDir):
		return fmt.Errorf("%w: the root can only be a directory", layer.ErrInvalid)
	}
	return nil
}

// addNode makes an inode at a name. It replaces the old entry, but keeps a directory for a directory.
func (m *Merger) addNode(dir *daxfs.Node, name string, c *layer.Change) error {
	from := c.Node
	kind := from.Mode & unix.S_IFMT
	n := dir.Entries[name]
	if n == nil || kind != unix.S_IFDIR || n.Mode&unix.S_IFMT != unix.S_IFDIR {
		if n != nil {
			m.remove(dir, name)
		}
		if m.takesOver(dir, from) {
			c.Node = nil
			from.Mode = kind | from.Mode&permissions
			m.enter(dir, name, from)
			m.touch(dir, name)
			return nil
		}
		var err error
		if n, err = m.create(dir, name, kind); err != nil {
			return err
		}
		n.Rdev, n.Target, n.Data = from.Rdev, from.Target, from.Data
	}
	m.touch(dir, name)
	return m.setAttributes(n, from)
}

// takesOver reports whether a node of a layer can become the inode unchanged: it inherits nothing, and
// no attribute changes another. Directories are excluded because their times are set last.
func (m *Merger) takesOver(dir, from *daxfs.Node) bool {
	kind := from.Mode & unix.S_IFMT
	if kind == unix.S_IFDIR || len(from.Xattrs) > 0 {
		return false
	}
	if m.exact {
		return true
	}
	return dir.Mode&unix.S_ISGID == 0 && len(dir.Xattrs) == 0 && from.UID != layer.KeepID && from.GID != layer.KeepID &&
		(kind != unix.S_IFLNK || from.Mode == unix.S_IFLNK|0o777)
}

// create makes an inode like the kernel for root: it inherits ACLs and a set-group-ID directory's group.
func (m *Merger) create(dir *daxfs.Node, name string, kind uint32) (*daxfs.Node, error) {
	n := m.node()
	n.Mode = kind
	if kind == unix.S_IFLNK {
		n.Mode |= 0o777
	}
	if !m.exact {
		if dir.Mode&unix.S_ISGID != 0 {
			n.GID = dir.GID
		}
		if err := m.inheritACL(n, dir); err != nil {
			return nil, err
		}
	}
	m.enter(dir, name, n)
	return n, nil
}

// link adds a name to an existing inode.
func (m *Merger) link(dir *daxfs.Node, name string, c *layer.Change) error {
	m.remove(dir, name) // first, like containerd: a link to itself finds nothing
	n, err := m.linkTarget(c.LinkTo)
	if err != nil {
		return fmt.Errorf("target %q: %w", c.LinkTo, err)
	}
	if n.Mode&unix.S_IFMT == unix.S_IFDIR {
		return fmt.Errorf("target %q: %w", c.LinkTo, ErrIsDir)
	}
	m.enter(dir, name, n)
	m.touch(dir, name)
	if c.Node == nil {
		return nil
	}
	return m.setAttributes(n, c.Node)
}

// enter puts an inode under a free name.
func (m *Merger) enter(dir *daxfs.Node, name string, n *daxfs.Node) {
	if dir.Entries == nil {
		dir.Entries = make(map[string]*daxfs.Node)
	}
	dir.Entries[m.keep(name)] = n
	if n.Mode&unix.S_IFMT == unix.S_IFLNK {
		m.lastDir = nil
	}
}

// keep copies a name, because the substring would keep the whole path in memory. It caches frequent
// names such as __init__.py and package.json, which are thus copied once.
func (m *Merger) keep(name string) string {
	kept := &m.names[maphash.String(nameSeed, name)%uint64(len(m.names))]
	if *kept != name {
		*kept = strings.Clone(name)
	}
	return *kept
}

var nameSeed = maphash.MakeSeed()

func (m *Merger) remove(dir *daxfs.Node, name string) {
	if n := dir.Entries[name]; n != nil {
		delete(dir.Entries, name)
		if kind := n.Mode & unix.S_IFMT; kind == unix.S_IFDIR || kind == unix.S_IFLNK {
			m.lastDir = nil
		}
	}
}

// touch records that the current layer has an entry for a name.
func (m *Merger) touch(dir *daxfs.Node, name string) {
	if m.fresh != nil {
		m.fresh[entry{dir, name}] = struct{}{}
	}
}

// hideLower removes the entries of a directory that the current layer did not make. Directories on the
// way to entries of the current layer stay, with their attributes.
func (m *Merger) hideLower(dir *daxfs.Node) {
	if _, done := m.opaque[dir]; done {
		m.spared += m.implied // containerd walks through it again and may meet implied directories
		return                // everything added since belongs to this layer
	}
	m.opaque[dir] = struct{}{}
	m.lastDir = nil
	for name, n := range dir.Entries {
		_, keep := m.fresh[entry{dir, name}]
		if n.Mode&unix.S_IFMT == unix.S_IFDIR {
			m.hideLower(n)
			if !keep && len(n.Entries) > 0 {
				keep = true
				m.spared++
			}
		}
		if !keep {
			delete(dir.Entries, name)
		}
	}
}

// slabNodes is the number of nodes per allocation: as many as fit an 8 KiB size class of the Go runtime.
const slabNodes = 60

func (m *Merger) node() *daxfs.Node {
	if len(m.slab) == 0 {
		m.slab = make([]daxfs.Node, slabNodes)
	}
	n := &m.slab[0]
	m.slab = m.slab[1:]
	return n
}

func split(path string) (dir, name string) {
	i := strings.LastIndexByte(path, '/')
	if i < 0 {
		return "", path
	}
	return path[:i], path[i+1:]
}
