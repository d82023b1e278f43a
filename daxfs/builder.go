package daxfs

import (
	"bytes"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"

	"golang.org/x/sys/unix"
)

// HugeSize is the size in bytes of a huge page. Contents of at least that many bytes should start at a multiple of it,
// so that a direct mapping of them can use huge pages.
const HugeSize = 2 << 20

// File is what a Builder writes to; an *os.File is one.
type File interface {
	io.ReaderAt
	io.WriterAt
	Truncate(size int64) error
}

// BuilderOptions are the choices of a self-contained image. The zero value is a good default.
type BuilderOptions struct {
	Options
	// Unaligned saves the gaps before large files: contents of HugeSize and more then start at any block.
	Unaligned bool
}

// Builder makes a self-contained image in a file: data first, metadata behind it, each distinct content once. It is a
// convenience for trees whose contents come one after another; converters plan by themselves. A Builder holds a buffer
// of HugeSize and is not safe for concurrent use. After an error every call returns that error.
type Builder struct {
	dst  File
	o    BuilderOptions
	root *Node
	made map[*Node]bool // directories that no Add has described yet
	have map[contentKey]Data
	gaps []hole // free room below end, in order
	end  int64  // of the data
	high int64  // no byte at or above it was ever written
	buf  []byte
	err  error
}

type contentKey struct {
	sum  [32]byte
	size int64
}

// NewBuilder starts an image in dst, which is truncated. The caller keeps dst, and closes it after Finish.
func NewBuilder(dst File, o BuilderOptions) *Builder {
	b := &Builder{
		dst: dst, o: o, root: emptyDir(), made: map[*Node]bool{}, have: map[contentKey]Data{},
		end: BlockSize, high: BlockSize, buf: make([]byte, HugeSize),
	}
	b.made[b.root] = true
	if err := dst.Truncate(0); err != nil {
		b.err = fmt.Errorf("empty the image file: %w", err)
	}
	return b
}

func emptyDir() *Node { return &Node{Mode: unix.S_IFDIR | 0o755, Entries: map[string]*Node{}} }

// Add adds one inode at path: names separated by '/', with or without one in front; "" is the root. A regular file's
// contents are all that r has; nil stands for none, and n.Data is ignored. Directories on the way that were not added
// before are made with mode 0755 and owner 0:0, and may be added later. n.Entries must be empty: what is in a
// directory is added by path. The values of n.Xattrs stay in use until Finish.
func (b *Builder) Add(path string, n Node, r io.Reader) error {
	return b.do(path, func(dir *Node, name string) error {
		if len(n.Entries) > 0 {
			return invalid("a node with entries; expected one Add for each")
		}
		n.Data = Data{}
		n.Xattrs = slices.Clone(n.Xattrs)
		isDir := n.Mode&unix.S_IFMT == unix.S_IFDIR
		if isDir {
			n.Entries = map[string]*Node{}
		}
		if old := child(dir, name, b.root); old != nil {
			if !b.made[old] || !isDir {
				return invalid("the path is there already")
			}
			n.Entries = old.Entries
			*old = n
			delete(b.made, old)
			return nil
		}
		if name == "" {
			return invalid("the root is not a directory")
		}
		if err := checkNode(&n); err != nil {
			return err
		}
		if r != nil {
			if n.Mode&unix.S_IFMT != unix.S_IFREG {
				return invalid("a %s cannot have contents", typeName(n.Mode))
			}
			var err error
			if n.Data, err = b.store(r); err != nil {
				return err
			}
		}
		dir.Entries[name] = &n
		return nil
	})
}

// Link makes path another name of the inode at target, which is there already and not a directory.
func (b *Builder) Link(path, target string) error {
	return b.do(path, func(dir *Node, name string) error {
		n := b.root
		for _, part := range splitPath(target) {
			if n = n.Entries[part]; n == nil {
				return invalid("link to %q, which is not there", target)
			}
		}
		if n.Mode&unix.S_IFMT == unix.S_IFDIR {
			return invalid("link to the directory %q", target)
		}
		if child(dir, name, b.root) != nil {
			return invalid("the path is there already")
		}
		dir.Entries[name] = n
		return nil
	})
}

// Finish writes the metadata, cuts dst to the size of the image and returns the plan.
func (b *Builder) Finish() (*Plan, error) {
	if b.err != nil {
		return nil, b.err
	}
	p, err := b.finish()
	b.err = errors.New("the image is finished")
	if err != nil {
		b.err = err
		return nil, err
	}
	return p, nil
}

func (b *Builder) finish() (*Plan, error) {
	p, err := NewPlan(b.root, b.o.Options)
	if err != nil {
		return nil, err
	}
	for _, g := range b.gaps {
		if err := b.zero(g.off, min(g.end, b.high)); err != nil {
			return nil, err
		}
	}
	size := b.end + p.MetaSize()
	if err := p.Place(Placement{Image: 0, Meta: b.end, End: size}); err != nil {
		return nil, err
	}
	if err := p.WriteTo(b.dst); err != nil {
		return nil, err
	}
	if err := b.dst.Truncate(size); err != nil {
		return nil, fmt.Errorf("cut the image to %d bytes: %w", size, err)
	}
	return p, nil
}

// do finds the directory of path, makes what is missing on the way, and calls f with the last name.
func (b *Builder) do(path string, f func(dir *Node, name string) error) error {
	if b.err != nil {
		return b.err
	}
	parts := splitPath(path)
	path = "/" + strings.TrimPrefix(path, "/")
	dir, name := b.root, ""
	for i, part := range parts {
		if err := checkName(part); err != nil {
			return &TreeError{path, err}
		}
		if name = part; i == len(parts)-1 {
			break
		}
		next := dir.Entries[part]
		switch {
		case next == nil:
			next = emptyDir()
			b.made[next] = true
			dir.Entries[part] = next
		case next.Mode&unix.S_IFMT != unix.S_IFDIR:
			return &TreeError{path, invalid("%q is not a directory", part)}
		}
		dir = next
	}
	if err := f(dir, name); err != nil {
		err = &TreeError{path, err}
		if !errors.Is(err, ErrInvalid) {
			b.err = err // of r or dst: the state of the file is not known
		}
		return err
	}
	return nil
}

func splitPath(path string) []string {
	path = strings.TrimPrefix(path, "/")
	if path == "" || path == "." {
		return nil
	}
	return strings.Split(path, "/")
}

func child(dir *Node, name string, root *Node) *Node {
	if name == "" {
		return root
	}
	return dir.Entries[name]
}

// store puts all bytes of r into the file unless they are there already.
func (b *Builder) store(r io.Reader) (Data, error) {
	n, err := io.ReadFull(r, b.buf)
	switch {
	case err == nil:
		return b.storeLarge(r)
	case !errors.Is(err, io.EOF) && !errors.Is(err, io.ErrUnexpectedEOF):
		return Data{}, err
	case n == 0:
		return Data{}, nil
	}
	d := Data{Size: int64(n), Sum: sha256.Sum256(b.buf[:n])}
	old, ok := b.have[contentKey{d.Sum, d.Size}]
	if ok {
		same, err := b.same(old.Off, b.buf[:n])
		if err != nil || same {
			return old, err
		}
	}
	pages := roundUp(d.Size, BlockSize)
	clear(b.buf[n:pages])
	d.Off = b.alloc(pages)
	if err := b.write(b.buf[:pages], d.Off); err != nil {
		return Data{}, err
	}
	b.remember(d)
	return d, nil
}

// storeLarge is store for contents of which the first HugeSize bytes are in b.buf. Their size is not known yet: they
// are written behind everything, and forgotten if they turn out to be there already.
func (b *Builder) storeLarge(r io.Reader) (Data, error) {
	off := b.end
	if !b.o.Unaligned {
		off = roundUp(off, HugeSize)
	}
	h := sha256.New()
	size, n := int64(0), len(b.buf)
	for n > 0 {
		h.Write(b.buf[:n])
		pages := int(roundUp(int64(n), BlockSize))
		clear(b.buf[n:pages])
		if err := b.write(b.buf[:pages], off+size); err != nil {
			return Data{}, err
		}
		size += int64(n)
		if n < len(b.buf) {
			break
		}
		var err error
		n, err = io.ReadFull(r, b.buf)
		if err != nil && !errors.Is(err, io.EOF) && !errors.Is(err, io.ErrUnexpectedEOF) {
			return Data{}, err
		}
	}
	d := Data{Off: off, Size: size, Sum: [32]byte(h.Sum(nil))}
	if old, ok := b.have[contentKey{d.Sum, d.Size}]; ok {
		same, err := b.sameStored(old.Off, off, size)
		if err != nil || same {
			return old, err
		}
	}
	if off > b.end {
		b.gaps = append(b.gaps, hole{b.end, off})
	}
	b.end = off + roundUp(size, BlockSize)
	b.remember(d)
	return d, nil
}

// remember keeps the first of several contents with one sum; another one is stored, but never found again.
func (b *Builder) remember(d Data) {
	key := contentKey{d.Sum, d.Size}
	if _, ok := b.have[key]; !ok {
		b.have[key] = d
	}
}

// alloc finds room for n bytes, a multiple of BlockSize: in a gap if there is one.
func (b *Builder) alloc(n int64) int64 {
	for i := range b.gaps {
		g := &b.gaps[i]
		if g.end-g.off < n {
			continue
		}
		off := g.off
		if g.off += n; g.off == g.end {
			b.gaps = slices.Delete(b.gaps, i, i+1)
		}
		return off
	}
	off := b.end
	b.end += n
	return off
}

func (b *Builder) write(p []byte, off int64) error {
	b.high = max(b.high, off+int64(len(p)))
	_, err := b.dst.WriteAt(p, off)
	return err
}

// zero clears the bytes from off to end.
func (b *Builder) zero(off, end int64) error {
	clear(b.buf)
	for off < end {
		n := min(end-off, int64(len(b.buf)))
		if err := b.write(b.buf[:n], off); err != nil {
			return err
		}
		off += n
	}
	return nil
}

// same compares the bytes at off with p.
func (b *Builder) same(off int64, p []byte) (bool, error) {
	q := make([]byte, min(len(p), 64<<10))
	for len(p) > 0 {
		q = q[:min(len(p), len(q))]
		if err := readFullAt(b.dst, q, off); err != nil {
			return false, err
		}
		if !bytes.Equal(p[:len(q)], q) {
			return false, nil
		}
		p, off = p[len(q):], off+int64(len(q))
	}
	return true, nil
}

// sameStored compares size bytes at x with those at y.
func (b *Builder) sameStored(x, y, size int64) (bool, error) {
	for size > 0 {
		p := b.buf[:min(size, int64(len(b.buf)))]
		if err := readFullAt(b.dst, p, x); err != nil {
			return false, err
		}
		if same, err := b.same(y, p); err != nil || !same {
			return false, err
		}
		x, y, size = x+int64(len(p)), y+int64(len(p)), size-int64(len(p))
	}
	return true, nil
}

// readFullAt fills p; a reader may say EOF along with the last byte.
func readFullAt(r io.ReaderAt, p []byte, off int64) error {
	n, err := r.ReadAt(p, off)
	if n == len(p) {
		return nil
	}
	return fmt.Errorf("read back %d bytes at %d, got %d: %w", len(p), off, n, err)
}
