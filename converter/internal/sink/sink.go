// Package sink writes the contents of files into an image file: every distinct content once, in an
// order that does not depend on timing.
//
// Layers are decompressed concurrently. Their contents travel in packs: 2 MiB buffers with contents page
// aligned and tails zeroed, as in the image, so that a run of small files is one write. One goroutine places
// the packs in an order that only the layers determine. A few lanes take turns, one pack each; a lane serves
// one layer to its end, then the lowest layer not yet served. Equal input therefore gives equal bytes at any
// concurrency, several layers are decompressed at a time, and little has to wait. Waiting packs stay in
// memory. When the memory is used up, they go to an unnamed spill file, or the reader of the layer waits.
//
// Each layer hashes its packs in its own goroutine, so that a layer of few large files keeps more than
// one core busy.
//
// Put returns a placeholder address and no sum. Finish knows which contents the merged tree still
// refers to: it removes the others, closes their gaps, and puts addresses and sums into the tree.
package sink

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"hash"
	"io"
	"os"
	"slices"
	"sync"

	"github.com/daxfs/daxfs-snapshotter/daxfs"
)

const (
	page = daxfs.BlockSize
	// huge is the alignment of big contents, the size of a huge page and the size of a pack. A content
	// that needs more than one pack is thus always big.
	huge = 2 << 20

	// Lanes is the number of layers that take turns; at least as many must be read at a time, in order.
	// The bytes of an image depend on it.
	Lanes = 4
	// share is the number of packs guaranteed to each lane: one to fill and one to place.
	share = 2
	// ahead is the number of packs of a layer that may wait for hashing before its reader waits.
	ahead   = 2
	reserve = Lanes * share
	// least is the minimum number of packs in memory: enough to keep all cores busy.
	least = 2 * reserve

	// A placeholder address has the bit virtual set and encodes layer and number of the content; no
	// address in an image is that large.
	virtual   = int64(1) << 62
	layerBits = 20
	seqBits   = 30

	// maxEnd is the reach of 32-bit block numbers.
	maxEnd = int64(page) << 32
)

var (
	// ErrTooLarge reports that the contents of all layers exceed Options.MaxBytes or the reach of an image.
	ErrTooLarge = errors.New("contents exceed the size limit")
	errAborted  = errors.New("conversion was aborted")
)

// Options of a Sink.
type Options struct {
	// Memory bounds the bytes of waiting contents; the minimum is 32 MiB.
	Memory int64
	// Wait makes Put wait for the layer's turn when 32 MiB are in use, whatever Memory says: touching new
	// memory costs more than reading the layer a little later. Without Wait, contents go to a spill file
	// when the memory is used up, and Put does not wait for other layers.
	Wait bool
	// MaxBytes bounds the contents of all layers, duplicates and holes included; 0 means no limit.
	MaxBytes int64
	// NoAlign places contents of 2 MiB and more at any page instead of at multiples of 2 MiB.
	NoAlign bool
	// Failed is called once if placing fails, so that the caller can stop the layers.
	Failed func(error)
}

// Sink receives the contents of all layers of an image.
type Sink struct {
	o     Options
	f     *os.File
	limit int // maximum number of packs in memory
	done  chan struct{}
	out   placer         // owned by the placing goroutine until done is closed
	sums  sync.WaitGroup // the hashing goroutines

	mu     sync.Mutex // guards the following fields
	wake   *sync.Cond // a pack was queued or placed, or something ended
	layers []*Layer
	lanes  []*Layer
	turn   int // index of the lane whose turn it is
	next   int // the lowest layer not yet in a lane
	inUse  int // packs that hold memory
	arena  arena
	free   []*pack
	bytes  int64
	err    error
	spill  spill
}

// New starts to place contents into f, from its second block on. Layers are numbered from 0, bottom
// first. The caller must call Abort, with or without Finish before it, and then close f.
func New(f *os.File, layers int, o Options) (*Sink, error) {
	if layers >= 1<<layerBits {
		return nil, fmt.Errorf("%d layers, expected fewer than %d", layers, 1<<layerBits)
	}
	s := &Sink{o: o, f: f, done: make(chan struct{}), limit: least}
	if !o.Wait {
		s.limit = int(max(o.Memory/huge, least))
	}
	var err error
	if s.arena, err = newArena(s.limit + reserve + 1); err != nil { // one to read spilled packs back
		return nil, err
	}
	s.wake = sync.NewCond(&s.mu)
	s.out = placer{f: f, align: !o.NoAlign, tail: page, known: map[uint64]int32{}}
	for i := range layers {
		s.layers = append(s.layers, &Layer{s: s, index: i})
	}
	s.next = min(Lanes, layers)
	s.lanes = slices.Clone(s.layers[:s.next])
	go s.place()
	return s, nil
}

// Layer returns the store for the contents of layer i.
func (s *Sink) Layer(i int) *Layer { return s.layers[i] }

// Layer takes the contents of one layer, in the order of the Put calls. It is safe for concurrent use.
type Layer struct {
	s     *Sink
	index int

	put sync.Mutex // held during Put and Close; taken before Sink.mu
	cur *pack
	seq int64

	// Guarded by Sink.mu:
	queue   []*pack
	held    int  // packs with memory, queued or in filling
	behind  int  // packs at the end of the queue that are not yet hashed
	hashing bool // a goroutine is hashing them
	closed  bool

	big  hash.Hash // of the current big content; owned by the hashing goroutine
	refs []int32   // extent of each content, by number; owned by the placing goroutine
}

// pack holds several contents, or a piece of a big one.
type pack struct {
	buf   []byte // nil if the pack was spilled
	n     int
	items []item
	spill int64 // offset in the spill file
	ready bool  // hashed and, if necessary, spilled; guarded by Sink.mu
}

// item is a content in a pack, or a piece of one.
type item struct {
	off, n      int32
	first, last bool
	size        int64    // of the content
	sum         [32]byte // of the content; set in the last piece by hashing
}

func up(n, to int64) int64 { return (n + to - 1) / to * to }

// Put reads exactly size bytes from r and returns a placeholder address. Finish replaces it and sets the sum.
func (l *Layer) Put(ctx context.Context, size int64, r io.Reader) (daxfs.Data, error) {
	l.put.Lock()
	defer l.put.Unlock()
	if err := l.s.account(size); err != nil {
		return daxfs.Data{}, err
	}
	if l.seq >= 1<<seqBits {
		return daxfs.Data{}, fmt.Errorf("%w: more than %d files in a layer", ErrTooLarge, l.seq)
	}
	d := daxfs.Data{Off: virtual | (int64(l.index)<<seqBits|l.seq)*page, Size: size}
	l.seq++
	if size <= huge {
		return d, l.putSmall(ctx, size, r)
	}
	return d, l.putBig(ctx, size, r)
}

func (l *Layer) putSmall(ctx context.Context, size int64, r io.Reader) error {
	if l.cur != nil && int64(l.cur.n)+size > huge {
		if err := l.flush(); err != nil {
			return err
		}
	}
	return l.read(ctx, r, item{n: int32(size), first: true, last: true, size: size})
}

func (l *Layer) putBig(ctx context.Context, size int64, r io.Reader) error {
	for done := int64(0); done < size; {
		if err := ctx.Err(); err != nil {
			return err
		}
		if l.cur != nil && l.cur.n > huge-huge/8 {
			if err := l.flush(); err != nil {
				return err
			}
		}
		room := int64(huge)
		if l.cur != nil {
			room -= int64(l.cur.n)
		}
		n := min(size-done, room)
		if err := l.read(ctx, r, item{n: int32(n), first: done == 0, last: done+n == size, size: size}); err != nil {
			return err
		}
		done += n
	}
	return nil
}

// read adds an item to the current pack and fills it.
func (l *Layer) read(ctx context.Context, r io.Reader, it item) error {
	if l.cur == nil {
		p, err := l.s.newPack(ctx, l)
		if err != nil {
			return err
		}
		l.cur = p
	}
	it.off = int32(l.cur.n)
	room := l.cur.buf[l.cur.n : l.cur.n+int(up(int64(it.n), page))]
	if got, err := io.ReadFull(r, room[:it.n]); err == io.EOF || err == io.ErrUnexpectedEOF {
		return fmt.Errorf("contents end after %d of %d bytes: %w", got, it.n, io.ErrUnexpectedEOF)
	} else if err != nil {
		return err
	}
	clear(room[it.n:])
	l.cur.items = append(l.cur.items, it)
	l.cur.n += len(room)
	return nil
}

// flush queues the current pack. It waits while too many earlier packs are not hashed.
func (l *Layer) flush() error {
	p, s := l.cur, l.s
	if p == nil || len(p.items) == 0 {
		return nil
	}
	l.cur = nil
	s.mu.Lock()
	defer s.mu.Unlock()
	for s.err == nil && l.behind >= ahead {
		s.wake.Wait()
	}
	if s.err != nil {
		return s.err
	}
	l.queue = append(l.queue, p)
	l.behind++
	if !l.hashing {
		l.hashing = true
		s.sums.Go(l.hash)
	}
	return nil
}

// hash hashes the queued packs and ends when none is left; flush starts it again.
func (l *Layer) hash() {
	s := l.s
	s.mu.Lock()
	defer s.mu.Unlock()
	for s.err == nil && l.behind > 0 {
		p := l.queue[len(l.queue)-l.behind]
		s.mu.Unlock()
		l.hashPack(p)
		s.mu.Lock()
		if !s.o.Wait && !s.due(l) && s.inUse > s.limit-reserve && (l.held > share || !s.inLane(l)) {
			// Memory for waiting contents is used up: spill the pack and reuse its memory.
			if err := s.spillPack(l, p); err != nil {
				s.mu.Unlock()
				s.fail(err)
				s.mu.Lock()
				break
			}
		}
		p.ready = true
		l.behind--
		s.wake.Broadcast()
	}
	l.hashing = false
}

// hashPack sets the sums of contents that end in the pack.
func (l *Layer) hashPack(p *pack) {
	for i := range p.items {
		it := &p.items[i]
		b := p.buf[it.off : it.off+it.n]
		if it.first && it.last {
			it.sum = sha256.Sum256(b)
			continue
		}
		if it.first {
			l.big = sha256.New()
		}
		l.big.Write(b)
		if it.last {
			it.sum = [32]byte(l.big.Sum(nil))
		}
	}
}

// Close ends the contents of the layer.
func (l *Layer) Close() error {
	l.put.Lock()
	defer l.put.Unlock()
	err := l.flush()
	l.s.mu.Lock()
	defer l.s.mu.Unlock()
	l.closed = true
	l.s.wake.Broadcast()
	return err
}

// account adds size to the image's total and checks the limit.
func (s *Sink) account(size int64) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	limit := maxEnd
	if s.o.MaxBytes > 0 {
		limit = min(limit, s.o.MaxBytes)
	}
	if size > limit-s.bytes {
		return fmt.Errorf("%w of %d bytes", ErrTooLarge, limit)
	}
	s.bytes += size
	return nil
}

// newPack returns an empty pack with memory. It may wait until packs are placed. Without Options.Wait
// a layer never waits for another layer: when memory is short, hash spills its packs. Each layer in
// reading may thus exceed the limit by a few packs.
func (s *Sink) newPack(ctx context.Context, l *Layer) (*pack, error) {
	// Cancelling ctx wakes callers that wait for a layer which will never be finished.
	defer context.AfterFunc(ctx, func() {
		s.mu.Lock()
		defer s.mu.Unlock()
		s.wake.Broadcast()
	})()
	s.mu.Lock()
	defer s.mu.Unlock()
	for s.err == nil && ctx.Err() == nil && s.mustWait(l) {
		s.wake.Wait()
	}
	if s.err != nil {
		return nil, s.err
	}
	if ctx.Err() != nil {
		return nil, context.Cause(ctx)
	}
	s.inUse++
	l.held++
	if n := len(s.free); n > 0 {
		p := s.free[n-1]
		s.free = s.free[:n-1]
		return p, nil
	}
	return &pack{buf: s.arena.pack()}, nil
}

// mustWait reports whether a layer has to wait before it takes another pack.
func (s *Sink) mustWait(l *Layer) bool {
	switch {
	case !s.o.Wait:
		return s.due(l) && s.inUse >= s.limit && l.held > 0
	case s.inLane(l):
		return s.inUse >= s.limit && l.held >= share
	default:
		return s.inUse >= s.limit-reserve
	}
}

// due reports whether it is the layer's turn to place a pack.
func (s *Sink) due(l *Layer) bool { return s.turn < len(s.lanes) && s.lanes[s.turn] == l }

func (s *Sink) inLane(l *Layer) bool { return slices.Contains(s.lanes, l) }

// recycle returns the memory of a pack of l.
func (s *Sink) recycle(l *Layer, buf []byte, items []item) {
	s.inUse--
	l.held--
	s.free = append(s.free, &pack{buf: buf, items: items[:0]})
}

// fail ends everything. The first error is kept.
func (s *Sink) fail(err error) {
	s.mu.Lock()
	first := s.err == nil
	if first {
		s.err = err
	}
	s.wake.Broadcast()
	s.mu.Unlock()
	if first && s.o.Failed != nil {
		s.o.Failed(err)
	}
}

// Err returns the error that ended placing, if any.
func (s *Sink) Err() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.err
}

// Abort ends placing and frees the memory. No Put may be running. After Finish it only frees the memory.
func (s *Sink) Abort() {
	s.mu.Lock()
	if s.err == nil {
		s.err = errAborted
	}
	s.wake.Broadcast()
	s.mu.Unlock()
	<-s.done
	s.sums.Wait()
	s.spill.close()
	s.free = nil
	s.arena.close()
}
