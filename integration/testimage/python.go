package testimage

import (
	"debug/elf"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"

	v1 "github.com/google/go-containerregistry/pkg/v1"
)

// pythonPath is the distribution's interpreter, which may not be the first on the path.
const pythonPath = "/usr/bin/python3"

// Python is an image with this machine's Python in a layer above busybox, and an application above
// that: a dynamic program with libraries, thousands of files, and something to run. The application
// depends on app; the layers below are the same in all images, so two of them share their files.
func Python(app string) (v1.Image, error) {
	interpreter, err := PythonLayer()
	if err != nil {
		return nil, err
	}
	script := fmt.Sprintf("import json, sys\nprint(json.dumps({'app': %q, 'prefix': sys.prefix}))\n", app)
	return onBusybox(interpreter, []Entry{Dir("app", 0o755), File("app/main.py", 0o644, []byte(script))})
}

// PythonLayer contains the interpreter, its libraries and its standard library.
func PythonLayer() ([]Entry, error) {
	real, err := filepath.EvalSymlinks(pythonPath)
	if err != nil {
		return nil, fmt.Errorf("no Python (Debian: python3): %w", err)
	}
	l := fromHost{seen: map[string]bool{}}
	if err := l.program(real); err != nil {
		return nil, err
	}
	if real != pythonPath {
		l.entries = append(l.entries, Symlink(strings.TrimPrefix(pythonPath, "/"), filepath.Base(real)))
	}
	if err := l.tree("/usr/lib/" + filepath.Base(real)); err != nil {
		return nil, err
	}
	return l.entries, nil
}

// Programs contains dynamic programs of this machine under their own paths, and their libraries.
func Programs(paths ...string) ([]Entry, error) {
	l := fromHost{seen: map[string]bool{}}
	for _, p := range paths {
		if err := l.program(p); err != nil {
			return nil, err
		}
	}
	return l.entries, nil
}

// fromHost collects files of this machine under their own names.
type fromHost struct {
	entries []Entry
	seen    map[string]bool
}

// program adds a program or library, then its libraries.
func (l *fromHost) program(path string) error {
	if l.seen[path] {
		return nil
	}
	if err := l.file(path); err != nil {
		return err
	}
	f, err := elf.Open(path)
	if err != nil {
		return fmt.Errorf("read the libraries of %q: %w", path, err)
	}
	defer f.Close()
	for _, s := range f.Progs {
		if s.Type != elf.PT_INTERP {
			continue
		}
		name := make([]byte, s.Filesz-1) // ends with a NUL
		if _, err := s.ReadAt(name, 0); err != nil {
			return fmt.Errorf("read the loader of %q: %w", path, err)
		}
		if err := l.program(string(name)); err != nil {
			return err
		}
	}
	libs, err := f.ImportedLibraries()
	if err != nil {
		return fmt.Errorf("read the libraries of %q: %w", path, err)
	}
	for _, lib := range libs {
		where, err := findLibrary(lib)
		if err != nil {
			return fmt.Errorf("%q: %w", path, err)
		}
		if err := l.program(where); err != nil {
			return err
		}
	}
	return nil
}

// findLibrary searches the library directories of Debian and similar systems, that of the architecture first.
func findLibrary(name string) (string, error) {
	for _, pattern := range []string{
		"/lib/*-linux-gnu/", "/usr/lib/*-linux-gnu/", "/lib64/", "/usr/lib64/",
		"/lib/", "/usr/lib/",
	} {
		found, err := filepath.Glob(pattern + name)
		if err == nil && len(found) > 0 {
			return found[0], nil
		}
	}
	return "", fmt.Errorf("library %q is not on this machine", name)
}

// file adds a regular file, following symbolic links, and the directories above it.
func (l *fromHost) file(path string) error {
	l.seen[path] = true
	info, err := os.Stat(path)
	if err != nil {
		return err
	}
	body, err := os.ReadFile(path)
	if err != nil {
		return err
	}
	l.parents(path)
	l.entries = append(l.entries,
		File(strings.TrimPrefix(path, "/"), int64(info.Mode().Perm()), body).At(info.ModTime()))
	return nil
}

func (l *fromHost) parents(path string) {
	var dirs []string
	for d := filepath.Dir(path); d != "/" && !l.seen[d]; d = filepath.Dir(d) {
		dirs = append(dirs, d)
	}
	slices.Reverse(dirs)
	for _, d := range dirs {
		l.seen[d] = true
		l.entries = append(l.entries, Dir(strings.TrimPrefix(d, "/"), 0o755))
	}
}

// tree adds a directory with everything in it, except compiled files, which Python may write meanwhile.
func (l *fromHost) tree(root string) error {
	return filepath.WalkDir(root, func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		switch {
		case d.IsDir() && d.Name() == "__pycache__":
			return fs.SkipDir
		case d.IsDir():
			l.parents(filepath.Join(path, "x"))
		case d.Type() == fs.ModeSymlink:
			target, err := os.Readlink(path)
			if err != nil {
				return err
			}
			l.parents(path)
			l.entries = append(l.entries, Symlink(strings.TrimPrefix(path, "/"), target))
		case d.Type().IsRegular():
			if err := l.file(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
				return err
			}
		}
		return nil
	})
}
