package sink

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"os"
	"slices"

	"golang.org/x/sys/unix"
)

type extent struct {
	off, size int64
	sum       [32]byte
	live      bool
	alike     int32 // 1 + an older extent whose sum has the same prefix, or 0
}

func (e extent) end() int64 { return e.off + up(e.size, page) }

// gap is free space below the tail. It reads as zeros.
type gap struct{ off, end int64 }

// maxGaps bounds the gaps searched for one content.
const maxGaps = 512

// placer chooses the places of contents and writes them.
type placer struct {
	f       *os.File
	align   bool
	tail    int64
	gaps    []gap
	extents []extent
	known   map[uint64]int32 // 1 + the last extent whose sum starts with these 8 bytes
	saved   int64            // bytes of contents that were already present

	big struct { // the big content whose pieces are incomplete
		off, done int64
		tail      int64 // before the content was placed
		gaps      int   // number of gaps before it was placed
	}
	pend struct { // pending write: bytes at off
		off int64
		b   []byte
	}
	tmp []byte
}

// place is the goroutine that takes the packs in order.
func (s *Sink) place() {
	defer close(s.done)
	var back []byte // buffer for spilled packs
	for {
		l, p := s.nextPack()
		if p == nil {
			return
		}
		buf := p.buf
		if buf == nil {
			if back == nil {
				s.mu.Lock()
				back = s.arena.pack()
				s.mu.Unlock()
			}
			buf = back
			if err := s.spill.unspill(p, buf); err != nil {
				s.fail(err)
				return
			}
		}
		if err := s.out.pack(l, p.items, buf); err != nil {
			s.fail(fmt.Errorf("write image: %w", err))
			return
		}
		if p.buf != nil {
			s.mu.Lock()
			s.recycle(l, p.buf, p.items)
			s.wake.Broadcast()
			s.mu.Unlock()
		}
	}
}

// nextPack waits for the pack whose turn it is. It returns nil at the end.
func (s *Sink) nextPack() (*Layer, *pack) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for s.err == nil && len(s.lanes) > 0 {
		l := s.lanes[s.turn]
		if len(l.queue) > 0 && l.queue[0].ready {
			p := l.queue[0]
			l.queue = l.queue[1:]
			if p.items[len(p.items)-1].last { // place a big content as a whole
				s.turn = (s.turn + 1) % len(s.lanes)
				s.wake.Broadcast()
			}
			return l, p
		}
		if l.closed && len(l.queue) == 0 {
			s.refillLane()
			s.wake.Broadcast()
			continue
		}
		s.wake.Wait()
	}
	return nil, nil
}

// refillLane puts the next layer into the current lane, or closes the lane.
func (s *Sink) refillLane() {
	if s.next < len(s.layers) {
		s.lanes[s.turn] = s.layers[s.next]
		s.next++
		return
	}
	s.lanes = slices.Delete(s.lanes, s.turn, s.turn+1)
	if s.turn == len(s.lanes) {
		s.turn = 0
	}
}

func (p *placer) pack(l *Layer, items []item, buf []byte) error {
	for _, it := range items {
		b := buf[it.off : int64(it.off)+up(int64(it.n), page)]
		var id int32
		var err error
		if it.first && it.last {
			id, err = p.whole(it, b)
		} else {
			id, err = p.piece(it, b)
		}
		if err != nil {
			return err
		}
		if it.last {
			l.refs = append(l.refs, id)
		}
	}
	return p.flush()
}

func (p *placer) whole(it item, b []byte) (int32, error) {
	if id, ok := p.find(it.sum); ok {
		p.saved += it.size
		return id, nil
	}
	off, err := p.alloc(it.size)
	if err != nil {
		return 0, err
	}
	return p.record(it, off), p.write(off, b)
}

// piece places a part of a big content at the place allocated with its first part. Only the last part
// shows whether the content is already present.
func (p *placer) piece(it item, b []byte) (int32, error) {
	if it.first {
		p.big.tail, p.big.gaps, p.big.done = p.tail, len(p.gaps), 0
		off, err := p.alloc(it.size)
		if err != nil {
			return 0, err
		}
		p.big.off = off
	}
	if !allZero(b) { // leave a hole
		if err := p.write(p.big.off+p.big.done, b); err != nil {
			return 0, err
		}
	}
	p.big.done += int64(it.n)
	if !it.last {
		return 0, nil
	}
	if id, ok := p.find(it.sum); ok {
		p.saved += it.size
		// Undo the placement.
		if err := p.zero(p.big.off, p.tail); err != nil {
			return 0, err
		}
		p.tail, p.gaps = p.big.tail, p.gaps[:p.big.gaps]
		return id, nil
	}
	return p.record(it, p.big.off), nil
}

func (p *placer) record(it item, off int64) int32 {
	id, key := int32(len(p.extents)), sumKey(it.sum)
	p.extents = append(p.extents, extent{off: off, size: it.size, sum: it.sum, alike: p.known[key]})
	p.known[key] = id + 1
	return id
}

// find returns the extent with the given sum: equal sums mean equal contents.
func (p *placer) find(sum [32]byte) (int32, bool) {
	for id := p.known[sumKey(sum)]; id != 0; id = p.extents[id-1].alike {
		if p.extents[id-1].sum == sum {
			return id - 1, true
		}
	}
	return 0, false
}

// sumKey returns a prefix of a sum. Whole sums would double the size of the map.
func sumKey(sum [32]byte) uint64 { return binary.LittleEndian.Uint64(sum[:]) }

// alloc allocates space. Big contents go to the end, at a multiple of 2 MiB; later small contents fill
// the gaps before them.
func (p *placer) alloc(size int64) (int64, error) {
	n := up(size, page)
	if size < huge {
		for i := max(0, len(p.gaps)-maxGaps); i < len(p.gaps); i++ {
			if g := &p.gaps[i]; g.end-g.off >= n {
				off := g.off
				g.off += n
				return off, nil
			}
		}
	}
	off := p.tail
	if p.align && size >= huge {
		off = up(p.tail, huge)
	}
	if off+n > maxEnd {
		return 0, fmt.Errorf("%w: an image reaches no more than %d bytes", ErrTooLarge, maxEnd)
	}
	if off > p.tail {
		p.gaps = append(p.gaps, gap{p.tail, off})
	}
	p.tail = off + n
	return off, nil
}

// write schedules a write. It merges writes that are adjacent in memory and file.
func (p *placer) write(off int64, b []byte) error {
	if n := len(p.pend.b); n > 0 && off == p.pend.off+int64(n) && cap(p.pend.b) >= n+len(b) &&
		&p.pend.b[:n+1][n] == &b[0] {
		p.pend.b = p.pend.b[:n+len(b)]
		return nil
	}
	if err := p.flush(); err != nil {
		return err
	}
	p.pend.off, p.pend.b = off, b
	return nil
}

func (p *placer) flush() error {
	if len(p.pend.b) == 0 {
		return nil
	}
	_, err := p.f.WriteAt(p.pend.b, p.pend.off)
	p.pend.b = nil
	return err
}

// scratch returns a buffer for moving and zeroing.
func (p *placer) scratch() []byte {
	if p.tmp == nil {
		p.tmp = make([]byte, 256<<10)
	}
	return p.tmp
}

// cover extends the file to at least size bytes.
func (p *placer) cover(size int64) error {
	fi, err := p.f.Stat()
	if err != nil || fi.Size() >= size {
		return err
	}
	return p.f.Truncate(size)
}

// zero makes a range read as zeros again.
func (p *placer) zero(off, end int64) error {
	if off >= end {
		return nil
	}
	if err := p.flush(); err != nil {
		return err
	}
	err := unix.Fallocate(int(p.f.Fd()), unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, off, end-off)
	if err == nil {
		return nil
	}
	if err != unix.EOPNOTSUPP && err != unix.ENOSYS {
		return &os.PathError{Op: "punch hole", Path: p.f.Name(), Err: err}
	}
	buf := p.scratch()
	clear(buf)
	for off < end {
		n := min(end-off, int64(len(buf)))
		if _, err := p.f.WriteAt(buf[:n], off); err != nil {
			return err
		}
		off += n
	}
	return nil
}

var zeros [64 << 10]byte

func allZero(b []byte) bool {
	for len(b) > 0 {
		n := min(len(b), len(zeros))
		if !bytes.Equal(b[:n], zeros[:n]) {
			return false
		}
		b = b[n:]
	}
	return true
}
