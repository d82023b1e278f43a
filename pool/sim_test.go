package pool

import (
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/daxfs/daxfs-snapshotter/pool/region"
)

// simRegion is memory that remembers which writes were synced. It can fail or stop at any operation.
type simRegion struct {
	mu      sync.Mutex
	mem     []byte // seen by readers
	durable []byte // certain to survive
	pending []simWrite
	faults  *faults
}

type simWrite struct {
	off int64
	b   []byte
}

// faults counts the operations of a region and its index, and fails chosen ones.
type faults struct {
	mu     sync.Mutex
	n      int
	at     int    // the operation that fails; 0 for none
	stay   bool   // all later ones fail, too: the process is dead
	only   string // if set, only operations that begin with it count
	onFail func() // called once, at operation at
	each   func() // called at each operation
}

var errFault = errors.New("injected fault")

// hit counts one operation.
func (f *faults) hit(op string) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	if !strings.HasPrefix(op, f.only) {
		return nil
	}
	f.n++
	if f.each != nil {
		f.each()
	}
	if f.at == 0 || f.n < f.at || f.n > f.at && !f.stay {
		return nil
	}
	if f.n == f.at && f.onFail != nil {
		f.onFail()
	}
	return fmt.Errorf("operation %d, %s: %w", f.n, op, errFault)
}

func newSimRegion(size int64, f *faults) *simRegion {
	return &simRegion{mem: make([]byte, size), durable: make([]byte, size), faults: f}
}

func (r *simRegion) ReadAt(p []byte, off int64) (int, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if off < 0 || off >= int64(len(r.mem)) {
		return 0, io.EOF
	}
	n := copy(p, r.mem[off:])
	if n < len(p) {
		return n, io.EOF
	}
	return n, nil
}

// WriteAt that fails leaves all bytes for later reads, and a random part after a crash.
func (r *simRegion) WriteAt(p []byte, off int64) (int, error) {
	if off < 0 || off+int64(len(p)) > int64(len(r.mem)) {
		return 0, region.ErrRange
	}
	r.put(simWrite{off, slices.Clone(p)})
	if err := r.faults.hit(fmt.Sprintf("write %d+%d", off, len(p))); err != nil {
		return 0, err
	}
	return len(p), nil
}

func (r *simRegion) put(w simWrite) {
	r.mu.Lock()
	defer r.mu.Unlock()
	copy(r.mem[w.off:], w.b)
	r.pending = append(r.pending, w)
}

func (r *simRegion) Punch(off, n int64) error {
	if err := r.faults.hit(fmt.Sprintf("punch %d+%d", off, n)); err != nil {
		return err
	}
	r.put(simWrite{off, make([]byte, n)})
	return nil
}

func (r *simRegion) Sync(off, n int64) error {
	if err := r.faults.hit(fmt.Sprintf("sync %d+%d", off, n)); err != nil {
		return err
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	var rest []simWrite
	for _, w := range r.pending {
		// If the range covers part of a write, only that part is certain.
		end := w.off + int64(len(w.b))
		lo, hi := max(w.off, off), min(end, off+n)
		if lo >= hi {
			rest = append(rest, w)
			continue
		}
		copy(r.durable[lo:hi], w.b[lo-w.off:])
		if lo > w.off {
			rest = append(rest, simWrite{w.off, w.b[:lo-w.off]})
		}
		if hi < end {
			rest = append(rest, simWrite{hi, w.b[hi-w.off:]})
		}
	}
	r.pending = rest
	return nil
}

// syncedClone is the region after a power loss that takes everything that was not synced.
func (r *simRegion) syncedClone() *simRegion {
	r.mu.Lock()
	defer r.mu.Unlock()
	c := newSimRegion(int64(len(r.mem)), &faults{})
	copy(c.durable, r.durable)
	copy(c.mem, r.durable)
	return c
}

// crashClone is the region after a power loss: all synced writes and a random part of each other.
func (r *simRegion) crashClone(rng *rand.Rand) *simRegion {
	c := r.syncedClone()
	r.mu.Lock()
	defer r.mu.Unlock()
	const sector = 512
	for _, w := range r.pending {
		switch rng.IntN(3) {
		case 0: // lost
		case 1:
			copy(c.durable[w.off:], w.b)
		case 2:
			for at := 0; at < len(w.b); at += sector {
				if rng.IntN(2) == 0 {
					copy(c.durable[w.off+int64(at):], w.b[at:min(at+sector, len(w.b))])
				}
			}
		}
	}
	copy(c.mem, c.durable)
	return c
}

func (r *simRegion) Size() int64  { return int64(len(r.mem)) }
func (r *simRegion) Close() error { return nil }

// Info reports tmpfs, so that the index is not synced: the test copies it between transactions.
func (r *simRegion) Info() region.Info {
	return region.Info{Kind: region.KindTmpfs, Path: "sim", Persistent: region.PersistsReboot, Sparse: true, FD: -1}
}

func copyFile(t testing.TB, from, to string) {
	t.Helper()
	b, err := os.ReadFile(from)
	if errors.Is(err, os.ErrNotExist) {
		return
	}
	if err == nil {
		err = os.WriteFile(to, b, 0o600)
	}
	if err != nil {
		t.Error(err)
	}
}

// fastDir is a temporary directory, in memory if possible: bbolt syncs, but the tests only use copies.
func fastDir(t testing.TB) string {
	t.Helper()
	dir, err := os.MkdirTemp("/dev/shm", "pooltest")
	if err != nil {
		return t.TempDir()
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	return dir
}
