package pool

import (
	"errors"
	"fmt"

	"github.com/daxfs/daxfs-snapshotter/pool/region"
)

// Errors of this package. All others are errors of the system or of package daxfs, wrapped.
var (
	// ErrFull reports that something does not fit; see FullError.
	ErrFull = errors.New("pool is full")
	// ErrBusy reports a pool that another process owns; see region.BusyError.
	ErrBusy = region.ErrBusy
	// ErrNotFound reports an unknown key.
	ErrNotFound = errors.New("not found")
	// ErrForeign reports a region that belongs to something else, or an index that belongs to another pool.
	ErrForeign = region.ErrForeign
	// ErrVersion reports a pool that another version of this program made. It is an ErrForeign, too.
	ErrVersion = fmt.Errorf("made by another version: %w", region.ErrForeign)
	// ErrWiped reports a region without a pool header, as after a reboot of memory. What the index knew is lost; Reset
	// makes an empty pool of it.
	ErrWiped = errors.New("pool was wiped")
	// ErrCorrupt reports a header, catalogue or index that can not be true.
	ErrCorrupt = errors.New("pool is corrupt")
	// ErrLeased reports an image, or a pool, that readers use; see LeasedError.
	ErrLeased = errors.New("in use by readers")
	// ErrClosed reports the use of a batch that was committed or discarded, or of a closed pool.
	ErrClosed = errors.New("closed")
	// ErrReadOnly reports a region that takes writes and does not keep them.
	ErrReadOnly = errors.New("read-only memory")
	// ErrInvalid reports an argument that is never valid, such as a key that is too long.
	ErrInvalid = errors.New("invalid argument")
)

// LeasedError is the ErrLeased that says who uses it.
type LeasedError struct {
	What  string   // "image KEY" or "pool"
	Users []string // names of readers
}

// Error names the readers.
func (e *LeasedError) Error() string {
	return fmt.Sprintf("%s is in use by the readers %q", e.What, e.Users)
}

// Is makes errors.Is(err, ErrLeased) true.
func (e *LeasedError) Is(target error) bool { return target == ErrLeased }

// missing is the error of a region that readHeaders found no pool in.
func missing(err error) error {
	if errors.Is(err, ErrVersion) {
		return err
	}
	return fmt.Errorf("%w: %w", ErrWiped, err)
}

// What can be full, for FullError.What.
const (
	fullExtent  = "extent"
	fullTree    = "tree area"
	fullSegment = "window segment"
	fullSlot    = "slot"
)

// FullError is the ErrFull that says how much is missing.
type FullError struct {
	What string // what did not fit: "extent", "tree area", "window segment" or "slot"
	Need int64  // bytes that are needed in one piece; of slots, their number
	// longest piece that is free; of the filesystem below the region, its free bytes; of slots, their number
	Have int64
	Free int64 // free bytes in all pieces together
	Err  error // the system's error, if the filesystem below the region is full; else nil
}

// Error says what is needed and what there is.
func (e *FullError) Error() string {
	switch {
	case e.Err != nil:
		return fmt.Sprintf("the filesystem below the pool is full: %s of %d bytes: %v", e.What, e.Need, e.Err)
	case e.What == fullSlot:
		return fmt.Sprintf("pool is full: all %d slots were used; they are free again when nothing of the pool is mounted, "+
			"at the latest after a reboot", e.Free)
	}
	return fmt.Sprintf("pool is full: %s needs %d bytes in one piece, the longest is %d of %d free", e.What,
		e.Need, e.Have, e.Free)
}

// Is makes errors.Is(err, ErrFull) true.
func (e *FullError) Is(target error) bool { return target == ErrFull }

// Unwrap returns the system's error, else ErrFull. It is never nil: what encodes errors for gRPC ends the process on that.
func (e *FullError) Unwrap() error {
	if e.Err == nil {
		return ErrFull
	}
	return e.Err
}
