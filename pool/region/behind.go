package region

import (
	"os"
	"sync"

	"golang.org/x/sys/unix"
)

// behindBytes is how much is written to a file before writeback starts.
const behindBytes = 16 << 20

// behind starts the writeback of a file while it is still being filled, so that a Sync at the end
// finds most of the work done. Otherwise the disk would idle while a layer is decompressed, and the
// processors during the sync. It promises nothing.
type behind struct {
	f *os.File

	mu     sync.Mutex
	lo, hi int64 // covers everything written since the last start
	n      int64 // bytes written in it
	busy   bool
	done   sync.WaitGroup
}

// wrote records a write.
func (b *behind) wrote(off, n int64) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.n == 0 {
		b.lo, b.hi = off, off+n
	}
	b.lo, b.hi, b.n = min(b.lo, off), max(b.hi, off+n), b.n+n
	if b.n < behindBytes || b.busy {
		return
	}
	lo, hi := b.lo, b.hi
	b.n, b.busy = 0, true
	b.done.Go(func() {
		// Ignore errors: Sync sees those of the disk, and some filesystems do not support ranges.
		_ = unix.SyncFileRange(int(b.f.Fd()), lo, hi-lo, unix.SYNC_FILE_RANGE_WRITE)
		b.mu.Lock()
		defer b.mu.Unlock()
		b.busy = false
	})
}

// wait returns when behind no longer uses the file.
func (b *behind) wait() { b.done.Wait() }
