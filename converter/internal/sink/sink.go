// Package sink lays the contents of files into an image file: every distinct content once, in an order that does not
// depend on who delivers first.
//
// Layers are decompressed concurrently. Their contents travel in packs: 2 MiB buffers in which they lie page aligned
// with zeroed tails, as they will in the image, so that a run of small files is one write. One goroutine places the
// packs in an order that only the layers determine: a few lanes take turns, a pack from each; a lane stands for one
// layer until that ends, and then for the lowest one that has not had its turn. Equal input therefore gives equal bytes
// whatever the concurrency, several layers are decompressed at the same time, and hardly anything has to wait. What
// waits does so in memory. Once the memory is used up it waits in a spill file without a name, or whoever reads the
// layer waits.
//
// Each layer has its packs hashed beside its reader, so that a layer of few large files keeps more than one core busy.
//
// The address that Put returns is a placeholder, and the sum is not known yet. Finish knows which contents the merged
// tree still refers to, closes the gaps of those it does not, and puts addresses and sums into the tree.
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
	// huge is the alignment of big contents, the size of a huge page, and the size of a pack: a content that needs
	// more than one pack is always a big one.
	huge = 2 << 20

	// Lanes is how many layers take turns; at least as many have to be read at the same time, in order. The bytes of an
	// image depend on it.
	Lanes = 4
	// share is how many packs each lane may have in any case, so that all can go on: one to fill, and one to place.
	share = 2
	// ahead is how many packs of a layer wait to be hashed before its reader waits.
	ahead   = 2
	reserve = Lanes * share
	// least is how many packs are in memory in any case: enough to keep all cores busy.
	least = 2 * reserve

	// A placeholder address has its top bits set to layer and number of the content: both fit whatever an image holds.
	virtual   = int64(1) << 62
	layerBits = 20
	seqBits   = 30

	// maxEnd is what 32-bit block numbers reach.
	maxEnd = int64(page) << 32
)

var (
	// ErrTooLarge is returned when the contents of all layers exceed Options.MaxBytes, or what an image can address.
	ErrTooLarge = errors.New("contents exceed the size limit")
	errAborted  = errors.New("conversion was aborted")
)

// Options of a Sink.
type Options struct {
	// Memory bounds the bytes of contents that wait; at least 32 MiB are used.
	Memory int64
	// Wait makes Put wait for the turn of the layer when 32 MiB are used up, whatever Memory says: memory that is used for
	// the first time costs more than reading the layer a little later. Otherwise contents go to a spill file when the
	// memory is used up, and Put does not wait for other layers.
	Wait bool
	// MaxBytes bounds the contents of all layers, duplicates and holes included; 0 means no limit.
	MaxBytes int64
	// NoAlign places contents of 2 MiB and more at any page instead of at multiples of 2 MiB.
	NoAlign bool
	// Failed is called once, when placing fails, so that the layers can be stopped.
	Failed func(error)
}

// Sink receives the contents of all layers of an image.
type Sink struct {
	o     Options
	f     *os.File
	limit int // packs in memory
	done  chan struct{}
	out   placer         // of the placing goroutine until done is closed
	sums  sync.WaitGroup // the goroutines that hash

	mu     sync.Mutex // guards what follows
	wake   *sync.Cond // a pack was queued, placed, or something ended
	layers []*Layer
	lanes  []*Layer
	turn   int // of the lanes
	next   int // the lowest layer that was in no lane yet
	inUse  int // packs that hold memory
	arena  arena
	free   []*pack
	bytes  int64
	err    error
	spill  spill
}

// New starts to place contents into f, from its second block on. Layers are numbered from 0, bottom first. The
// caller ends with Abort, after Finish or instead of it, and closes f afterwards.
func New(f *os.File, layers int, o Options) (*Sink, error) {
	if layers >= 1<<layerBits {
		return nil, fmt.Errorf("%d layers, expected fewer than %d", layers, 1<<layerBits)
	}
	s := &Sink{o: o, f: f, done: make(chan struct{}), limit: least}
	if !o.Wait {
		s.limit = int(max(o.Memory/huge, least))
	}
	var err error
	if s.arena, err = newArena(s.limit + reserve + 1); err != nil { // one for packs that come back from the spill file
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

// Layer takes the contents of one layer, in the order in which they are placed. It is safe for concurrent use, but
// the order is then that of the calls.
type Layer struct {
	s     *Sink
	index int

	put sync.Mutex // held during Put and Close; taken before Sink.mu
	cur *pack
	seq int64

	// Guarded by Sink.mu:
	queue   []*pack
	held    int  // packs with memory, queued or being filled
	behind  int  // packs at the end of the queue that are not hashed yet
	hashing bool // a goroutine hashes them
	closed  bool

	big  hash.Hash // of the content of which not all pieces are hashed; of the hashing goroutine
	refs []int32   // extent of each content, by number; of the placing goroutine
}

// pack is a number of contents, or pieces of a big one.
type pack struct {
	buf   []byte // nil when the pack was spilled
	n     int
	items []item
	spill int64 // offset in the spill file
	ready bool  // hashed and, if need be, spilled; guarded by Sink.mu
}

// item is a content in a pack, or a piece of one.
type item struct {
	off, n      int32
	first, last bool
	size        int64    // of the content
	sum         [32]byte // of the content; with the last piece, once the pack is hashed
}

func up(n, to int64) int64 { return (n + to - 1) / to * to }

// Put reads exactly size bytes from r and returns a placeholder for where they will be. Finish replaces it, and sets
// the sum.
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

// flush queues the current pack. It waits while the packs before it are not hashed.
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

// hash hashes the packs of the queue until none is left. Then it ends: flush starts it again.
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
			// There is no memory for contents that wait. The pack's memory serves the next one.
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

// hashPack sets the sums of the contents that end in a pack.
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

// Close says that the layer has no more contents.
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

// account counts bytes against the limit of the image.
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

// newPack returns an empty pack with memory. A layer may have to wait until packs were placed; without Options.Wait
// it waits for no other layer, but its memory is given back after hashing when there is none left. Every layer that
// is being read may thus exceed the limit by a few packs.
func (s *Sink) newPack(ctx context.Context, l *Layer) (*pack, error) {
	// Who waits for a layer that nobody will finish is woken by the end of ctx.
	defer context.AfterFunc(ctx, func() {
		s.mu.Lock()
		defer s.mu.Unlock()
		s.wake.Broadcast()
	})()
	s.mu.Lock()
	defer s.mu.Unlock()
	for s.err == nil && ctx.Err() == nil && s.full(l) {
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

// full tells whether a layer has to wait before it takes another pack.
func (s *Sink) full(l *Layer) bool {
	switch {
	case !s.o.Wait:
		return s.due(l) && s.inUse >= s.limit && l.held > 0
	case s.inLane(l):
		return s.inUse >= s.limit && l.held >= share
	default:
		return s.inUse >= s.limit-reserve
	}
}

// due tells whether it is the layer's turn to have a pack placed.
func (s *Sink) due(l *Layer) bool { return s.turn < len(s.lanes) && s.lanes[s.turn] == l }

func (s *Sink) inLane(l *Layer) bool { return slices.Contains(s.lanes, l) }

// recycle takes the memory of a pack of l back.
func (s *Sink) recycle(l *Layer, buf []byte, items []item) {
	s.inUse--
	l.held--
	s.free = append(s.free, &pack{buf: buf, items: items[:0]})
}

// fail ends everything. The first error stays.
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

// Err returns the error that ended the placing, if any.
func (s *Sink) Err() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.err
}

// Abort ends the placing and frees the memory. No Put may be running any more. It may follow Finish, and does nothing
// then.
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
