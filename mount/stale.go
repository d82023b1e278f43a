package mount

import (
	"context"
	"errors"
	"io/fs"
	"os"
	"path/filepath"

	"github.com/daxfs/daxfs-snapshotter/mount/internal/sys"
)

// Stale is a directory of the table that belongs to another pool, an earlier epoch, or version 1 of
// the program, which mounted each image separately.
type Stale struct {
	// Dir is the mount point.
	Dir string
	// Key and Driver come from the record; both may be empty.
	Key, Driver string
	// Version is the version of the record, 0 if it cannot be read.
	Version int
	// Pool is the UUID of the pool or epoch, in hexadecimal; empty for a record of version 1.
	Pool string
	// Source is the source of the mount according to the kernel; empty if nothing is mounted.
	Source string
	// UsedBy describes a use, as the method UsedBy does; empty if no mount table shows one.
	UsedBy string

	live bool // a mount of a whole pool, not of an image
}

// Stale returns the directories that belong to other pools. Containers may run from them: they stay until RemoveStale.
func (t *Table) Stale(ctx context.Context) ([]Stale, error) {
	var out []Stale
	for _, kind := range []string{"images", "live"} {
		des, err := os.ReadDir(filepath.Join(t.root, kind))
		if err != nil {
			return nil, err
		}
		for _, de := range des {
			if s, ok := t.stale(kind, de.Name()); ok {
				out = append(out, s)
			}
		}
	}
	dirs := map[string]string{}
	for _, s := range out {
		dirs[s.Dir] = s.Dir
	}
	if len(dirs) == 0 {
		return nil, nil
	}
	used, err := usesOf(ctx, dirs)
	if err != nil {
		return nil, err
	}
	for i := range out {
		out[i].UsedBy = used[out[i].Dir]
	}
	return out, nil
}

// stale looks at one directory.
func (t *Table) stale(kind, name string) (Stale, bool) {
	dir := filepath.Join(t.root, kind, name)
	s := Stale{Dir: mountDir(dir), live: kind == "live"}
	record := recordName
	if s.live {
		record = poolRecordName
	}
	var rec struct { // fields of all versions
		Format int    `json:"version"`
		Driver string `json:"driver"`
		Key    string `json:"key"`
		Pool   string `json:"pool"`
		UUID   string `json:"uuid"`
	}
	err := readRecord(dir, record, &rec)
	if errors.Is(err, fs.ErrNotExist) {
		return Stale{}, false // not made by us
	}
	if err == nil {
		s.Key, s.Driver, s.Version, s.Pool = rec.Key, rec.Driver, rec.Format, rec.Pool
		if s.live {
			s.Pool = rec.UUID
		}
	}
	if s.Version == recordVersion && s.Pool == t.pool.uuid() {
		return Stale{}, false
	}
	if m, _, err := sys.Top(s.Dir); err == nil && m != nil {
		s.Source = m.Source
	}
	return s, true
}

// RemoveStale unmounts and removes the stale directories that nothing uses, and returns the others.
// Directories for which keep returns true stay, because a snapshot may still name them as its lower.
// Unmounting never harms running containers: an overlay keeps its lower.
func (t *Table) RemoveStale(ctx context.Context, keep func(dir string) bool) ([]Stale, error) {
	all, err := t.Stale(ctx)
	if err != nil {
		return nil, err
	}
	var left []Stale
	var errs []error
	pools := map[string]bool{} // pools with images that stay
	for _, s := range all {    // images come before pools
		if s.UsedBy != "" || !s.live && keep(s.Dir) || s.live && pools[s.Pool] {
			left = append(left, s)
			pools[s.Pool] = true
			continue
		}
		if err := t.removeStale(ctx, s); err != nil {
			if !errors.Is(err, ErrBusy) {
				errs = append(errs, err)
			}
			s.UsedBy = err.Error()
			left = append(left, s)
			pools[s.Pool] = true
		}
	}
	return left, errors.Join(errs...)
}

func (t *Table) removeStale(ctx context.Context, s Stale) error {
	dir := filepath.Dir(s.Dir)
	// Loop and device-mapper devices of version 1 disappear with their last user.
	if err := sys.Unmount(ctx, s.Dir); err != nil {
		return err
	}
	kind := filepath.Base(filepath.Dir(dir))
	if err := t.removeCopies(ctx, filepath.Join(kind, filepath.Base(dir), "mnt")); err != nil {
		return err
	}
	removeDir(dir)
	return nil
}
