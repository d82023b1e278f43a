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
	// ErrBusy reports a pool that another process owns (see region.BusyError), or an image that is pinned.
	ErrBusy = region.ErrBusy
	// ErrNotFound reports an unknown key.
	ErrNotFound = errors.New("not found")
	// ErrForeign reports a region that belongs to something else, or an index that belongs to another pool.
	ErrForeign = region.ErrForeign
	// ErrWiped reports a region without a pool header, as after a reboot of memory. What the index knew is lost; Reset
	// makes an empty pool of it.
	ErrWiped = errors.New("pool was wiped")
	// ErrCorrupt reports a header, catalogue or index that can not be true.
	ErrCorrupt = errors.New("pool is corrupt")
	// ErrClosed reports the use of a batch that was committed or discarded, or of a closed pool.
	ErrClosed = errors.New("closed")
	// ErrInvalid reports an argument that is never valid, such as a key that is too long.
	ErrInvalid = errors.New("invalid argument")
)

// FullError is the ErrFull that says how much is missing.
type FullError struct {
	What string // what did not fit, such as "extent"
	Need int64  // bytes that are needed in one piece
	Have int64  // longest piece that is free; of the filesystem below the region, its free bytes
	Free int64  // free bytes in all pieces together
	Err  error  // the system's error, if the filesystem below the region is full; else nil
}

// Error says what is needed and what there is.
func (e *FullError) Error() string {
	if e.Err != nil {
		return fmt.Sprintf("the filesystem below the pool is full: %s of %d bytes: %v", e.What, e.Need, e.Err)
	}
	return fmt.Sprintf("pool is full: %s needs %d bytes in one piece, the longest is %d of %d free", e.What, e.Need, e.Have, e.Free)
}

// Is makes errors.Is(err, ErrFull) true.
func (e *FullError) Is(target error) bool { return target == ErrFull }

// Unwrap returns the system's error, if any.
func (e *FullError) Unwrap() error { return e.Err }
