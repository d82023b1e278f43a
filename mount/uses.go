package mount

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"strings"

	"github.com/daxfs/daxfs-snapshotter/mount/internal/sys"
)

// UsedBy tells what was made of a mounted image besides its own mount, and is still attached in some mount namespace:
// an overlay over it, a bind of it or of a directory in it, a clone with mapped owners. It returns "" if there is
// nothing, and a description of the first otherwise.
//
// Binds are told by device and root directory, whatever their name. Overlays are told by the names of their lower
// directories, which is all that the kernel shows: an overlay over a lower that has another name by now, as one with
// mapped owners is, and what was lazily unmounted, must be found by other means.
func (t *Table) UsedBy(ctx context.Context, key string) (string, error) {
	all, err := t.UsedByAll(ctx)
	return all[key], err
}

// UsedByAll is UsedBy of all mounted images at the cost of one: keys without a use are missing.
func (t *Table) UsedByAll(ctx context.Context) (map[string]string, error) {
	dirs := map[string]string{}
	for _, m := range t.List() {
		dirs[m.Dir] = m.Key
	}
	return usesOf(ctx, dirs)
}

// usesOf finds the uses of what is mounted on dirs, by the name that each of them has.
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

// uses collects who uses which directory.
type uses struct {
	found map[string]string
	trees map[device]*slots
	// dirs are the directories on which a mount of one of the trees lies, in any namespace.
	dirs map[string][]seen
}

type device struct{ major, minor int }

// slots are the directories of one file system whose uses are looked for: some directories in its root, or all of it.
type slots struct {
	all    string            // name of the use of the root directory itself
	byName map[string]string // directory in the root to name of the use
}

// seen is what a mount shows.
type seen struct {
	tree *slots
	root string // the directory of the file system that is the root of the mount
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

// of returns the names of those who are used by a mount with the given root directory.
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

// use notes a use.
func (u *uses) use(names []string, m sys.NamespaceMount, what string) {
	for _, name := range names {
		if u.found[name] == "" {
			u.found[name] = fmt.Sprintf("%s on %q in %v", what, m.Mountpoint, m.Namespace)
		}
	}
}

// mount looks at the device and the root of a mount.
func (u *uses) mount(m sys.NamespaceMount) {
	tree := u.trees[device{m.Major, m.Minor}]
	if tree == nil {
		return
	}
	u.dirs[m.Mountpoint] = append(u.dirs[m.Mountpoint], seen{tree, m.Root})
	// Mounts of a table, and the copies of them that other namespaces got, end with Unmount and UnmountPool.
	if !isCopy(m.Mountpoint) {
		u.use(tree.of(m.Root), m, "mount")
	}
}

// isCopy tells whether a mount point is one of a table: ".../images/<id>/mnt". The root of the table may have another
// name in another namespace. Nobody makes a directory of such a name by hand.
func isCopy(mountpoint string) bool {
	dir, base := filepath.Split(mountpoint)
	dir, id := filepath.Split(filepath.Clean(dir))
	kind := filepath.Base(dir)
	return base == "mnt" && len(id) == idLen && (kind == "images" || kind == "live")
}

// overlay looks at the lower directories of an overlay.
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

// Lowers returns the lower directories of the options of an overlay: "lowerdir=/a:/b" or several "lowerdir+=/a".
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

// splitColons splits at colons that have no backslash before them, and removes the backslashes.
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

// removeCopies unmounts the mounts that other namespaces copied from us: suffix is the mount point below the root of
// the table. Those that follow our mounts have gone with them. It fails with ErrBusy if one is used.
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
