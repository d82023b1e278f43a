package tree

import (
	"fmt"
	"path"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/daxfs/daxfs-snapshotter/converter/layer"
	"github.com/daxfs/daxfs-snapshotter/daxfs"
)

const (
	maxPath = 4095 // bytes of a path, as in the kernel
	// maxWalked and maxFollowed are the limits of containerd and the kernel for symbolic links in a path.
	maxWalked   = 255
	maxFollowed = 40
)

// mkdir returns the directory at a clean path. It follows all symbolic links and makes missing directories.
func (m *Merger) mkdir(p string) (*daxfs.Node, error) {
	if p == "" {
		return m.root, nil
	}
	if m.lastDir != nil && p == m.lastPath {
		return m.lastDir, nil
	}
	dir, straight, err := m.descend(p)
	if err == nil && !straight {
		var resolved string
		if resolved, err = m.resolve(p); err != nil {
			return nil, err
		}
		if dir, straight, err = m.descend(resolved); err == nil && !straight {
			err = fmt.Errorf("%w: %q still has a symbolic link", layer.ErrInvalid, resolved)
		}
	}
	if err != nil {
		return nil, err
	}
	m.lastPath, m.lastDir = p, dir
	return dir, nil
}

// descend walks from the root to p and makes missing directories on the way. At a symbolic link it
// returns false and has made nothing.
func (m *Merger) descend(p string) (*daxfs.Node, bool, error) {
	dir := m.root
	for rest := p; rest != ""; {
		var name string
		name, rest, _ = strings.Cut(rest, "/")
		n := dir.Entries[name]
		if n == nil {
			if name == "" || name == "." || name == ".." {
				return nil, false, fmt.Errorf("%w: path %q is not clean", layer.ErrInvalid, p)
			}
			if err := checkName(name); err != nil {
				return nil, false, err
			}
			// No link can lie below a missing directory, so the directories made here are always needed.
			var err error
			if n, err = m.create(dir, name, unix.S_IFDIR); err != nil {
				return nil, false, err
			}
			chmod(n, 0o755)
			m.implied++
		}
		switch n.Mode & unix.S_IFMT {
		case unix.S_IFDIR:
			dir = n
		case unix.S_IFLNK:
			return nil, false, nil
		default:
			return nil, false, fmt.Errorf("parent %q: %w", name, ErrNotDir)
		}
	}
	return dir, true, nil
}

// lookup returns the inode at a path. It follows symbolic links in every element, including the last one.
func (m *Merger) lookup(p string) (*daxfs.Node, error) {
	if n := m.plain(p); n != nil && n.Mode&unix.S_IFMT != unix.S_IFLNK {
		return n, nil
	}
	resolved, err := m.resolve(p)
	if err != nil {
		return nil, err
	}
	n, err := m.lstat(resolved)
	if err == nil && n == nil {
		err = ErrNotExist
	}
	return n, err
}

// plain returns the inode at p, or nil if the path leads through a link or "..".
func (m *Merger) plain(p string) *daxfs.Node {
	n := m.root
	for p != "" && n != nil {
		var name string
		name, p, _ = strings.Cut(p, "/")
		n = n.Entries[name] // an inode other than a directory has no entries
	}
	return n
}

// linkTarget returns the inode that a hard link's target names. It does not follow the last element.
func (m *Merger) linkTarget(target string) (*daxfs.Node, error) {
	if len(target) > maxPath {
		return nil, fmt.Errorf("%w: more than %d bytes of a link target", layer.ErrLimit, maxPath)
	}
	if n := m.plain(strings.TrimPrefix(strings.TrimPrefix(target, "./"), "/")); n != nil &&
		!strings.HasSuffix(target, "/") {
		return n, nil
	}
	i := strings.LastIndexByte(target, '/') + 1
	dir, err := m.resolve(target[:i])
	if err != nil {
		return nil, err
	}
	n, err := m.lstat(path.Join("/", dir, target[i:])[1:])
	if err == nil && n == nil {
		err = ErrNotExist
	}
	return n, err
}

// resolve follows the symbolic links in every element of p within the root and returns a clean
// relative path without links. A missing element is not a link.
//
// It mirrors continuity's fs.RootPath, to get the same results where ".." meets links: each pass
// replaces links by their targets, joining names without looking, until a pass finds no link.
func (m *Merger) resolve(p string) (string, error) {
	walked := 0
	for {
		before := walked
		next, err := m.pass(p, &walked)
		if err != nil {
			return "", err
		}
		if walked == before {
			return strings.TrimPrefix(next, "/"), nil
		}
		p = next
	}
}

// pass walks p once. The result is absolute and clean if there is no link.
func (m *Merger) pass(p string, walked *int) (string, error) {
	at, first := "/", !strings.HasPrefix(p, "/")
	dir := m.root // inode at the path at; nil if unknown
	for rest := p; rest != ""; {
		var name string
		name, rest, _ = strings.Cut(rest, "/")
		if name == "" {
			continue
		}
		if *walked > maxWalked {
			return "", ErrTooManyLinks
		}
		candidate := path.Join("/", at, name)
		if len(candidate) > maxPath {
			return "", fmt.Errorf("%w: more than %d bytes of a path", layer.ErrLimit, maxPath)
		}
		if err := m.spend(1 + len(candidate)/64); err != nil {
			return "", err
		}
		var n *daxfs.Node
		if dir != nil && dir.Mode&unix.S_IFMT == unix.S_IFDIR && name != "." && name != ".." {
			if err := checkName(name); err != nil {
				return "", err
			}
			n = dir.Entries[name]
		} else {
			var err error
			if n, err = m.lstat(candidate[1:]); err != nil {
				return "", err
			}
		}
		switch {
		case n == nil || n.Mode&unix.S_IFMT != unix.S_IFLNK:
			at, dir = candidate, n
		case first || strings.HasPrefix(n.Target, "/"):
			at, dir = n.Target, nil
			*walked++
		default:
			at, dir = path.Join(at, n.Target), nil
			*walked++
		}
		first = false
	}
	return at, nil
}

// checkName refuses a name too long for the kernel. Package layer does not check those in link targets.
func checkName(name string) error {
	if len(name) > daxfs.MaxName {
		return fmt.Errorf("%w: more than %d bytes of a name", layer.ErrLimit, daxfs.MaxName)
	}
	return nil
}

// spend charges the budget of path resolution: a crafted layer can lead through very many links.
func (m *Merger) spend(steps int) error {
	if m.steps -= steps; m.steps < 0 {
		return fmt.Errorf("%w: too many symbolic links in the parents of entries", layer.ErrLimit)
	}
	return nil
}

// lstat returns the inode at a clean relative path like the kernel: it follows symbolic links before
// the last element. It returns nil for a missing name or a path that leaves the root.
func (m *Merger) lstat(p string) (*daxfs.Node, error) {
	var (
		dirs     = []*daxfs.Node{m.root} // the path walked so far
		followed = 0
	)
	for p != "" {
		if err := m.spend(1); err != nil {
			return nil, err
		}
		var name string
		name, p, _ = strings.Cut(p, "/")
		switch name {
		case "", ".":
			continue
		case "..":
			if len(dirs) == 1 {
				return nil, nil
			}
			dirs = dirs[:len(dirs)-1]
			continue
		}
		if err := checkName(name); err != nil {
			return nil, err
		}
		n := dirs[len(dirs)-1].Entries[name]
		if n == nil || p == "" {
			return n, nil
		}
		switch n.Mode & unix.S_IFMT {
		case unix.S_IFDIR:
			dirs = append(dirs, n)
		case unix.S_IFLNK:
			if followed++; followed > maxFollowed {
				return nil, ErrTooManyLinks
			}
			if strings.HasPrefix(n.Target, "/") {
				return nil, nil
			}
			p = n.Target + "/" + p
		default:
			return nil, ErrNotDir
		}
	}
	return dirs[len(dirs)-1], nil
}
