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

// pathFS gives a half its methods that take paths.
type pathFS struct{ h half }

// Open opens the file that path leads to. Symbolic links are followed inside of the image, as if its root were "/".
// A regular file is also an io.ReaderAt and io.Seeker, a directory an fs.ReadDirFile.
func (p pathFS) Open(path string) (fs.File, error) {
	in, err := p.resolve("open", path, true)
	if err != nil {
		return nil, err
	}
	return newFile(in, path), nil
}

// Stat describes what path leads to; symbolic links are followed.
func (p pathFS) Stat(path string) (fs.FileInfo, error) {
	in, err := p.resolve("stat", path, true)
	if err != nil {
		return nil, err
	}
	return newInfo(in, base(path)), nil
}

// Lstat is Stat that does not follow path if it is a symbolic link itself.
func (p pathFS) Lstat(path string) (fs.FileInfo, error) {
	in, err := p.resolve("lstat", path, false)
	if err != nil {
		return nil, err
	}
	return newInfo(in, base(path)), nil
}

// ReadLink returns the target of a symbolic link as it is stored.
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
	b := make([]byte, in.Size) // the contents lie in the image: its size bounds this
	if _, err := in.ReadAt(b, 0); err != nil {
		return nil, &fs.PathError{Op: "readfile", Path: path, Err: err}
	}
	return b, nil
}

// Lookup returns the inode that path leads to; if follow is false, path itself may be a symbolic link.
func (p pathFS) Lookup(path string, follow bool) (Inode, error) {
	return p.resolve("lookup", path, follow)
}

// maxLinks is how many symbolic links one path may lead through, as in Linux.
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
	stack := []Inode{root} // the directories that lead to the place, for ".."
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

// descend refuses a directory that is its own ancestor, or that says that its parent is another: a walk of a hostile
// image would never end.
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

// Walk calls fn for every entry below the root, parents before children, siblings in stored order (by name in the EROFS
// half), beginning with the root itself whose path is ".". If fn returns fs.SkipDir for a directory it is not entered;
// any other error ends the walk. A directory that is reached twice is an error, so that a walk ends whatever the image
// holds. Memory use is proportional to the number of directories.
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

// maxPath bounds paths that are walked, in bytes. Linux takes 4095 at a time; a tree that is deeper than this is there to
// exhaust the stack of whatever walks it.
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

// validPath is fs.ValidPath for names of any bytes.
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
