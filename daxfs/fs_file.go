package daxfs

import (
	"fmt"
	"io"
	"io/fs"
	"time"

	"golang.org/x/sys/unix"
)

func newFile(in Inode, path string) fs.File {
	if in.IsDir() {
		return &dirFile{in: in, path: path}
	}
	return &file{in: in, path: path, SectionReader: io.NewSectionReader(contents{in}, 0, in.Size)}
}

// contents reads any inode; file.Read refuses all but regular files.
type contents struct{ in Inode }

func (c contents) ReadAt(p []byte, off int64) (int, error) { return c.in.ReadAt(p, off) }

type file struct {
	in   Inode
	path string
	*io.SectionReader
}

func (f *file) Stat() (fs.FileInfo, error) { return newInfo(f.in, base(f.path)), nil }
func (f *file) Close() error               { return nil }

func (f *file) Read(p []byte) (int, error) {
	if !f.in.IsRegular() {
		return 0, &fs.PathError{Op: "read", Path: f.path, Err: notRegular(&f.in)}
	}
	return f.SectionReader.Read(p)
}

type dirFile struct {
	in     Inode
	path   string
	cursor int64
	// dirs are the directories listed so far: one with two names could make the walk of a hostile image endless.
	dirs map[uint64]struct{}
}

func (d *dirFile) Stat() (fs.FileInfo, error) { return newInfo(d.in, base(d.path)), nil }
func (d *dirFile) Close() error               { return nil }

func (d *dirFile) Read([]byte) (int, error) {
	return 0, &fs.PathError{Op: "read", Path: d.path, Err: unix.EISDIR}
}

// ReadDir implements fs.ReadDirFile, in stored order.
func (d *dirFile) ReadDir(n int) ([]fs.DirEntry, error) {
	list := []fs.DirEntry{}
	var bad error
	err := d.in.Entries(d.cursor, func(e Dirent) bool {
		if e.Type == unix.S_IFDIR {
			if _, ok := d.dirs[e.Nid]; ok {
				bad = corrupt(d.in.rule(RuleDirLoop, RuleV8DirLoop), -1, e.Nid,
					"directory has a second name %q", e.Name)
				return false
			}
			if d.dirs == nil {
				d.dirs = make(map[uint64]struct{})
			}
			d.dirs[e.Nid] = struct{}{}
		}
		d.cursor = e.Next
		list = append(list, dirEntry{d.in.h, e})
		return n <= 0 || len(list) < n
	})
	if err == nil {
		err = bad
	}
	if err != nil {
		return list, &fs.PathError{Op: "readdir", Path: d.path, Err: err}
	}
	if n > 0 && len(list) == 0 {
		return nil, io.EOF
	}
	return list, nil
}

// dirEntry reads the inode only in Info.
type dirEntry struct {
	h half
	e Dirent
}

func (e dirEntry) Name() string      { return e.e.Name }
func (e dirEntry) IsDir() bool       { return e.e.Type == unix.S_IFDIR }
func (e dirEntry) Type() fs.FileMode { return fileMode(e.e.Type).Type() }
func (e dirEntry) String() string    { return fs.FormatDirEntry(e) }

func (e dirEntry) Info() (fs.FileInfo, error) {
	in, err := e.h.inode(e.e.Nid)
	if err != nil {
		return nil, err
	}
	if in.Mode&unix.S_IFMT != e.e.Type {
		return nil,
			in.bad(in.rule(RuleDirType, RuleV8DirType), "mode is %#o, the entry %q has %#o", in.Mode,
				e.e.Name, e.e.Type)
	}
	return newInfo(in, e.e.Name), nil
}

// info is an fs.FileInfo whose Sys returns a *Stat.
type info struct {
	name string
	st   Stat
}

func newInfo(in Inode, name string) fs.FileInfo { return &info{name, in.Stat} }

func (i *info) Name() string       { return i.name }
func (i *info) Size() int64        { return i.st.Size }
func (i *info) Mode() fs.FileMode  { return fileMode(i.st.Mode) }
func (i *info) ModTime() time.Time { return time.Unix(i.st.Mtime.Sec, int64(i.st.Mtime.Nsec)) }
func (i *info) IsDir() bool        { return i.st.Mode&unix.S_IFMT == unix.S_IFDIR }
func (i *info) Sys() any           { return &i.st }
func (i *info) String() string     { return fs.FormatFileInfo(i) }

// fileMode converts a mode of stat(2) to a mode of Go.
func fileMode(mode uint32) fs.FileMode {
	m := fs.FileMode(mode & 0o777)
	switch mode & unix.S_IFMT {
	case unix.S_IFREG:
	case unix.S_IFDIR:
		m |= fs.ModeDir
	case unix.S_IFLNK:
		m |= fs.ModeSymlink
	case unix.S_IFCHR:
		m |= fs.ModeDevice | fs.ModeCharDevice
	case unix.S_IFBLK:
		m |= fs.ModeDevice
	case unix.S_IFIFO:
		m |= fs.ModeNamedPipe
	case unix.S_IFSOCK:
		m |= fs.ModeSocket
	default:
		m |= fs.ModeIrregular
	}
	if mode&unix.S_ISUID != 0 {
		m |= fs.ModeSetuid
	}
	if mode&unix.S_ISGID != 0 {
		m |= fs.ModeSetgid
	}
	if mode&unix.S_ISVTX != 0 {
		m |= fs.ModeSticky
	}
	return m
}

func notRegular(in *Inode) error {
	if in.IsDir() {
		return unix.EISDIR
	}
	return fmt.Errorf("mode is %#o, not a regular file: %w", in.Mode, unix.EINVAL)
}
