// Package region is the memory under a pool: one contiguous range of bytes that others can map as well.
//
// A region has a kind, which says what it is made of. All kinds are used alike:
//
//	r, err := region.Open(region.Config{Kind: region.KindFile, Path: "/var/lib/daxfs/pool", Size: 64 << 30, Create: true})
//	if err != nil {
//		return err
//	}
//	defer r.Close()
//	_, err = r.WriteAt(page, 2<<20)
//
// What the kinds can do differs, and Info says so: whether a block device with DAX leads to the bytes, whether their
// physical address is known, whether they survive the process or a reboot, whether a punched range gives space back.
//
// A region is safe for concurrent use, except that Close must be called after all else. Writes of overlapping ranges
// at the same time leave either's bytes. Nothing here keeps two owners apart but Lock, which is advisory.
package region

import (
	"errors"
	"fmt"
	"io"
	"os"
)

// Persistence says what the bytes of a region survive.
type Persistence int

// The ranks of persistence, in rising order.
const (
	// PersistsNothing means the bytes are gone when the last process that has the region open or mounted is.
	PersistsNothing Persistence = iota
	// PersistsProcess means the bytes outlive processes and end with a reboot.
	PersistsProcess
	// PersistsReboot means the bytes survive a reboot and, once synced, a loss of power.
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

// Info describes a region to those that mount or explain it.
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
	// FD is an open file of the region for those that need one, such as a mount of a dma-buf; -1 if there is none. It
	// is the region's own and ends with it.
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
	// Punch makes a range read as zero and gives its space back where Info().Sparse. It may be called for ranges that
	// are zero already.
	Punch(off, n int64) error
	Info() Info
	Close() error
}

// Locker is implemented by regions that have something to lock.
type Locker interface {
	// Lock makes the caller the only owner until Close, or returns a *BusyError. Regions opened only to be read need
	// none.
	Lock() error
}

// Align is the granule of region sizes and of the starts of windows in a region: the size of a huge page.
const Align = 2 << 20

// MinSize is the smallest region that is accepted: the header, one segment and one extent area.
const MinSize = 4 * Align

// Errors of this package.
var (
	// ErrRange reports an offset outside of the region.
	ErrRange = errors.New("outside of the region")
	// ErrKind reports a path that is not what the kind says, such as a file on tmpfs with kind "file".
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
	// Size in bytes. 0 takes all of what is there; then it must be there. Rounded down to a multiple of Align.
	Size int64
	// Phys is the physical address of a KindPhys region, a multiple of Align.
	Phys uint64
	// Create makes the file of a KindFile, KindTmpfs or KindHugetlbfs region if there is none; Size is needed then.
	Create bool
	// FD is a dma-buf that exists already, for KindDMABuf: it is used instead of a new one and stays the caller's. 0
	// takes a new one.
	FD int
	// ReadOnly opens a region to read it; writing is an error.
	ReadOnly bool
	// Force takes a KindPhys range that is not known to be reserved, or that has a driver. System RAM and label areas
	// are refused even so.
	Force bool
}

// Open opens a region. It returns ErrKind, ErrSize, ErrForeign or an error of the system; nothing is left behind by an
// Open that fails, except a file that it created.
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

// usable rounds a size down to what a pool can use, or says why it can not.
func usable(size int64) (int64, error) {
	size &^= Align - 1
	if size < MinSize {
		return 0, fmt.Errorf("%d bytes, at least %d are needed: %w", size, MinSize, ErrSize)
	}
	return size, nil
}

// checkRange tells whether [off, off+n) lies inside of size bytes, without overflow.
func checkRange(off, n, size int64) error {
	if off < 0 || n < 0 || off > size || n > size-off {
		return fmt.Errorf("range %d+%d of %d bytes: %w", off, n, size, ErrRange)
	}
	return nil
}
