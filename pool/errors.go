package pool

import (
	"errors"
	"fmt"

	"github.com/daxfs/daxfs-snapshotter/pool/region"
)

// Errors of this package. All other errors are wrapped errors of the system or of package daxfs.
var (
	// ErrFull reports that something does not fit; see FullError.
	ErrFull = errors.New("pool is full")
	// ErrBusy reports a pool that another process owns; see region.BusyError.
	ErrBusy = region.ErrBusy
	// ErrNotFound reports an unknown key.
	ErrNotFound = errors.New("not found")
	// ErrForeign reports a region that belongs to something else, or an index that belongs to another pool.
	ErrForeign = region.ErrForeign
	// ErrVersion reports a pool that another version of this program made. It is also an ErrForeign.
	ErrVersion = fmt.Errorf("made by another version: %w", region.ErrForeign)
	// ErrWiped reports a region without a pool header, such as memory after a reboot: see Reset.
	ErrWiped = errors.New("pool was wiped")
	// ErrCorrupt reports a header, catalogue or index that cannot be valid.
	ErrCorrupt = errors.New("pool is corrupt")
	// ErrLeased reports an image, or a pool, that readers use; see LeasedError.
	ErrLeased = errors.New("in use by readers")
	// ErrClosed reports the use of a batch that was committed or discarded, or of a closed pool.
	ErrClosed = errors.New("closed")
	// ErrReadOnly reports a region that accepts writes and drops them.
	ErrReadOnly = errors.New("read-only memory")
	// ErrInvalid reports an argument that is never valid, such as a key that is too long.
	ErrInvalid = errors.New("invalid argument")
)

// LeasedError is an ErrLeased that names the readers.
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

// wipedError is the error for a region in which readHeaders found no pool.
func wipedError(err error) error {
	if errors.Is(err, ErrVersion) {
		return err
	}
	return fmt.Errorf("%w: %w", ErrWiped, err)
}

// The values of FullError.What.
const (
	fullExtent  = "extent"
	fullTree    = "tree area"
	fullSegment = "window segment"
	fullSlot    = "slot"
)

// FullError is an ErrFull that says how much space is missing.
type FullError struct {
	What string // what did not fit: "extent", "tree area", "window segment" or "slot"
	Need int64  // bytes needed in one piece; for slots, their number
	// Have is the longest free piece, or the free bytes of a filesystem, or the number of free slots.
	Have int64
	Free int64 // free bytes in all pieces together
	Err  error // the system's error if the filesystem below the region is full, else nil
}

// Error says how much is needed and how much there is.
func (e *FullError) Error() string {
	switch {
	case e.Err != nil:
		return fmt.Sprintf("the filesystem below the pool is full: %s of %d bytes: %v", e.What, e.Need, e.Err)
	case e.What == fullSlot:
		return fmt.Sprintf("pool is full: all %d slots were used; they are free again when nothing of the pool is "+
			"mounted, at the latest after a reboot", e.Free)
	}
	return fmt.Sprintf("pool is full: %s needs %d bytes in one piece, the longest is %d of %d free", e.What,
		e.Need, e.Have, e.Free)
}

// Is makes errors.Is(err, ErrFull) true.
func (e *FullError) Is(target error) bool { return target == ErrFull }

// Unwrap returns the system's error, else ErrFull: the gRPC error encoder ends the process on nil.
func (e *FullError) Unwrap() error {
	if e.Err == nil {
		return ErrFull
	}
	return e.Err
}
