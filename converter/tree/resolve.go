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
	maxPath = 4095 // bytes of a path, as the kernel has it
	// maxWalked and maxFollowed are the numbers of symbolic links that containerd and the kernel follow in one path.
	maxWalked   = 255
	maxFollowed = 40
)

// mkdir returns the directory that a clean path names, following symbolic links in every element, and makes what is
// missing of it.
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

// descend walks from the root to p and makes missing directories on the way. At a symbolic link it gives up: the
// second result is false, and nothing was made.
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
			// Nothing below can be a link, so nothing is made in vain.
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

// lookup returns what a path names, following symbolic links in every element, the last one included.
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

// plain returns what p names if there is nothing to follow, neither links nor "..", on the way; else nil.
func (m *Merger) plain(p string) *daxfs.Node {
	n := m.root
	for p != "" && n != nil {
		var name string
		name, p, _ = strings.Cut(p, "/")
		n = n.Entries[name] // what is no directory has none
	}
	return n
}

// linkTarget returns the inode that the target of a hard link names: the last element is not followed.
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

// resolve follows the symbolic links in every element of p within the root and returns a clean relative path without
// any. What does not exist is no symbolic link.
//
// It goes the way of continuity's fs.RootPath, and so comes to the same end where ".." meets links: each pass replaces
// links by their targets, joining names without looking, until a pass finds none.
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

// pass walks p once. The result is absolute and clean if it met no link.
func (m *Merger) pass(p string, walked *int) (string, error) {
	at, first := "/", !strings.HasPrefix(p, "/")
	dir := m.root // what at names, nil if not known
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

// checkName refuses a name that the kernel does not look up. Package layer checked those of entries, but not those in the
// targets of links.
func checkName(name string) error {
	if len(name) > daxfs.MaxName {
		return fmt.Errorf("%w: more than %d bytes of a name", layer.ErrLimit, daxfs.MaxName)
	}
	return nil
}

// spend holds resolution against what it may cost: layers can be made to lead through very many links.
func (m *Merger) spend(steps int) error {
	if m.steps -= steps; m.steps < 0 {
		return fmt.Errorf("%w: too many symbolic links in the parents of entries", layer.ErrLimit)
	}
	return nil
}

// lstat returns what a clean relative path names, as the kernel finds it: symbolic links before the last element are
// followed. It returns nil if there is nothing, or if the way leads out of the root.
func (m *Merger) lstat(p string) (*daxfs.Node, error) {
	var (
		dirs     = []*daxfs.Node{m.root} // the way to where we are
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
