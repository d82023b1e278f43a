package pool

import (
	"cmp"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strconv"
	"time"

	"golang.org/x/sys/unix"

	"github.com/daxfs/daxfs-snapshotter/pool/region"
)

// kindDamaged is the kind of the records of damaged extents: offset -> digest.
const kindDamaged = "pool/damaged"

// Damage is an extent with bytes that differ from what was put, or that follow it in its last page.
type Damage struct {
	Off  int64 `json:"offset"` // in the pool
	Size int64 `json:"size"`
	// Sum is the SHA-256 of the original contents, in hexadecimal, and Found that of what Scrub read.
	// Found is empty if an earlier owner of the pool read it.
	Sum   string `json:"expected"`
	Found string `json:"found,omitempty"`
	// Images and Layers are the keys of the holders, sorted.
	Images []string `json:"images"`
	Layers []string `json:"layers"`
	// Document says that the contents are the document of an image, not of a file.
	Document bool `json:"document,omitempty"`
}

// Finding returns the damage in the form of Check.
func (d Damage) Finding() Finding {
	f := Finding{Rule: "pool.sum", Off: d.Off, Known: d.Found == ""}
	f.Msg = fmt.Sprintf("%d bytes are not those of sum %s", d.Size, d.Sum)
	if d.Found != "" {
		f.Msg = fmt.Sprintf("%d bytes have sum %s, expected %s", d.Size, d.Found, d.Sum)
		if d.Found == d.Sum {
			f.Rule, f.Msg = "pool.tail", fmt.Sprintf("the rest of the last page of %d bytes is not zero", d.Size)
		}
	}
	if d.Document {
		f.Rule = "pool.document"
	}
	for _, keys := range [][]string{d.Layers, d.Images} {
		if len(keys) > 0 {
			f.Key = keys[0]
		}
	}
	f.Msg += fmt.Sprintf("; they are in images %q and layers %q", d.Images, d.Layers)
	return f
}

// ScrubOptions are the settings of Scrub. The zero value is as fast as one processor allows.
type ScrubOptions struct {
	// Rate limits the bytes read per second; 0 sets no limit.
	Rate int64
}

// Scrubbed counts what a Scrub read.
type Scrubbed struct {
	Extents int   `json:"extents"`
	Bytes   int64 `json:"bytes"` // whole pages
	Damaged int   `json:"damaged"`
}

// Scrub reads all extents and compares them with their digests. Other work goes on meanwhile.
//
// An extent that differs is damaged from then on, also after the pool was reopened, and report is
// called. A damaged extent is never shared again: the same contents, put again, get another extent;
// AddImage refuses trees that refer to it; and the catalogue lists no image that holds it. It stays in
// place for those that read it until nothing holds it.
//
// Scrub reads the region, not a mount. So it sees the memory of DAX devices. For a file it sees the
// page cache of the file, or the disk: it drops the pages that it has read. It does not see the page
// cache of a mounted live tree.
//
// The error is that of a scrub that could not be finished.
func (p *Pool) Scrub(ctx context.Context, o ScrubOptions, report func(Damage)) (Scrubbed, error) {
	var done Scrubbed
	began := time.Now()
	for _, e := range p.readable() {
		err := ctx.Err()
		if err == nil {
			err = p.scrubOne(ctx, e, &done, report)
		}
		if err != nil {
			return done, fmt.Errorf("pool: scrub: %w", err)
		}
		if o.Rate > 0 {
			due := time.Duration(float64(done.Bytes) / float64(o.Rate) * float64(time.Second))
			if ahead := due - time.Since(began); ahead >= scrubPause {
				if err := pause(ctx, ahead); err != nil {
					return done, fmt.Errorf("pool: scrub: %w", err)
				}
			}
		}
	}
	return done, nil
}

// scrubPause is the lead over the rate before a scrub sleeps: a wakeup costs more than a small read.
const scrubPause = 100 * time.Millisecond

func pause(ctx context.Context, d time.Duration) error {
	if d <= 0 {
		return nil
	}
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

// readable returns the extents that readers may hold or get, by offset.
func (p *Pool) readable() []*extent {
	p.mu.Lock()
	defer p.mu.Unlock()
	var all []*extent
	for _, e := range p.extents {
		if !e.pending && (e.listed || e.damaged || e.document) && !e.erased {
			all = append(all, e)
		}
	}
	return byOffset(all)
}

func (p *Pool) scrubOne(ctx context.Context, e *extent, done *Scrubbed, report func(Damage)) error {
	p.mu.Lock()
	known := e.damaged
	p.mu.Unlock()
	if known {
		return nil
	}
	c, err := p.read(ctx, e)
	if err != nil {
		return err
	}
	done.Extents++
	done.Bytes += e.span().Len
	if c.intact(e) {
		return nil
	}
	marked, err := p.markDamaged(e, c.sum)
	if marked {
		done.Damaged++
		report(p.damage(e))
	}
	return err
}

// found is the result of reading an extent.
type found struct {
	sum  [sha256.Size]byte
	tail bool // the rest of the last page is not zero
}

func (c found) intact(e *extent) bool { return c.sum == e.sum && !c.tail }

// read reads an extent without a lock: an extent that was freed meanwhile may hold anything.
func (p *Pool) read(ctx context.Context, e *extent) (found, error) {
	buf := buffers.Get().(*[]byte)
	defer buffers.Put(buf)
	var c found
	h := sha256.New()
	for at := int64(0); at < e.span().Len; at += chunk {
		part := (*buf)[:min(chunk, e.span().Len-at)]
		if n, err := p.region.ReadAt(part, e.off+at); n < len(part) {
			return c, fmt.Errorf("read %d bytes at %d: %w", len(part), e.off+at, err)
		}
		p.uncache(e.off+at, int64(len(part)))
		body := part[:min(int64(len(part)), e.size-at)]
		h.Write(body)
		c.tail = c.tail || !isZero(part[len(body):])
		if err := ctx.Err(); err != nil {
			return c, err
		}
	}
	h.Sum(c.sum[:0])
	return c, nil
}

// uncache drops scrubbed pages of a file: no mount uses them, and the next scrub must read the disk.
func (p *Pool) uncache(off, n int64) {
	if info := p.region.Info(); info.Kind == region.KindFile && info.FD >= 0 {
		_ = unix.Fadvise(info.FD, off, n, unix.FADV_DONTNEED) // advisory
	}
}

// markDamaged marks an extent so that nobody gets it any more. It reports false if the extent is
// marked already or was freed meanwhile.
func (p *Pool) markDamaged(e *extent, got [sha256.Size]byte) (bool, error) {
	p.commit.Lock()
	defer p.commit.Unlock()
	p.mu.Lock()
	if p.extents[e.off] != e || e.damaged {
		p.mu.Unlock()
		return false, nil
	}
	e.damaged, p.found[e] = true, got
	p.damaged.Add(1)
	p.unlist(e)
	p.mu.Unlock()
	err := p.index.setRecord(kindDamaged, damagedKey(e), e.sum[:])
	return true, errors.Join(err, p.hideDamaged())
}

func damagedKey(e *extent) string { return strconv.FormatInt(e.off, 10) }

// hideDamaged takes damaged images out of the catalogue. Preconditions: commit is held.
func (p *Pool) hideDamaged() error {
	w := window{p, 0, p.header.size}
	for _, m := range p.images {
		if p.stale[m.Slot] != nil || !p.isDamaged(m.used) && !p.isDamaged([]*extent{m.doc}) {
			continue
		}
		if _, err := w.WriteAt(p.entry(m), entryOff(m.Slot)); err != nil {
			return err
		}
		if err := p.region.Sync(entryOff(m.Slot), entrySize); err != nil {
			return err
		}
	}
	gen := p.header.generation + 1
	if err := p.index.setGeneration(gen); err != nil {
		return err
	}
	return p.writeHeader(gen)
}

// entry is the slot table entry of an image. It is empty if the image holds damaged extents or waits
// for readers that use it, and it omits a damaged document.
func (p *Pool) entry(m *image) []byte {
	b := make([]byte, entrySize)
	if p.hidden || m.unlisted || p.isDamaged(m.used) {
		return b
	}
	shown := m.Image
	if p.isDamaged([]*extent{m.doc}) {
		shown.Document = Document{}
	}
	encodeImage(b, &shown)
	return b
}

func (p *Pool) isDamaged(es []*extent) bool {
	return p.damaged.Load() > 0 && slices.ContainsFunc(es, func(e *extent) bool { return e != nil && e.damaged })
}

// adoptDamaged marks the extents that an earlier owner found damaged.
func (p *Pool) adoptDamaged() error {
	records, err := p.index.records(kindDamaged)
	if err != nil {
		return err
	}
	for key, sum := range records {
		off, err := strconv.ParseInt(key, 10, 64)
		e := p.extents[off]
		if err != nil || e == nil || string(sum) != string(e.sum[:]) {
			p.index.noteLast(noted{kindDamaged, key, nil})
			continue
		}
		e.damaged = true
		p.damaged.Add(1)
		p.unlist(e)
	}
	return nil
}

func (p *Pool) damage(e *extent) Damage {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.damageOf(e)
}

func (p *Pool) damageOf(e *extent) Damage {
	d := Damage{Off: e.off, Size: e.size, Sum: fmt.Sprintf("%x", e.sum), Document: e.document}
	if got, ok := p.found[e]; ok {
		d.Found = fmt.Sprintf("%x", got)
	}
	d.Images, d.Layers = []string{}, []string{}
	for _, key := range slices.Sorted(maps.Keys(p.images)) {
		if m := p.images[key]; m.doc == e || slices.Contains(m.used, e) {
			d.Images = append(d.Images, key)
		}
	}
	for _, key := range slices.Sorted(maps.Keys(p.layers)) {
		if slices.Contains(p.layers[key], e) {
			d.Layers = append(d.Layers, key)
		}
	}
	return d
}

// Damaged returns the damaged extents that something holds or may still read, by offset.
func (p *Pool) Damaged() []Damage {
	p.mu.Lock()
	defer p.mu.Unlock()
	out := []Damage{}
	for _, e := range p.extents {
		if e.damaged {
			out = append(out, p.damageOf(e))
		}
	}
	slices.SortFunc(out, func(a, b Damage) int { return cmp.Compare(a.Off, b.Off) })
	return out
}

// DamagedCount returns the number of extents that Damaged returns, at no cost.
func (p *Pool) DamagedCount() int { return int(p.damaged.Load()) }

// ImageDamaged reports whether an image holds damaged contents.
func (p *Pool) ImageDamaged(key string) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	m := p.images[key]
	return m != nil && p.isDamaged(m.used)
}

// LayerDamaged reports whether a layer holds damaged contents.
func (p *Pool) LayerDamaged(key string) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.isDamaged(p.layers[key])
}
