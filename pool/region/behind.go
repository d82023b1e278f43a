package region

import (
	"os"
	"sync"

	"golang.org/x/sys/unix"
)

// behindBytes is how much is written to a file before the disk is told to begin.
const behindBytes = 16 << 20

// behind starts to write a file back while it is still being filled. A Sync at the end then finds most of the work done:
// else the disk would idle while a layer is decompressed, and the processors while it is synced. It promises nothing.
type behind struct {
	f *os.File

	mu     sync.Mutex
	lo, hi int64 // what was written since the last start lies in [lo, hi)
	n      int64 // bytes of it
	busy   bool
	done   sync.WaitGroup
}

// wrote notes a write.
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
		// An error is that of the disk, and Sync will see it; or the file system knows no ranges.
		_ = unix.SyncFileRange(int(b.f.Fd()), lo, hi-lo, unix.SYNC_FILE_RANGE_WRITE)
		b.mu.Lock()
		defer b.mu.Unlock()
		b.busy = false
	})
}

// wait returns when the file is no longer used.
func (b *behind) wait() { b.done.Wait() }
