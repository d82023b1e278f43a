package main

import (
	"fmt"
	"io"
	"os"
	"strconv"
	"strings"

	"github.com/daxfs/daxfs-snapshotter/daxfs"
)

// image is an image file, or a block device that holds one, that is open for reading.
type image struct {
	*os.File
	size int64
}

func openImage(name string) (*image, error) {
	f, err := os.Open(name)
	if err != nil {
		return nil, err
	}
	size, err := f.Seek(0, io.SeekEnd) // also that of a device
	if err != nil {
		f.Close()
		return nil, err
	}
	return &image{f, size}, nil
}

// fs opens the EROFS half, which holds everything.
func (i *image) fs() (*daxfs.FS, error) {
	f, err := daxfs.Open(i, i.size)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", i.Name(), err)
	}
	return f, nil
}

// inside is a path of the user as the reader of an image takes it.
func inside(path string) string {
	if path = strings.Trim(path, "/"); path == "" {
		return "."
	}
	return path
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
