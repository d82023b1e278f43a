package mount

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"golang.org/x/sys/unix"
)

// Range is a range of bytes of the pool.
type Range struct{ Off, End int64 }

// freshChunk is the length of one comparison.
const freshChunk = 1 << 20

// refresh waits until the block device's cache holds nothing older in ranges than the device itself. A
// process that reads the device, as udev does, makes the kernel cache metadata before it is written,
// and a page that is being read survives a flush. Ranges are written once, so a range found fresh
// stays fresh, also for the next process that adopts the mount.
func (l *live) refresh(ctx context.Context, ranges []Range) error {
	if l.block == "" {
		return nil
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	var todo []Range
	for _, r := range ranges {
		if from := max(r.Off, l.rec.Fresh[r.Off]); from < r.End {
			todo = append(todo, Range{from, r.End})
		}
	}
	if len(todo) == 0 {
		return nil
	}
	cached, err := os.OpenFile(l.block, os.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer cached.Close()
	direct, err := os.OpenFile(l.block, os.O_RDONLY|unix.O_DIRECT|unix.O_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer direct.Close()
	// Direct I/O needs aligned memory; anonymous memory is.
	buf, err := unix.Mmap(-1, 0, 2*freshChunk, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANON)
	if err != nil {
		return err
	}
	defer unix.Munmap(buf) //nolint:errcheck // cannot fail for our own mapping
	for _, r := range todo {
		for at := r.Off; at < r.End; at += freshChunk {
			n := min(freshChunk, r.End-at)
			if err := l.refreshChunk(ctx, cached, direct, at, buf[:n], buf[freshChunk:][:n]); err != nil {
				return err
			}
		}
	}
	l.setFresh(ranges)
	return nil
}

// setFresh marks ranges as fresh and records that. The caller has locked mu, or is the only user of l.
func (l *live) setFresh(ranges []Range) {
	if l.rec.Fresh == nil {
		l.rec.Fresh = map[int64]int64{}
	}
	for _, r := range ranges {
		l.rec.Fresh[r.Off] = max(l.rec.Fresh[r.Off], r.End)
	}
	// Without the record the next process only compares again.
	_ = writeRecord(filepath.Dir(l.dir), poolRecordName, l.rec)
}

// refreshChunk flushes the device until cached and direct reads agree. a and b are buffers.
func (l *live) refreshChunk(ctx context.Context, cached, direct *os.File, at int64, a, b []byte) error {
	for i := range flushes {
		_, err1 := cached.ReadAt(a, at)
		_, err2 := direct.ReadAt(b, at)
		if err := errors.Join(err1, err2); err != nil {
			return fmt.Errorf("metadata of the pool at %d: %w", at, err)
		}
		if bytes.Equal(a, b) {
			return nil
		}
		if err := l.flush(i > 2); err != nil {
			return err
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(min(time.Duration(i)*time.Millisecond, 20*time.Millisecond)):
		}
	}
	return fmt.Errorf("metadata at %d is still older in the cache of %q than on the device, after %d flushes: %w",
		at, l.block, flushes, ErrBusy)
}
