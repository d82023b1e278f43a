package mount

import (
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"time"

	"golang.org/x/sys/unix"

	"github.com/daxfs/daxfs-snapshotter/pool/region"
)

const (
	poolRecordName = "pool.json"  // <root>/live/<id>/pool.json
	recordName     = "image.json" // <root>/images/<id>/image.json
	recordVersion  = 2
)

// poolRecord describes the mount beside it, or one that was about to be made (Driver is empty).
// Records do not embed types of other packages, because other versions of the program read them.
type poolRecord struct {
	Format      int    `json:"version"`
	Driver      string `json:"driver"`
	UUID        string `json:"uuid"`
	Kind        string `json:"kind"`
	Path        string `json:"path,omitempty"`
	BlockDevice string `json:"blockDevice,omitempty"`
	DAX         bool   `json:"dax,omitempty"`
	Phys        uint64 `json:"phys,omitempty"`
	HasPhys     bool   `json:"hasPhys,omitempty"`
	Size        int64  `json:"size"`
	// File identifies the file or device behind Path, which may later lead to another region.
	File string `json:"file,omitempty"`
	// RootHandle is the file handle of the root directory, in hexadecimal: see recoverPool.
	RootHandle string `json:"rootHandle,omitempty"`
	// Fresh lists ranges that need no comparison while this mount lasts: first offset to end. See refresh.
	Fresh map[int64]int64 `json:"fresh,omitempty"`
}

func (p Pool) record(driver string) poolRecord {
	r := p.Region
	return poolRecord{
		Format: recordVersion, Driver: driver, UUID: p.uuid(), Kind: r.Kind, Path: r.Path, BlockDevice: r.BlockDevice,
		DAX: r.DAX, Phys: r.Phys, HasPhys: r.HasPhys, Size: p.Size, File: fileID(r),
	}
}

func (r poolRecord) source() Source {
	return Source{Size: r.Size, Region: region.Info{
		Kind: r.Kind, Path: r.Path, BlockDevice: r.BlockDevice, DAX: r.DAX, Phys: r.Phys, HasPhys: r.HasPhys, FD: -1,
	}}
}

// imageRecord describes the bind or window mount beside it. Version 1 also wrote key and driver.
type imageRecord struct {
	Format     int       `json:"version"`
	Driver     string    `json:"driver"`
	Key        string    `json:"key"`
	Pool       string    `json:"pool"` // UUID
	Windowed   bool      `json:"windowed,omitempty"`
	Name       string    `json:"name"`
	Nid        uint64    `json:"nid"`
	Window     int64     `json:"window,omitempty"`
	WindowSize int64     `json:"windowSize,omitempty"`
	UUID       string    `json:"uuid"`
	Created    time.Time `json:"created"`
}

func (img Image) record(p Pool, driver string, windowed bool) imageRecord {
	return imageRecord{
		Format: recordVersion, Driver: driver, Key: img.Key, Pool: p.uuid(), Windowed: windowed,
		Name: img.Name, Nid: img.Nid,
		Window: img.Window, WindowSize: img.WindowSize, UUID: hex.EncodeToString(img.UUID[:]), Created: img.Created,
	}
}

func (r imageRecord) image() (Image, error) {
	img := Image{Key: r.Key, Name: r.Name, Nid: r.Nid, Window: r.Window, WindowSize: r.WindowSize, Created: r.Created}
	b, err := hex.DecodeString(r.UUID)
	if err != nil || len(b) != len(img.UUID) {
		return Image{}, fmt.Errorf("uuid %q of image %q, expected 32 hexadecimal digits", r.UUID, r.Key)
	}
	copy(img.UUID[:], b)
	return img, nil
}

// fileID identifies the file or device of a region by device and inode number; "" if there is none.
func fileID(r region.Info) string {
	path := r.BlockDevice
	if path == "" {
		path = r.Path
	}
	var st unix.Stat_t
	if path == "" || unix.Stat(path, &st) != nil {
		return ""
	}
	if st.Mode&unix.S_IFMT == unix.S_IFBLK || st.Mode&unix.S_IFMT == unix.S_IFCHR {
		return fmt.Sprintf("device %d:%d", unix.Major(st.Rdev), unix.Minor(st.Rdev))
	}
	return inodeID(st)
}

func inodeID(st unix.Stat_t) string {
	return fmt.Sprintf("inode %d on %d:%d", st.Ino, unix.Major(st.Dev), unix.Minor(st.Dev))
}

// writeRecord replaces a record atomically, without a sync: mounts do not survive a power failure.
func writeRecord(dir, name string, rec any) error {
	b, err := json.Marshal(rec)
	if err != nil {
		return err
	}
	f, err := os.CreateTemp(dir, "."+name+"*")
	if err != nil {
		return err
	}
	_, err = f.Write(append(b, '\n'))
	if err = errors.Join(err, f.Close()); err == nil {
		err = os.Rename(f.Name(), filepath.Join(dir, name))
	}
	if err != nil {
		os.Remove(f.Name())
	}
	return err
}

// readRecord fills rec from a record of any version.
func readRecord(dir, name string, rec any) error {
	path := filepath.Join(dir, name)
	b, err := os.ReadFile(path)
	if err != nil {
		return err
	}
	if err := json.Unmarshal(b, rec); err != nil {
		return fmt.Errorf("%q: %w", path, err)
	}
	return nil
}

// removeDir removes a directory of the table after its unmount. If something is still mounted there,
// rmdir(2) fails on the mount point and everything stays.
func removeDir(dir string) {
	if os.Remove(mountDir(dir)) != nil {
		if _, err := os.Lstat(mountDir(dir)); !errors.Is(err, fs.ErrNotExist) {
			return
		}
	}
	// Only names that this package and its drivers create.
	for _, name := range []string{recordName, poolRecordName, "fuse.log"} {
		os.Remove(filepath.Join(dir, name))
	}
	// A server that runs on after a lazy unmount keeps the lock file, and with it the directory.
	if busy, err := locked(filepath.Join(dir, ServerLock)); err == nil && !busy {
		os.Remove(filepath.Join(dir, ServerLock))
	}
	removeTemps(dir)
	os.Remove(dir)
}

// removeTemps removes records that a killed process left half written.
func removeTemps(dir string) {
	for _, name := range []string{recordName, poolRecordName} {
		// Glob fails only if dir has wildcards, which the names of this package do not.
		temps, _ := filepath.Glob(filepath.Join(dir, "."+name+"*"))
		for _, t := range temps {
			os.Remove(t)
		}
	}
}

func removeEmpty(dir string) error {
	if err := os.Remove(mountDir(dir)); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	removeTemps(dir)
	return os.Remove(dir)
}
