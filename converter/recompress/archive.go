package recompress

import (
	"archive/tar"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"

	"github.com/google/renameio/v2"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// archive is an OCI image layout in a tar file. It is assembled in a directory first, so that its
// members always have the same order.
type archive struct {
	layout
	file string
}

// newArchive fails early if the file cannot be written.
func newArchive(name, file, tag string) (Destination, error) {
	if fi, err := os.Stat(file); err == nil && !fi.Mode().IsRegular() {
		return nil, fmt.Errorf("destination %q: not a regular file", name)
	}
	dir, err := os.MkdirTemp(filepath.Dir(file), ".daxfs-archive-*")
	if err != nil {
		return nil, fmt.Errorf("destination %q: %w", name, err)
	}
	return &archive{layout{kind: name, dir: dir, tag: tag}, file}, nil
}

func (a *archive) Close() error { return os.RemoveAll(a.dir) }

// name writes the tar in the order of names.
func (a *archive) name(ctx context.Context, d ocispec.Descriptor, doc []byte) error {
	if err := a.layout.name(ctx, d, doc); err != nil {
		return err
	}
	f, err := renameio.NewPendingFile(a.file, renameio.WithPermissions(0o644))
	if err != nil {
		return err
	}
	defer f.Cleanup()
	w := tar.NewWriter(f)
	err = filepath.WalkDir(a.dir, func(path string, e fs.DirEntry, err error) error {
		if err == nil {
			err = context.Cause(ctx)
		}
		if err != nil || path == a.dir {
			return err
		}
		return a.member(w, path, e)
	})
	if err = errors.Join(err, w.Close()); err != nil {
		return err
	}
	return f.CloseAtomicallyReplace()
}

// member writes a file or a directory, without machine-specific attributes.
func (a *archive) member(w *tar.Writer, path string, e fs.DirEntry) error {
	name, err := filepath.Rel(a.dir, path)
	if err != nil {
		return err
	}
	if e.IsDir() {
		return w.WriteHeader(&tar.Header{Name: name + "/", Typeflag: tar.TypeDir, Mode: 0o755})
	}
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	defer f.Close()
	fi, err := f.Stat()
	if err != nil {
		return err
	}
	if err := w.WriteHeader(&tar.Header{Name: name, Typeflag: tar.TypeReg, Mode: 0o644, Size: fi.Size()}); err != nil {
		return err
	}
	_, err = io.Copy(w, f)
	return err
}
