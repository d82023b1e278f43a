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

// image is an image file, or a block device that holds one, that is open for reading.
type image struct {
	*os.File
	size int64
}

func openImage(name string) (*image, error) {
	// Before it is opened: that of a FIFO waits until somebody writes to it, deaf to ^C.
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
	size, err := f.Seek(0, io.SeekEnd) // also that of a device
	if err != nil {
		f.Close()
		return nil, err
	}
	if kind == unix.S_IFBLK {
		size = imageSize(f, 0, size) // a device has the size that it has
	}
	return &image{f, size}, nil
}

// openImageFS opens an image and its EROFS half, which holds everything. The caller closes the image.
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

func (i *image) fs() (*daxfs.FS, error) {
	f, err := daxfs.Open(daxfs.NewReadCache(i.File, i.size), i.size)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", i.Name(), err)
	}
	return f, nil
}

// inside is a path of the user as the reader of an image takes it: from the root, wherever it is said to begin.
func inside(name string) string {
	if name = path.Clean("/" + name); name == "/" {
		return "."
	}
	return name[1:]
}

// printable is a name from an image as it can be shown: one that could do things to a terminal is quoted, and one that
// looks as if it were.
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
