package converter

import (
	"cmp"
	"context"
	"crypto/sha256"
	"fmt"
	"io"
	"maps"
	"math"
	"runtime"
	"slices"
	"sync/atomic"

	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"

	"github.com/daxfs/daxfs-snapshotter/converter/blob"
	"github.com/daxfs/daxfs-snapshotter/converter/source"
	"github.com/daxfs/daxfs-snapshotter/converter/tree"
	"github.com/daxfs/daxfs-snapshotter/daxfs"
)

// Rules of the findings of Compare.
const (
	RuleSourceTree daxfs.Rule = "source-tree"
	RuleSourceData daxfs.Rule = "source-data"
)

// Compare reads the image of src like Convert, but keeps no contents, and compares img with it: names,
// attributes, hard links, link targets, and the bytes of all contents. It does not matter where and with
// which options img was written. Compare calls report for each difference until report returns false.
//
// The error reports that the comparison failed; a difference is not an error. Time and memory are
// those of Convert, without the memory for contents. Only daxfs.Check verifies that img is valid.
func Compare(ctx context.Context, src source.Source, img *daxfs.FS, o Options, report func(daxfs.Finding) bool) error {
	o = o.withDefaults()
	from, err := src.Image(ctx, o.Platform)
	if err != nil {
		return tooLarge(err)
	}
	sums := &sums{max: o.MaxSize}
	c := &conversion{o: o, store: func(int) contents { return sums }, img: from, tree: tree.NewMerger()}
	root, err := c.run(ctx)
	if err != nil {
		return fmt.Errorf("%s: %w", src, cmp.Or(context.Cause(ctx), tooLarge(err)))
	}
	d := &differ{img: img, report: report, nids: map[*daxfs.Node]uint64{}, nodes: map[uint64]*daxfs.Node{}}
	if err := d.inode(ctx, "/", root, img.Root()); err != nil {
		return err
	}
	return d.contents(ctx)
}

// sums computes the digests of contents and keeps none.
type sums struct {
	max   int64
	total atomic.Int64
}

func (s *sums) Put(_ context.Context, size int64, r io.Reader) (daxfs.Data, error) {
	if s.total.Add(size) > s.max {
		return daxfs.Data{}, fmt.Errorf("%w of %d bytes", blob.ErrTooLarge, s.max)
	}
	h := sha256.New()
	n, err := io.Copy(h, io.LimitReader(r, size))
	if err == nil && n < size {
		err = io.ErrUnexpectedEOF
	}
	return daxfs.Data{Size: size, Sum: [sha256.Size]byte(h.Sum(nil))}, err
}

func (s *sums) Close() error { return nil }

type differ struct {
	img    *daxfs.FS
	report func(daxfs.Finding) bool
	done   bool // report wants no more findings

	nids  map[*daxfs.Node]uint64 // of inodes other than directories, which may have several names
	nodes map[uint64]*daxfs.Node
	files []expected
}

// expected is a regular file of the image with contents still to be compared.
type expected struct {
	off, size int64
	nid       uint64
	sum       [sha256.Size]byte
	path      string
}

func (d *differ) found(rule daxfs.Rule, path string, nid uint64, format string, args ...any) {
	if !d.done {
		d.done = !d.report(daxfs.Finding{Rule: rule, Off: -1, Ino: nid, Path: path, Msg: fmt.Sprintf(format, args...)})
	}
}

// inode compares an inode and everything below it.
func (d *differ) inode(ctx context.Context, path string, want *daxfs.Node, nid uint64) error {
	if err := ctx.Err(); err != nil || d.done {
		return context.Cause(ctx)
	}
	dir := want.Mode&unix.S_IFMT == unix.S_IFDIR
	if !dir {
		known, seen := d.nids[want]
		other := d.nodes[nid]
		switch {
		case seen && known == nid:
			return nil // another name of an inode already compared
		case seen:
			d.found(RuleSourceTree, path, nid, "it is a file of its own, expected a hard link to inode %d", known)
		case other != nil:
			d.found(RuleSourceTree, path, nid, "it is a hard link to another file, expected a file of its own")
		}
		if !seen && other == nil {
			d.nids[want], d.nodes[nid] = nid, want
		}
	}
	have, err := d.img.Inode(nid)
	if err != nil {
		return fmt.Errorf("%q: %w", path, err)
	}
	if err := d.attributes(path, want, &have); err != nil {
		return fmt.Errorf("%q: %w", path, err)
	}
	if have.Mode&unix.S_IFMT != want.Mode&unix.S_IFMT {
		return nil
	}
	if dir {
		return d.entries(ctx, path, want, have)
	}
	if off, size, ok := have.Data(); ok && size > 0 && size == want.Data.Size {
		d.files = append(d.files, expected{off, size, nid, want.Data.Sum, path})
	}
	return nil
}

func (d *differ) attributes(path string, want *daxfs.Node, have *daxfs.Inode) error {
	unlike := func(what, format string, got, expected any) {
		d.found(RuleSourceTree, path, have.Nid, "%s is "+format+", expected "+format, what, got, expected)
	}
	if have.Mode != want.Mode {
		unlike("mode", "%#o", have.Mode, want.Mode)
	}
	if have.UID != want.UID || have.GID != want.GID {
		d.found(RuleSourceTree, path, have.Nid, "owner is %d:%d, expected %d:%d", have.UID, have.GID,
			want.UID, want.GID)
	}
	if have.Mtime != want.Mtime {
		unlike("modification time", "%+v", have.Mtime, want.Mtime)
	}
	if have.Mode&unix.S_IFMT != want.Mode&unix.S_IFMT {
		return nil
	}
	switch want.Mode & unix.S_IFMT {
	case unix.S_IFREG:
		if have.Size != want.Data.Size {
			unlike("size", "%d", have.Size, want.Data.Size)
		}
	case unix.S_IFLNK:
		target, err := have.Target()
		if err != nil {
			return err
		}
		if target != want.Target {
			unlike("target", "%q", target, want.Target)
		}
	case unix.S_IFCHR, unix.S_IFBLK:
		if have.Rdev != want.Rdev {
			unlike("device number", "%#x", have.Rdev, want.Rdev)
		}
	}
	xs, err := have.Xattrs()
	if err != nil {
		return err
	}
	got, expected := map[string]string{}, map[string]string{}
	for _, x := range xs {
		got[x.Name] = string(x.Value)
	}
	for _, x := range want.Xattrs {
		expected[x.Name] = string(x.Value)
	}
	if !maps.Equal(got, expected) {
		unlike("set of extended attributes", "%.200q", got, expected)
	}
	return nil
}

func (d *differ) entries(ctx context.Context, path string, want *daxfs.Node, have daxfs.Inode) error {
	child := func(name string) string {
		if path == "/" {
			return path + name
		}
		return path + "/" + name
	}
	seen := 0
	var failed error
	err := have.Entries(0, func(e daxfs.Dirent) bool {
		n := want.Entries[e.Name]
		if n == nil {
			d.found(RuleSourceTree, child(e.Name), e.Nid, "the source has no such name")
			return !d.done
		}
		seen++
		failed = d.inode(ctx, child(e.Name), n, e.Nid)
		return failed == nil && !d.done
	})
	if err = cmp.Or(failed, err); err != nil || d.done || seen == len(want.Entries) {
		return err
	}
	for _, name := range slices.Sorted(maps.Keys(want.Entries)) {
		if _, err := have.Lookup(name); err != nil {
			d.found(RuleSourceTree, child(name), 0, "the image has no such name, the source has it")
		}
	}
	return nil
}

// contents compares the bytes of all files. It reads each distinct content of the image once.
func (d *differ) contents(ctx context.Context) error {
	slices.SortStableFunc(d.files, func(a, b expected) int {
		return cmp.Or(cmp.Compare(a.off, b.off), cmp.Compare(a.size, b.size))
	})
	g, ctx := errgroup.WithContext(ctx)
	g.SetLimit(runtime.GOMAXPROCS(0))
	got := make([][sha256.Size]byte, len(d.files))
	for i := 0; i < len(d.files) && !d.done; {
		f, from := d.files[i], i
		for i++; i < len(d.files) && d.files[i].off == f.off && d.files[i].size == f.size; {
			i++
		}
		to := i
		g.Go(func() error {
			if ctx.Err() != nil {
				return context.Cause(ctx)
			}
			in, err := d.img.Inode(f.nid)
			if err != nil {
				return err
			}
			h := sha256.New()
			r := &untilDone{ctx, io.NewSectionReader(in, 0, math.MaxInt64)}
			if _, err := io.CopyBuffer(h, r, make([]byte, min(f.size+1, 256<<10))); err != nil {
				return fmt.Errorf("%q: %w", f.path, err)
			}
			for k := from; k < to; k++ {
				h.Sum(got[k][:0])
			}
			return nil
		})
	}
	if err := g.Wait(); err != nil {
		return err
	}
	for k, f := range d.files {
		if got[k] != f.sum {
			d.found(RuleSourceData, f.path, f.nid, "%d bytes have SHA-256 %x, those of the source %x",
				f.size, got[k], f.sum)
		}
	}
	return nil
}

// untilDone ends reads with its context.
type untilDone struct {
	ctx context.Context
	r   io.Reader
}

func (u *untilDone) Read(p []byte) (int, error) {
	if u.ctx.Err() != nil {
		return 0, context.Cause(u.ctx)
	}
	return u.r.Read(p)
}
