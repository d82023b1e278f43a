package store

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/daxfs/daxfs-snapshotter/converter/layer"
	"github.com/daxfs/daxfs-snapshotter/daxfs"
)

// A plain copy is an image as an ordinary directory. It is made if the pool has no room for an image
// whose layers have no directories, so that a container can start anyway. Its layers need not fit into
// the pool.

// Names in plain/ that are not copies.
const (
	plainNew  = "new-"
	plainDead = "removed-"
)

func (s *Store) plainDir() string { return filepath.Join(s.cfg.Root, "plain") }

// plainPath is the path of the copy of an image. Keys of images end in hashes.
func (s *Store) plainPath(key string) string {
	return filepath.Join(s.plainDir(), strings.TrimPrefix(key, imagePrefix))
}

// openPlain removes copies that a crash left unfinished.
func (s *Store) openPlain() error {
	entries, err := os.ReadDir(s.plainDir())
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	errs := []error{err}
	for _, e := range entries {
		if strings.HasPrefix(e.Name(), plainNew) || strings.HasPrefix(e.Name(), plainDead) {
			errs = append(errs, os.RemoveAll(filepath.Join(s.plainDir(), e.Name())))
		}
	}
	return errors.Join(errs...)
}

// Plain returns a directory on disk with a copy of an image.
func (s *Store) Plain(ctx context.Context, img Image) (_ string, err error) {
	unlock, err := s.images.lock(ctx, img.Key)
	if err != nil {
		return "", err
	}
	defer unlock()
	dir := s.plainPath(img.Key)
	if _, err := os.Lstat(dir); err == nil {
		return dir, nil
	}
	if want := ImageKey(img.layerKeys()); img.Key != want {
		return "", fmt.Errorf("image %q: key of %d layers, expected %q", img.Key, len(img.Layers), want)
	}
	began := time.Now()
	defer func() { s.cfg.Observe("plain", time.Since(began), err) }()
	if err := os.MkdirAll(s.plainDir(), 0o711); err != nil { // containers with mapped owners traverse it
		return "", err
	}
	contents, err := newAside(s.region, s.plainDir())
	if err != nil {
		return "", err
	}
	defer func() { err = errors.Join(err, contents.Close()) }()
	root, err := mergeLayers(ctx, img.Layers, func(ctx context.Context, f Layer) (*layer.Layer, error) {
		return contents.layer(ctx, s, f)
	})
	if err != nil {
		return "", fmt.Errorf("plain copy of image %q: %w", img.Key, err)
	}
	temp, err := os.MkdirTemp(s.plainDir(), plainNew)
	if err != nil {
		return "", err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(temp)) }()
	w := writer{contents: contents, first: map[*daxfs.Node]string{}}
	top := filepath.Join(temp, "tree")
	if err := w.write(ctx, top, root); err != nil {
		return "", fmt.Errorf("plain copy of image %q: %w", img.Key, err)
	}
	return dir, os.Rename(top, dir)
}

// sweepPlain removes the copies that are not needed.
func (s *Store) sweepPlain(ctx context.Context, needed func(key string) bool) error {
	entries, err := os.ReadDir(s.plainDir())
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	errs := []error{err}
	for _, e := range entries {
		if strings.HasPrefix(e.Name(), plainNew) {
			continue // unfinished
		}
		errs = append(errs, s.removePlain(ctx, e.Name(), needed))
	}
	return errors.Join(errs...)
}

func (s *Store) removePlain(ctx context.Context, name string, needed func(key string) bool) error {
	key := imagePrefix + name
	unlock, err := s.images.lock(ctx, key)
	if err != nil {
		return err
	}
	defer unlock()
	if needed(key) {
		return nil
	}
	dead := filepath.Join(s.plainDir(), plainDead+strings.TrimPrefix(name, plainDead))
	if err := os.Rename(filepath.Join(s.plainDir(), name), dead); err != nil {
		return err
	}
	return os.RemoveAll(dead)
}

// writer writes a tree to a directory.
type writer struct {
	contents io.ReaderAt
	first    map[*daxfs.Node]string // paths of regular files, for hard links
}

func (w *writer) write(ctx context.Context, path string, n *daxfs.Node) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	kind := n.Mode & unix.S_IFMT
	if kind != unix.S_IFDIR {
		if first, ok := w.first[n]; ok {
			return os.Link(first, path)
		}
		w.first[n] = path
	}
	if err := w.make(path, kind, n); err != nil {
		return err
	}
	if kind == unix.S_IFDIR {
		names := make([]string, 0, len(n.Entries))
		for name := range n.Entries {
			names = append(names, name)
		}
		slices.Sort(names)
		for _, name := range names {
			if err := w.write(ctx, filepath.Join(path, name), n.Entries[name]); err != nil {
				return err
			}
		}
	}
	return attributes(path, kind, n)
}

// make makes an inode without attributes.
func (w *writer) make(path string, kind uint32, n *daxfs.Node) error {
	switch kind {
	case unix.S_IFDIR:
		return os.Mkdir(path, 0o700)
	case unix.S_IFLNK:
		return os.Symlink(n.Target, path)
	case unix.S_IFREG:
		f, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
		if err != nil {
			return err
		}
		if n.Data.Size > 0 {
			_, err = io.Copy(f, io.NewSectionReader(w.contents, n.Data.Off, n.Data.Size))
		}
		return errors.Join(err, f.Close())
	}
	if err := unix.Mknod(path, kind|0o600, int(n.Rdev)); err != nil {
		return &os.PathError{Op: "mknod", Path: path, Err: err}
	}
	return nil
}

// attributes sets the attributes of an inode: the owner first, because changing it clears mode bits
// and capabilities, and the time last.
func attributes(path string, kind uint32, n *daxfs.Node) error {
	if err := os.Lchown(path, int(n.UID), int(n.GID)); err != nil {
		return err
	}
	for _, x := range n.Xattrs {
		if err := unix.Lsetxattr(path, x.Name, x.Value, 0); err != nil {
			return &os.PathError{Op: "set attribute " + x.Name + " of", Path: path, Err: err}
		}
	}
	if kind != unix.S_IFLNK {
		if err := unix.Chmod(path, n.Mode&^unix.S_IFMT); err != nil {
			return &os.PathError{Op: "chmod", Path: path, Err: err}
		}
	}
	t := unix.Timespec{Sec: n.Mtime.Sec, Nsec: int64(n.Mtime.Nsec)}
	if err := unix.UtimesNanoAt(unix.AT_FDCWD, path, []unix.Timespec{t, t}, unix.AT_SYMLINK_NOFOLLOW); err != nil {
		return &os.PathError{Op: "set time of", Path: path, Err: err}
	}
	return nil
}
