package lease

import (
	"bytes"
	"crypto/sha256"
	"errors"
	"fmt"
	"os"
	"sync"

	"golang.org/x/sys/unix"

	"github.com/daxfs/daxfs-snapshotter/pool"
	"github.com/daxfs/daxfs-snapshotter/pool/region"
)

var (
	// ErrTaken reports a lease region that belongs to another reader; see TakenError.
	ErrTaken = errors.New("the lease region belongs to another reader")
	// ErrLost reports a lease region that was taken from this reader after it opened it: the owner
	// declared the reader gone, or another machine opened the region. Images in use here are no longer
	// safe.
	ErrLost = errors.New("the lease region was taken away")
	// ErrFull reports a lease region without room for another claim.
	ErrFull = errors.New("the lease region is full")
)

// TakenError is an ErrTaken that names the reader.
type TakenError struct {
	Region string
	Reader string
}

// Error says how to free the region.
func (e *TakenError) Error() string {
	return fmt.Sprintf("lease region %q belongs to reader %q: each reader needs its own; if that one is gone, its "+
		"owner frees it with `daxfs pool release`", e.Region, e.Reader)
}

// Is makes errors.Is(err, ErrTaken) true.
func (e *TakenError) Is(target error) bool { return target == ErrTaken }

// Lease is the lease region of a reader. It is safe for concurrent use.
type Lease struct {
	spec string
	m    memory
	h    header

	mu sync.Mutex
}

// Open opens the lease region of a reader: a file, a block device, a DAX device, a range of one as
// PATH@OFFSET+SIZE, or physical memory as ADDRESS+SIZE. The reader takes over a region of zeros.
// Earlier claims of the same machine stay.
//
// Errors: ErrTaken if another machine has it; region.ErrBusy if another process of this machine has
// it; region.ErrForeign if it holds something else; region.ErrSize.
func Open(spec string, r Reader) (*Lease, error) {
	if err := r.check(); err != nil {
		return nil, err
	}
	m, err := openMemory(spec, true)
	if err != nil {
		return nil, err
	}
	l := &Lease{spec: spec, m: m, h: header{reader: r, run: thisBoot()}}
	if err := l.open(); err != nil {
		return nil, errors.Join(err, m.close())
	}
	return l, nil
}

// thisBoot identifies the current boot of the machine.
func thisBoot() (run [8]byte) {
	// Without the file all boots look alike, and claims are kept longer than needed.
	id, _ := os.ReadFile("/proc/sys/kernel/random/boot_id")
	sum := sha256.Sum256(id)
	copy(run[:], sum[:])
	return run
}

func (l *Lease) open() error {
	if err := l.lock(); err != nil {
		return err
	}
	b := make([]byte, headerSize)
	if err := l.m.load(b, 0); err != nil {
		return fmt.Errorf("lease region %q: %w", l.spec, err)
	}
	old, ok := decodeHeader(b)
	switch {
	case ok && old.reader.Machine != l.h.reader.Machine:
		return &TakenError{Region: l.spec, Reader: old.reader.Name}
	case !ok && string(b[:8]) != magic && !isZero(b):
		return fmt.Errorf("lease region %q holds other data, expected zeros: %w", l.spec, region.ErrForeign)
	}
	if err := l.m.store(l.h.encode(), 0); err != nil {
		return fmt.Errorf("lease region %q: %w", l.spec, err)
	}
	if err := l.mine(); err != nil {
		return fmt.Errorf("%w; or it is memory that does not keep what is written", err)
	}
	return l.clearTorn()
}

// lock keeps other processes of this machine out, but not with flock(2), which a launcher may hold.
func (l *Lease) lock() error {
	f, off := l.m.file()
	if f == nil {
		return nil
	}
	lk := unix.Flock_t{Type: unix.F_WRLCK, Start: off, Len: l.m.size()}
	err := unix.FcntlFlock(f.Fd(), unix.F_OFD_SETLK, &lk)
	if errors.Is(err, unix.EAGAIN) || errors.Is(err, unix.EACCES) {
		return fmt.Errorf("lease region %q: %w", l.spec, &region.BusyError{Path: f.Name()})
	}
	if err != nil {
		return fmt.Errorf("lock lease region %q: %w", l.spec, err)
	}
	return nil
}

// mine returns ErrLost if the region no longer belongs to this reader.
func (l *Lease) mine() error {
	b := make([]byte, headerSize)
	if err := l.m.load(b, 0); err != nil {
		return fmt.Errorf("lease region %q: %w", l.spec, err)
	}
	if !bytes.Equal(b, l.h.encode()) {
		return fmt.Errorf("lease region %q: %w", l.spec, ErrLost)
	}
	return nil
}

// clearTorn clears entries that a crash left half written: their claims never took effect.
func (l *Lease) clearTorn() error {
	table, err := readTable(l.m)
	if err != nil {
		return fmt.Errorf("lease region %q: %w", l.spec, err)
	}
	for i := range table.count() {
		if _, s := table.entry(i); s == torn {
			if err := l.put(i, make([]byte, entrySize)); err != nil {
				return err
			}
		}
	}
	return nil
}

func (l *Lease) put(i int, b []byte) error {
	if err := l.m.store(b, headerSize+int64(i)*entrySize); err != nil {
		return fmt.Errorf("lease region %q: %w", l.spec, err)
	}
	return nil
}

// table holds all entries of a region as they were read.
type table []byte

func readTable(m memory) (table, error) {
	b := make(table, (m.size()-headerSize)/entrySize*entrySize)
	return b, m.load(b, headerSize)
}

func (t table) count() int { return len(t) / entrySize }

func (t table) entry(i int) (entry, state) { return decodeEntry(t[i*entrySize:][:entrySize]) }

// Claim claims an image of a pool: the owner sees the claim from its next look on. held says that the
// image was claimed all along. Otherwise the owner may just have removed it: the caller must read the
// catalogue again and, if the image is no longer listed, release the claim and not use the image.
//
// Errors: ErrFull, ErrLost.
func (l *Lease) Claim(poolID [16]byte, m pool.Image) (held bool, err error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if err := l.mine(); err != nil {
		return false, err
	}
	t, err := readTable(l.m)
	if err != nil {
		return false, fmt.Errorf("lease region %q: %w", l.spec, err)
	}
	want := entryOf(poolID, m, l.h.run)
	room, old := -1, []int{}
	for i := range t.count() {
		switch e, s := t.entry(i); {
		case s == claimed && e == want:
			return true, nil
		case s == claimed && e.same(want):
			old = append(old, i)
		case s != claimed && room < 0:
			room = i
		}
	}
	if room < 0 {
		return false, fmt.Errorf("lease region %q: %d claims: %w", l.spec, t.count(), ErrFull)
	}
	if err := l.put(room, want.encode()); err != nil {
		return false, err
	}
	for _, i := range old { // claims of an earlier boot, now taken over
		if err := l.put(i, make([]byte, entrySize)); err != nil {
			return false, err
		}
	}
	return len(old) > 0, l.mine()
}

// Check returns nil while the region belongs to this reader. Errors: ErrLost.
func (l *Lease) Check() error {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.mine()
}

// Release ends a claim, if there is one. The caller makes sure that nothing on this machine reads the
// image any more: no container, no open file, no mapping.
func (l *Lease) Release(poolID [16]byte, m pool.Image) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	if err := l.mine(); err != nil {
		return err
	}
	t, err := readTable(l.m)
	if err != nil {
		return fmt.Errorf("lease region %q: %w", l.spec, err)
	}
	want := entryOf(poolID, m, l.h.run)
	for i := range t.count() {
		if e, s := t.entry(i); s == claimed && e.same(want) {
			if err := l.put(i, make([]byte, entrySize)); err != nil {
				return err
			}
		}
	}
	return nil
}

// Close closes the region. Claims stay.
func (l *Lease) Close() error { return l.m.close() }

func isZero(b []byte) bool {
	for _, c := range b {
		if c != 0 {
			return false
		}
	}
	return true
}
