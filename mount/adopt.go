package mount

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"

	"github.com/google/renameio/v2"
	"golang.org/x/sys/unix"

	"github.com/daxfs/daxfs-snapshotter/mount/internal/sys"
	"github.com/daxfs/daxfs-snapshotter/pool/region"
)

const (
	recordName    = "image.json"
	recordVersion = 1
)

// record is <root>/images/<id>/image.json: what is mounted beside it, or was about to be (Driver empty). It has its own
// fields, and not those of other packages, because another version of the program reads it.
type record struct {
	Format      int    `json:"version"`
	Driver      string `json:"driver"`
	Key         string `json:"key"`
	Kind        string `json:"kind"`
	Path        string `json:"path,omitempty"`
	BlockDevice string `json:"blockDevice,omitempty"`
	DAX         bool   `json:"dax,omitempty"`
	Phys        uint64 `json:"phys,omitempty"`
	HasPhys     bool   `json:"hasPhys,omitempty"`
	Off         int64  `json:"off"`
	Size        int64  `json:"size"`
	Version     string `json:"imageVersion,omitempty"`
	Restrict    bool   `json:"restrict,omitempty"`
	// File identifies the file or device behind Path: a path that was given to another file is another region.
	File string `json:"file,omitempty"`
}

func newRecord(driver string, s Source) record {
	return record{
		Format: recordVersion, Driver: driver, Key: s.Key, Kind: s.Region.Kind, Path: s.Region.Path,
		BlockDevice: s.Region.BlockDevice, DAX: s.Region.DAX, Phys: s.Region.Phys, HasPhys: s.Region.HasPhys,
		Off: s.Off, Size: s.Size, Version: s.Version, Restrict: s.Restrict, File: fileID(s),
	}
}

func (r record) source() Source {
	return Source{
		Key: r.Key, Off: r.Off, Size: r.Size, Version: r.Version, Restrict: r.Restrict,
		Region: region.Info{
			Kind: r.Kind, Path: r.Path, BlockDevice: r.BlockDevice, DAX: r.DAX, Phys: r.Phys, HasPhys: r.HasPhys, FD: -1,
		},
	}
}

// fileID names the file or device of a source: device and inode number; "" if it has none.
func fileID(s Source) string {
	path := s.Region.BlockDevice
	if path == "" {
		path = s.Region.Path
	}
	var st unix.Stat_t
	if path == "" || unix.Stat(path, &st) != nil {
		return ""
	}
	if st.Mode&unix.S_IFMT == unix.S_IFBLK || st.Mode&unix.S_IFMT == unix.S_IFCHR {
		return fmt.Sprintf("device %d:%d", unix.Major(st.Rdev), unix.Minor(st.Rdev))
	}
	return fmt.Sprintf("inode %d on %d:%d", st.Ino, unix.Major(st.Dev), unix.Minor(st.Dev))
}

// write replaces the record in one step. It is not synced to disk: mounts do not survive a power failure either.
func (r record) write(dir string) error {
	b, err := json.Marshal(r)
	if err != nil {
		return err
	}
	return renameio.WriteFile(filepath.Join(dir, recordName), append(b, '\n'), 0o600, renameio.WithTempDir(dir))
}

func readRecord(dir string) (record, error) {
	name := filepath.Join(dir, recordName)
	b, err := os.ReadFile(name)
	if err != nil {
		return record{}, err
	}
	var r record
	if err := json.Unmarshal(b, &r); err != nil {
		return record{}, fmt.Errorf("%q: %w", name, err)
	}
	if r.Format != recordVersion {
		return record{}, fmt.Errorf("%q: version %d, expected %d", name, r.Format, recordVersion)
	}
	return r, nil
}

// adopt fills an empty table from what is mounted below root.
func (t *Table) adopt(ctx context.Context) error {
	dirs, err := os.ReadDir(filepath.Join(t.root, "images"))
	if err != nil {
		return err
	}
	for _, de := range dirs {
		if err := ctx.Err(); err != nil {
			return err
		}
		dir := filepath.Join(t.root, "images", de.Name())
		if err := t.adoptOne(ctx, dir); err != nil {
			// One bad image must not keep the others, and the daemon, from working.
			t.opts.Warn("image directory %q: %v", dir, err)
		}
	}
	return nil
}

func (t *Table) adoptOne(ctx context.Context, dir string) error {
	rec, err := readRecord(dir)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		// No record, nothing of ours is mounted: a crash between making the directory and writing the record.
		return removeEmpty(dir)
	case err != nil:
		// Another version of the program wrote it, or a power failure cut it. If it stayed, its image could not be mounted.
		t.opts.Warn("image directory %q: what is mounted there is not used further: %v", dir, err)
		return t.removeMounted(ctx, dir)
	case t.imageDir(rec.Key) != dir:
		return fmt.Errorf("the record is that of image %q, whose directory is %q", rec.Key, t.imageDir(rec.Key))
	}
	mnt := mountDir(dir)
	driver := t.byName(rec.Driver)
	_, layers, err := sys.Top(mnt)
	if err != nil {
		return err
	}
	if driver != nil && layers == 1 {
		e := &entry{
			work: make(chan struct{}, 1), dir: dir, driver: driver, src: rec.source(), file: rec.File, holders: map[string]struct{}{},
		}
		err := e.match(ctx)
		if err == nil {
			t.entries[rec.Key] = e
			return nil
		}
		t.opts.Warn("image %q: what is mounted on %q is not used further: %v", rec.Key, mnt, err)
	}
	return t.removeMounted(ctx, dir)
}

// removeMounted removes what may be mounted in an image directory, whoever uses it, and the directory.
func (t *Table) removeMounted(ctx context.Context, dir string) error {
	mnt := mountDir(dir)
	if err := sys.Detach(mnt); err != nil {
		return err
	}
	for _, d := range t.known() { // a crash before the record knew its driver can have left devices of any of them
		if err := d.Unmount(ctx, mnt); err != nil {
			return err
		}
	}
	removeImageDir(dir)
	return nil
}

// match asks the driver whether the mount is what it should be. The caller holds the work token or is the only user.
func (e *entry) match(ctx context.Context) error {
	if now := fileID(e.src); now != e.file {
		return fmt.Errorf("%s was %q when it was mounted and is %q now", e.src.Where(), e.file, now)
	}
	return e.driver.Match(ctx, e.src, mountDir(e.dir))
}

// known are all drivers whose mounts may be found. The first of one name counts.
func (t *Table) known() []Driver { return slices.Concat(t.drivers, t.opts.Adopt) }

func (t *Table) byName(name string) Driver {
	for _, d := range t.known() {
		if d.Name() == name {
			return d
		}
	}
	return nil
}

// removeImageDir removes the directory of an image after its unmount. rmdir(2) on the mount point fails if something
// is mounted there after all, and then everything stays.
func removeImageDir(dir string) {
	if os.Remove(mountDir(dir)) != nil {
		if _, err := os.Lstat(mountDir(dir)); !errors.Is(err, fs.ErrNotExist) {
			return
		}
	}
	// Only names that this package and its drivers make.
	for _, name := range []string{recordName, "fuse.log"} {
		os.Remove(filepath.Join(dir, name))
	}
	removeTemps(dir)
	os.Remove(dir)
}

// removeTemps removes records that a killed process did not finish to write.
func removeTemps(dir string) {
	temps, _ := filepath.Glob(filepath.Join(dir, "."+recordName+"*")) // the pattern is good unless dir has wildcards: not ours
	for _, t := range temps {
		os.Remove(t)
	}
}

// removeEmpty removes an image directory that holds at most an empty mount point.
func removeEmpty(dir string) error {
	if err := os.Remove(mountDir(dir)); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	removeTemps(dir)
	return os.Remove(dir)
}
