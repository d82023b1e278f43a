package main

import (
	"fmt"
	"io"
	"io/fs"
	"os"
	"path"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/daxfs/daxfs-snapshotter/daxfs"
)

// image is an open image file, or a block device that holds an image.
type image struct {
	*os.File
	size int64
}

func openImage(name string) (*image, error) {
	// Stat first: opening a FIFO would wait for a writer and ignore ^C.
	var st unix.Stat_t
	if err := unix.Stat(name, &st); err != nil {
		return nil, &fs.PathError{Op: "open", Path: name, Err: err}
	}
	kind := st.Mode & unix.S_IFMT
	if kind != unix.S_IFREG && kind != unix.S_IFBLK {
		return nil, fmt.Errorf("%q is a %s, expected an image: a file or a block device", name, typeName(st.Mode))
	}
	f, err := os.Open(name)
	if err != nil {
		return nil, err
	}
	size, err := f.Seek(0, io.SeekEnd) // works for devices too
	if err != nil {
		f.Close()
		return nil, err
	}
	if kind == unix.S_IFBLK {
		size = imageSize(f, 0, size) // a device may be larger than the image
	}
	return &image{f, size}, nil
}

// openImageFS opens an image and its EROFS half. The caller closes the image.
func openImageFS(name string) (*image, *daxfs.FS, error) {
	img, err := openImage(name)
	if err != nil {
		return nil, nil, err
	}
	f, err := img.fs()
	if err != nil {
		img.Close()
		return nil, nil, err
	}
	return img, f, nil
}

// fs opens the EROFS half, which is complete.
func (i *image) fs() (*daxfs.FS, error) {
	f, err := daxfs.Open(daxfs.NewReadCache(i.File, i.size), i.size)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", i.Name(), err)
	}
	return f, nil
}

// inside converts a user's path to the form of the image reader: relative to the root, wherever it starts.
func inside(name string) string {
	if name = path.Clean("/" + name); name == "/" {
		return "."
	}
	return name[1:]
}

// printable returns a name from an image in a form that is safe to show: names with control sequences
// are quoted, and so are names that look quoted.
func printable(s string) string {
	if strings.HasPrefix(s, `"`) {
		return strconv.Quote(s)
	}
	for _, r := range s {
		if !strconv.IsPrint(r) || r == '\ufffd' {
			return strconv.Quote(s)
		}
	}
	return s
}
