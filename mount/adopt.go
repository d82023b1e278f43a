package mount

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"

	"github.com/daxfs/daxfs-snapshotter/mount/internal/sys"
)

// adopt fills an empty table from the mounts below root.
func (t *Table) adopt(ctx context.Context) error {
	if err := t.adoptPool(ctx); err != nil {
		// The mount is no longer used; it is detached before the pool is mounted anew.
		t.opts.Warn("pool directory %q: %v", t.liveDir(), err)
	}
	dirs, err := os.ReadDir(filepath.Join(t.root, "images"))
	if err != nil {
		return err
	}
	for _, de := range dirs {
		if err := ctx.Err(); err != nil {
			return err
		}
		dir := filepath.Join(t.root, "images", de.Name())
		if err := t.adoptImage(ctx, dir); err != nil {
			// One bad image must not stop the others, or the daemon.
			t.opts.Warn("image directory %q: %v", dir, err)
		}
	}
	return nil
}

func (t *Table) adoptPool(ctx context.Context) error {
	dir := t.liveDir()
	var rec poolRecord
	switch err := readRecord(dir, poolRecordName, &rec); {
	case errors.Is(err, fs.ErrNotExist):
		return nil
	case err != nil:
		return err
	case rec.Format != recordVersion || rec.UUID != t.pool.uuid():
		return fmt.Errorf("the record is of version %d and pool %s, expected %d and %s",
			rec.Format, rec.UUID, recordVersion, t.pool.uuid())
	}
	mnt := mountDir(dir)
	if _, mounted, err := sys.MountRoot(mnt); err != nil {
		return err
	} else if !mounted {
		if l := t.recoverPool(ctx); l != nil {
			t.live = l
		}
		return nil
	}
	d := t.byName(rec.Driver)
	if d == nil {
		return fmt.Errorf("mounted with driver %q, which this program does not have", rec.Driver)
	}
	if now := fileID(t.pool.Region); now != rec.File {
		return fmt.Errorf("%s was %q when it was mounted and is %q now", t.pool.source(), rec.File, now)
	}
	if err := d.Match(ctx, rec.source(), mnt); err != nil {
		// The pool file may have been renamed meanwhile.
		if d.Match(ctx, t.pool.source(), mnt) != nil {
			return err
		}
	}
	l, err := newLive(d, mnt, rec)
	if err != nil {
		return err
	}
	t.live = l
	return nil
}

// adoptImage takes over the mount in an image directory, if it belongs to this pool.
func (t *Table) adoptImage(ctx context.Context, dir string) error {
	var rec imageRecord
	err := readRecord(dir, recordName, &rec)
	if errors.Is(err, fs.ErrNotExist) {
		// No record, no mount of ours: a crash between creating the directory and writing the record.
		return removeEmpty(dir)
	}
	if err != nil || rec.Format != recordVersion || rec.Pool != t.pool.uuid() {
		return nil // of another pool: see Stale
	}
	if t.imageDir(rec.Key) != dir {
		return fmt.Errorf("the record is that of image %q, whose directory is %q", rec.Key, t.imageDir(rec.Key))
	}
	img, err := rec.image()
	if err != nil {
		return err
	}
	mnt := mountDir(dir)
	if _, mounted, err := sys.MountRoot(mnt); err == nil && !mounted {
		removeDir(dir)
		return nil
	}
	e := &entry{work: make(chan struct{}, 1), dir: dir, driver: t.byName(rec.Driver), windowed: rec.Windowed, img: img}
	if !rec.Windowed && t.live != nil {
		e.driver = t.live.driver
	}
	if e.driver == nil {
		err = fmt.Errorf("mounted with driver %q, which this program does not have", rec.Driver)
	} else {
		err = t.match(ctx, e, rec.Windowed, img)
	}
	if err != nil {
		// Running containers keep the old mount. The directory is free for a new one.
		t.opts.Warn("image %q: the mount on %q is not used any more: %v", rec.Key, mnt, err)
		if err := sys.Detach(mnt); err != nil {
			return err
		}
		removeDir(dir)
		return nil
	}
	t.entries[rec.Key] = e
	return nil
}

// known returns all drivers whose mounts may exist. The first with a name counts.
func (t *Table) known() []Driver { return slices.Concat(t.drivers, t.opts.Adopt) }

func (t *Table) byName(name string) Driver {
	for _, d := range t.known() {
		if d.Name() == name {
			return d
		}
	}
	return nil
}
