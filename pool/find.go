package pool

import "io"

// Find returns contents by SHA-256 and size, if the pool has them and they are not known to be
// damaged. The batch holds them, so the reader works until the batch is committed or discarded.
// Contents that are still being written count as missing.
func (b *Batch) Find(sum [32]byte, size int64) (io.ReaderAt, bool) {
	p := b.p
	p.mu.Lock()
	e := p.find(sumKey{sum, size})
	if p.closed || e == nil || e.pending {
		p.mu.Unlock()
		return nil, false
	}
	e.ref()
	p.mu.Unlock()

	b.mu.Lock()
	done := b.done
	if !done {
		b.held = append(b.held, e)
	}
	b.mu.Unlock()
	if done {
		p.unref(e)
		return nil, false
	}
	return io.NewSectionReader(p.region, e.off, e.size), true
}
