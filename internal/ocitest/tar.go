package ocitest

import (
	"archive/tar"
	"bytes"
	"io/fs"
	"os"
	"path/filepath"
	"syscall"
	"testing"
	"time"
)

// TarTree packs directories of this machine, given as paths below /, until the tar holds max bytes. It
// takes only regular files, directories and symbolic links, and keeps hard links.
func TarTree(tb testing.TB, max int64, dirs ...string) []byte {
	tb.Helper()
	var out bytes.Buffer
	w := tar.NewWriter(&out)
	inodes := map[uint64]string{}
	for _, dir := range dirs {
		err := filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
			if err != nil {
				return nil // the machine's files change; whatever is readable serves
			}
			fi, err := d.Info()
			if err != nil {
				return nil
			}
			if int64(out.Len())+fi.Size() > max {
				return fs.SkipAll
			}
			return addFile(w, path, fi, inodes)
		})
		if err != nil {
			tb.Fatal(err)
		}
	}
	if err := w.Close(); err != nil {
		tb.Fatal(err)
	}
	return out.Bytes()
}

func addFile(w *tar.Writer, path string, fi fs.FileInfo, inodes map[uint64]string) error {
	target := ""
	switch fi.Mode().Type() {
	case 0, fs.ModeDir:
	case fs.ModeSymlink:
		t, err := os.Readlink(path)
		if err != nil {
			return nil
		}
		target = t
	default:
		return nil
	}
	h, err := tar.FileInfoHeader(fi, target)
	if err != nil {
		return err
	}
	h.Name = path[1:]
	h.AccessTime, h.ChangeTime = time.Time{}, time.Time{}
	h.Format = tar.FormatPAX
	if !fi.Mode().IsRegular() {
		return w.WriteHeader(h)
	}
	if st := fi.Sys().(*syscall.Stat_t); st.Nlink > 1 {
		if first, ok := inodes[st.Ino]; ok {
			h.Typeflag, h.Linkname, h.Size = tar.TypeLink, first, 0
			return w.WriteHeader(h)
		}
		inodes[st.Ino] = h.Name
	}
	b, err := os.ReadFile(path)
	if err != nil {
		return nil
	}
	h.Size = int64(len(b))
	if err := w.WriteHeader(h); err != nil {
		return err
	}
	_, err = w.Write(b)
	return err
}
