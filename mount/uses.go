package mount

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"strings"

	"github.com/daxfs/daxfs-snapshotter/mount/internal/sys"
)

// UsedBy describes the first use of a mounted image, besides its own mount, that is attached in some
// mount namespace: an overlay over it, a bind of it or of a directory in it, or a clone with mapped
// owners. It returns "" if there is none.
//
// It recognises binds by device and root directory, whatever their name. It recognises overlays by the
// names of their lower directories: the kernel shows nothing else. It misses an overlay whose lower
// has another name by now (as with mapped owners) and lazily unmounted mounts; other means must find
// those.
func (t *Table) UsedBy(ctx context.Context, key string) (string, error) {
	all, err := t.UsedByAll(ctx)
	return all[key], err
}

// UsedByAll is UsedBy for all mounted images at the cost of one. Images without a use are missing.
func (t *Table) UsedByAll(ctx context.Context) (map[string]string, error) {
	dirs := map[string]string{}
	for _, m := range t.List() {
		dirs[m.Dir] = m.Key
	}
	return usesOf(ctx, dirs)
}

// usesOf finds the uses of the mounts on dirs, by the names that dirs gives to them.
func usesOf(ctx context.Context, dirs map[string]string) (map[string]string, error) {
	mounts, err := sys.AllMounts(ctx)
	if err != nil {
		return nil, err
	}
	u := uses{found: map[string]string{}, trees: map[device]*slots{}, dirs: map[string][]seen{}}
	for _, m := range mounts {
		if name, ok := dirs[m.Mountpoint]; ok && m.Namespace.Own() {
			u.add(m, name)
		}
	}
	for _, m := range mounts {
		u.mount(m)
	}
	for _, m := range mounts {
		u.overlay(m)
	}
	return u.found, nil
}

// uses collects the uses of directories.
type uses struct {
	found map[string]string
	trees map[device]*slots
	// dirs are the mount points of the trees, in any namespace.
	dirs map[string][]seen
}

type device struct{ major, minor int }

// slots are the directories of one file system whose uses are wanted: some in its root, or all of it.
type slots struct {
	all    string            // name for uses of the root directory itself
	byName map[string]string // name for uses of each directory in the root
}

// seen is a mount of one of the trees.
type seen struct {
	tree *slots
	root string // directory of the file system that is the root of the mount
}

func (u *uses) add(m sys.NamespaceMount, name string) {
	dev := device{m.Major, m.Minor}
	s := u.trees[dev]
	if s == nil {
		s = &slots{byName: map[string]string{}}
		u.trees[dev] = s
	}
	if slot := first(m.Root); slot != "" {
		s.byName[slot] = name
	} else {
		s.all = name
	}
}

// first is the first directory of an absolute path.
func first(path string) string {
	slot, _, _ := strings.Cut(strings.TrimPrefix(path, "/"), "/")
	return slot
}

// of returns the names of everything that a mount with the given root directory uses.
func (s *slots) of(root string) []string {
	var names []string
	if s.all != "" {
		names = append(names, s.all)
	}
	if slot := first(root); slot != "" {
		if name := s.byName[slot]; name != "" {
			names = append(names, name)
		}
		return names
	}
	for _, name := range s.byName {
		names = append(names, name)
	}
	return names
}

// use records a use.
func (u *uses) use(names []string, m sys.NamespaceMount, what string) {
	for _, name := range names {
		if u.found[name] == "" {
			u.found[name] = fmt.Sprintf("%s on %q in %v", what, m.Mountpoint, m.Namespace)
		}
	}
}

// mount records a use if the mount shows one of the trees.
func (u *uses) mount(m sys.NamespaceMount) {
	tree := u.trees[device{m.Major, m.Minor}]
	if tree == nil {
		return
	}
	u.dirs[m.Mountpoint] = append(u.dirs[m.Mountpoint], seen{tree, m.Root})
	// Unmount and UnmountPool remove mounts of a table, and the copies in other namespaces.
	if !isCopy(m.Mountpoint) {
		u.use(tree.of(m.Root), m, "mount")
	}
}

// isCopy tells whether a mount point is one of a table: ".../images/<id>/mnt". The root of the table
// may have another name in another namespace. Nobody makes directories with such names by hand.
func isCopy(mountpoint string) bool {
	dir, base := filepath.Split(mountpoint)
	dir, id := filepath.Split(filepath.Clean(dir))
	kind := filepath.Base(dir)
	return base == "mnt" && len(id) == idLen && (kind == "images" || kind == "live")
}

// overlay records the uses by the lower directories of an overlay.
func (u *uses) overlay(m sys.NamespaceMount) {
	if m.FSType != "overlay" {
		return
	}
	for _, lower := range Lowers(m.VFSOptions) {
		for dir := lower; ; dir = filepath.Dir(dir) {
			for _, s := range u.dirs[dir] {
				u.use(s.tree.of(filepath.Join(s.root, strings.TrimPrefix(lower, dir))), m, "overlay")
			}
			if len(u.dirs[dir]) > 0 || dir == "/" || dir == "." {
				break
			}
		}
	}
}

// Lowers parses the options of an overlay: "lowerdir=/a:/b" or several "lowerdir+=/a".
func Lowers(options string) []string {
	var out []string
	for o := range strings.SplitSeq(options, ",") {
		key, value, _ := strings.Cut(o, "=")
		switch key {
		case "lowerdir":
			for _, dir := range splitColons(value) {
				out = append(out, filepath.Clean(dir))
			}
		case "lowerdir+", "datadir+":
			out = append(out, filepath.Clean(value))
		}
	}
	return out
}

// splitColons splits at colons without a backslash before them, and removes the backslashes.
func splitColons(s string) []string {
	var out []string
	var cur strings.Builder
	for i := 0; i < len(s); i++ {
		switch {
		case s[i] == '\\' && i+1 < len(s):
			i++
			cur.WriteByte(s[i])
		case s[i] == ':':
			out = append(out, cur.String())
			cur.Reset()
		default:
			cur.WriteByte(s[i])
		}
	}
	return append(out, cur.String())
}

// removeCopies unmounts copies of our mounts in other namespaces; suffix is the mount point below the
// root of the table. Copies that receive our unmounts are gone already. It fails with ErrBusy if one
// is used.
func (t *Table) removeCopies(ctx context.Context, suffix string) error {
	mounts, err := sys.OtherMounts(ctx)
	if err != nil {
		return err
	}
	var errs []error
	for _, m := range mounts {
		if strings.HasSuffix(m.Mountpoint, "/"+suffix) {
			errs = append(errs, sys.UnmountIn(m.Namespace, m.Mountpoint))
		}
	}
	return errors.Join(errs...)
}
