package daxfs

import (
	"errors"
	"io/fs"
	"slices"
	"strings"

	"golang.org/x/sys/unix"
)

var (
	_ fs.ReadDirFS  = (*FS)(nil)
	_ fs.StatFS     = (*FS)(nil)
	_ fs.ReadLinkFS = (*FS)(nil)
	_ fs.ReadFileFS = (*FS)(nil)
	_ fs.ReadLinkFS = (*DAXFS)(nil)
)

// pathFS adds the methods that take paths to a half.
type pathFS struct{ h half }

// Open opens the file at path. It follows symbolic links inside the image, as if its root were "/". A
// regular file is also an io.ReaderAt and io.Seeker, a directory an fs.ReadDirFile.
func (p pathFS) Open(path string) (fs.File, error) {
	in, err := p.resolve("open", path, true)
	if err != nil {
		return nil, err
	}
	return newFile(in, path), nil
}

// Stat describes the file at path and follows symbolic links.
func (p pathFS) Stat(path string) (fs.FileInfo, error) {
	in, err := p.resolve("stat", path, true)
	if err != nil {
		return nil, err
	}
	return newInfo(in, base(path)), nil
}

// Lstat is Stat, except that it does not follow a symbolic link at path itself.
func (p pathFS) Lstat(path string) (fs.FileInfo, error) {
	in, err := p.resolve("lstat", path, false)
	if err != nil {
		return nil, err
	}
	return newInfo(in, base(path)), nil
}

// ReadLink returns the target of a symbolic link as stored.
func (p pathFS) ReadLink(path string) (string, error) {
	in, err := p.resolve("readlink", path, false)
	if err != nil {
		return "", err
	}
	target, err := in.Target()
	if err != nil {
		return "", &fs.PathError{Op: "readlink", Path: path, Err: err}
	}
	return target, nil
}

// ReadDir lists a directory, sorted by name.
func (p pathFS) ReadDir(path string) ([]fs.DirEntry, error) {
	in, err := p.resolve("readdir", path, true)
	if err != nil {
		return nil, err
	}
	d := &dirFile{in: in, path: path}
	list, err := d.ReadDir(-1)
	if !slices.IsSortedFunc(list, byName) {
		slices.SortFunc(list, byName)
	}
	return list, err
}

func byName(a, b fs.DirEntry) int { return strings.Compare(a.Name(), b.Name()) }

// ReadFile returns the contents of a regular file.
func (p pathFS) ReadFile(path string) ([]byte, error) {
	in, err := p.resolve("readfile", path, true)
	if err != nil {
		return nil, err
	}
	if !in.IsRegular() {
		return nil, &fs.PathError{Op: "readfile", Path: path, Err: notRegular(&in)}
	}
	if int64(int(in.Size)) != in.Size { // on a 32-bit machine
		return nil, &fs.PathError{Op: "readfile", Path: path, Err: unix.EFBIG}
	}
	b := make([]byte, in.Size) // in.Size is at most the size of the image
	if _, err := in.ReadAt(b, 0); err != nil {
		return nil, &fs.PathError{Op: "readfile", Path: path, Err: err}
	}
	return b, nil
}

// Lookup returns the inode at path. It follows a symbolic link at path itself only if follow is true.
func (p pathFS) Lookup(path string, follow bool) (Inode, error) {
	return p.resolve("lookup", path, follow)
}

// maxLinks is the maximum number of symbolic links in the resolution of one path, as in Linux.
const maxLinks = 40

func (p pathFS) resolve(op, path string, follow bool) (Inode, error) {
	in, err := p.walk(path, follow)
	if err != nil {
		return Inode{}, &fs.PathError{Op: op, Path: path, Err: err}
	}
	return in, nil
}

func (p pathFS) walk(path string, follow bool) (Inode, error) {
	if !validPath(path) || len(path) > maxPath {
		return Inode{}, fs.ErrInvalid
	}
	root, err := p.h.inode(p.h.root())
	if err != nil || path == "." {
		return root, err
	}
	stack := []Inode{root} // the open directories from the root, for ".."
	rest := strings.Split(path, "/")
	for links := 0; len(rest) > 0; {
		name := rest[0]
		rest = rest[1:]
		dir := stack[len(stack)-1]
		switch name {
		case "", ".":
			continue
		case "..":
			stack = stack[:max(1, len(stack)-1)]
			continue
		}
		nid, err := dir.Lookup(name)
		if err != nil {
			return Inode{}, err
		}
		in, err := p.h.inode(nid)
		if err != nil {
			return Inode{}, err
		}
		switch {
		case in.IsSymlink() && (follow || len(rest) > 0):
			if links++; links > maxLinks {
				return Inode{}, unix.ELOOP
			}
			target, err := in.Target()
			if err != nil {
				return Inode{}, err
			}
			if target[0] == '/' {
				stack = stack[:1]
			}
			rest = append(strings.Split(target, "/"), rest...)
		case in.IsDir():
			if err := p.descend(stack, &in); err != nil {
				return Inode{}, err
			}
			stack = append(stack, in)
		case len(rest) > 0:
			return Inode{}, unix.ENOTDIR
		default:
			return in, nil
		}
	}
	return stack[len(stack)-1], nil
}

// descend refuses a directory that is its own ancestor or whose ".." names another parent: a walk of
// such a hostile image would never end.
func (p pathFS) descend(stack []Inode, in *Inode) error {
	for i := range stack {
		if stack[i].Nid == in.Nid {
			return in.bad(in.rule(RuleDirLoop, RuleV8DirLoop), "directory is its own ancestor")
		}
	}
	up, known, err := p.h.parent(in)
	if errors.Is(err, fs.ErrNotExist) {
		return in.bad(RuleDots, "directory has no entry %q", "..")
	}
	if err != nil {
		return err
	}
	if dir := stack[len(stack)-1].Nid; known && up != dir {
		return in.bad(RuleDots, "entry %q leads to inode %d, expected %d", "..", up, dir)
	}
	return nil
}

// Walk calls fn for the root, whose path is ".", and every entry below it: parents before children,
// siblings in stored order (by name in the EROFS half). If fn returns fs.SkipDir for a directory, Walk
// does not enter it; any other error ends the walk. A directory with two paths is an error, so a walk
// always ends. Memory use is proportional to the number of directories.
func (p pathFS) Walk(fn func(path string, in Inode) error) error {
	root, err := p.h.inode(p.h.root())
	if err != nil {
		return err
	}
	if err := fn(".", root); err != nil {
		if errors.Is(err, fs.SkipDir) {
			return nil
		}
		return err
	}
	w := treeWalk{p.h, fn, map[uint64]struct{}{root.Nid: {}}}
	return w.dir("", root)
}

type treeWalk struct {
	h    half
	fn   func(string, Inode) error
	seen map[uint64]struct{}
}

// maxPath bounds the paths of a walk, in bytes. Linux accepts 4095 at a time; a deeper tree than this
// can only be meant to exhaust the stack of its reader.
const maxPath = 1<<16 - 1

func (w *treeWalk) dir(prefix string, dir Inode) error {
	if len(prefix) > maxPath {
		return dir.bad(dir.rule(RuleDirDepth, RuleV8DirDepth), "path of %d bytes, expected at most %d",
			len(prefix), maxPath)
	}
	var bad error
	err := dir.Entries(0, func(e Dirent) bool {
		bad = w.entry(prefix+e.Name, e)
		return bad == nil
	})
	if err != nil {
		return err
	}
	return bad
}

func (w *treeWalk) entry(path string, e Dirent) error {
	in, err := w.h.inode(e.Nid)
	if err != nil {
		return &fs.PathError{Op: "walk", Path: path, Err: err}
	}
	if in.IsDir() {
		if _, ok := w.seen[in.Nid]; ok {
			return &fs.PathError{
				Op: "walk", Path: path,
				Err: in.bad(in.rule(RuleDirLoop, RuleV8DirLoop), "directory has a second name"),
			}
		}
		w.seen[in.Nid] = struct{}{}
	}
	err = w.fn(path, in)
	switch {
	case errors.Is(err, fs.SkipDir) && in.IsDir():
		return nil
	case err != nil || !in.IsDir():
		return err
	}
	return w.dir(path+"/", in)
}

// validPath is fs.ValidPath without its demand for UTF-8.
func validPath(path string) bool {
	if path == "." {
		return true
	}
	for name := range strings.SplitSeq(path, "/") {
		if name == "" || name == "." || name == ".." {
			return false
		}
	}
	return true
}

func base(path string) string { return path[strings.LastIndexByte(path, '/')+1:] }
