// Package region is the memory under a pool: one contiguous range of bytes that others can map, too.
//
// A region has a kind, such as a file or persistent memory. All kinds are used in the same way:
//
//	r, err := region.Open(region.Config{Kind: region.KindFile, Path: "/srv/pool", Size: 64 << 30, Create: true})
//	if err != nil {
//		return err
//	}
//	defer r.Close()
//	_, err = r.WriteAt(page, 2<<20)
//
// Info says what a region can do: whether a block device with DAX leads to the bytes, whether their
// physical address is known, whether they survive the process or a reboot, and whether punching a
// range gives space back.
//
// A region is safe for concurrent use, but Close must be called last. Concurrent writes of overlapping
// ranges leave the bytes of either. Only Lock keeps two owners apart, and it is advisory.
package region

import (
	"errors"
	"fmt"
	"io"
	"os"
)

// Persistence says what the bytes of a region survive.
type Persistence int

// The ranks of persistence, lowest first.
const (
	// PersistsNothing means that the bytes are gone once no process has the region open or mounted.
	PersistsNothing Persistence = iota
	// PersistsProcess means that the bytes outlive processes and end with a reboot.
	PersistsProcess
	// PersistsReboot means that the bytes survive a reboot and, once synced, a loss of power.
	PersistsReboot
)

// String returns "nothing", "process" or "reboot".
func (p Persistence) String() string {
	switch p {
	case PersistsNothing:
		return "nothing"
	case PersistsProcess:
		return "process"
	case PersistsReboot:
		return "reboot"
	}
	return fmt.Sprintf("persistence(%d)", int(p))
}

// MarshalText returns String, so that JSON output shows the word.
func (p Persistence) MarshalText() ([]byte, error) { return []byte(p.String()), nil }

// UnmarshalText reads what MarshalText wrote.
func (p *Persistence) UnmarshalText(text []byte) error {
	for _, known := range []Persistence{PersistsNothing, PersistsProcess, PersistsReboot} {
		if known.String() == string(text) {
			*p = known
			return nil
		}
	}
	return fmt.Errorf("persistence %q is not known", text)
}

// Info describes a region to callers that mount or explain it.
type Info struct {
	Kind        string      `json:"kind"`
	Path        string      `json:"path"`                  // file, device or heap
	BlockDevice string      `json:"blockDevice,omitempty"` // device whose first byte is the region's first byte, if any
	DAX         bool        `json:"dax"`                   // the block device can be mounted with dax=always
	Phys        uint64      `json:"phys,omitempty"`        // physical address of the first byte, if HasPhys
	HasPhys     bool        `json:"hasPhys"`
	Persistent  Persistence `json:"persistent"`
	Sparse      bool        `json:"sparse"` // Punch gives the space back to the system
	ReadOnly    bool        `json:"readOnly"`
	// FD is an open file of the region, such as for the mount of a dma-buf, or -1. The region owns it.
	FD int `json:"-"`
}

// Region is one contiguous range of shared memory.
type Region interface {
	// ReadAt and WriteAt follow io.ReaderAt and io.WriterAt. A write past the end writes nothing and is ErrRange.
	io.ReaderAt
	io.WriterAt
	// Size is the number of bytes, a multiple of 2 MiB.
	Size() int64
	// Sync returns when the bytes written to a range before the call survive what Info().Persistent promises.
	Sync(off, n int64) error
	// Punch makes a range read as zero, even if it does already, and frees its space if Info().Sparse.
	Punch(off, n int64) error
	Info() Info
	Close() error
}

// Locker is implemented by regions that can be locked.
type Locker interface {
	// Lock makes the caller the only owner until Close, or returns a *BusyError. Readers need no lock.
	Lock() error
}

// Align is the granule in bytes of region sizes and of the starts of windows: a huge page.
const Align = 2 << 20

// MinSize is the smallest region that Open accepts: the header, one segment and one extent area.
const MinSize = 4 * Align

// Errors of this package.
var (
	// ErrRange reports an offset outside of the region.
	ErrRange = errors.New("outside of the region")
	// ErrKind reports a path that does not fit the kind, such as a file on tmpfs with kind "file".
	ErrKind = errors.New("wrong kind of region")
	// ErrSize reports a region that is too small, misaligned or not of the configured size.
	ErrSize = errors.New("wrong size of region")
	// ErrBusy reports a region that has an owner already; see BusyError.
	ErrBusy = errors.New("in use")
	// ErrForeign reports memory that belongs to something else: a filesystem, a namespace label, System RAM.
	ErrForeign = errors.New("belongs to something else")
)

// Config says which region to open.
type Config struct {
	// Kind is one of the Kind constants.
	Kind string
	// Path is the file, the device or, for KindDMABuf, the heap. Empty for KindPhys.
	Path string
	// Size in bytes, rounded down to a multiple of Align. 0 takes all of an existing region.
	Size int64
	// Phys is the physical address of a KindPhys region, a multiple of Align.
	Phys uint64
	// Create makes the file of a KindFile, KindTmpfs or KindHugetlbfs region if missing; it needs Size.
	Create bool
	// FD is an existing dma-buf for KindDMABuf, which the caller keeps; 0 allocates a new one.
	FD int
	// ReadOnly opens a region for reading; writes fail.
	ReadOnly bool
	// Force accepts a KindPhys range that is not known to be reserved, or that has a driver. System RAM
	// and label areas are refused even then.
	Force bool
}

// Open opens a region. It returns ErrKind, ErrSize, ErrForeign or a system error. An Open that fails
// leaves nothing behind except a file that it created.
func Open(c Config) (Region, error) {
	r, err := open(c)
	if err != nil {
		return nil, fmt.Errorf("region %s %q: %w", c.Kind, c.Path, err)
	}
	return r, nil
}

func open(c Config) (Region, error) {
	if c.Size < 0 {
		return nil, fmt.Errorf("size %d: %w", c.Size, ErrSize)
	}
	if c.Size > 0 && c.Size < MinSize {
		return nil, fmt.Errorf("size %d is below the smallest pool of %d bytes: %w", c.Size, MinSize, ErrSize)
	}
	if c.Path == "" && c.Kind != KindPhys && c.FD == 0 {
		return nil, fmt.Errorf("no path given: %w", ErrKind)
	}
	if c.Create && c.Size == 0 {
		if _, err := os.Stat(c.Path); err != nil {
			return nil, fmt.Errorf("the size of a new region must be given: %w: %w", ErrSize, err)
		}
	}
	for _, k := range kinds() {
		if k.name == c.Kind {
			return k.open(c)
		}
	}
	return nil, fmt.Errorf("kind %q is not one of %q: %w", c.Kind, Kinds(), ErrKind)
}

// usable rounds a size down to one that a pool can use, or returns ErrSize.
func usable(size int64) (int64, error) {
	size &^= Align - 1
	if size < MinSize {
		return 0, fmt.Errorf("%d bytes, at least %d are needed: %w", size, MinSize, ErrSize)
	}
	return size, nil
}

// checkRange tells whether [off, off+n) lies inside size bytes, without overflow.
func checkRange(off, n, size int64) error {
	if off < 0 || n < 0 || off > size || n > size-off {
		return fmt.Errorf("range %d+%d of %d bytes: %w", off, n, size, ErrRange)
	}
	return nil
}
