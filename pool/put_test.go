package pool

import (
	"bytes"
	"context"
	"errors"
	"io"
	"path/filepath"
	"testing"
	"time"

	"github.com/daxfs/daxfs-snapshotter/daxfs"
	"github.com/daxfs/daxfs-snapshotter/pool/internal/alloc"
	"github.com/daxfs/daxfs-snapshotter/pool/region"
)

// A failed commit leaves the batch as it was: it can be committed again, or discarded.
func TestCommitAgain(t *testing.T) {
	p := newTestPool(t, 64<<20)
	p.index.fail = func(string) error { return errFault }
	b, discarded := p.Begin(), p.Begin()
	put(t, b, random(1, 5000))
	put(t, discarded, random(2, 5000))
	for _, b := range []*Batch{b, discarded} {
		if err := b.CommitLayer(ctx, "a", nil); !errors.Is(err, errFault) {
			t.Errorf("commit: %v, expected %v", err, errFault)
		}
	}
	p.index.fail = func(string) error { return nil }
	discarded.Discard()
	if err := b.CommitLayer(ctx, "a", nil); err != nil {
		t.Errorf("commit again: %v", err)
	}
	if n := p.Usage().ExtentCount; n != 1 {
		t.Errorf("%d extents, expected the one of the layer", n)
	}
	if err := p.RemoveLayer(ctx, "a"); err != nil {
		t.Error(err)
	}
	if n := p.Usage().ExtentCount; n != 0 {
		t.Errorf("%d extents without a holder", n)
	}
}

// heldRegion holds each write until the test decides how it ends.
type heldRegion struct {
	region.Region
	writing chan struct{}
	end     chan error
}

func (r *heldRegion) WriteAt(b []byte, off int64) (int, error) {
	r.writing <- struct{}{}
	if err := <-r.end; err != nil {
		return 0, err
	}
	return r.Region.WriteAt(b, off)
}

// holdWrites holds the writes of a pool until the test ends.
func holdWrites(t *testing.T, p *Pool) *heldRegion {
	below := p.region
	held := &heldRegion{below, make(chan struct{}), make(chan error)}
	p.region = held
	t.Cleanup(func() { p.region = below })
	return held
}

// Contents that another put is writing are not there yet. If its write fails, they are written again.
func TestPutWaits(t *testing.T) {
	p := newTestPool(t, 64<<20)
	before := p.Usage()
	held := holdWrites(t, p)
	b := p.Begin()
	defer b.Discard()
	body := random(1, 5000)
	type result struct {
		d   daxfs.Data
		err error
	}
	begin := func() chan result {
		out := make(chan result, 1)
		go func() {
			d, err := b.Put(ctx, int64(len(body)), bytes.NewReader(body))
			out <- result{d, err}
		}()
		return out
	}
	first := begin()
	<-held.writing
	second := begin()
	for waits := false; !waits; {
		p.mu.Lock()
		for _, e := range p.extents {
			waits = e.refs == 2
		}
		p.mu.Unlock()
		select {
		case r := <-second:
			held.end <- nil
			t.Fatalf("a put returned %+v, %v while the contents were being written", r.d, r.err)
		case <-time.After(time.Millisecond):
		}
	}
	held.end <- errFault
	if r := <-first; !errors.Is(r.err, errFault) {
		t.Errorf("the put whose write failed: %v", r.err)
	}
	<-held.writing
	held.end <- nil
	r := <-second
	if r.err != nil {
		t.Fatal(r.err)
	}
	got := make([]byte, len(body))
	if _, err := held.Region.ReadAt(got, r.d.Off); err != nil || !bytes.Equal(got, body) {
		t.Errorf("the waiting put got other bytes, %v", err)
	}
	b.Discard()
	if after := p.Usage(); after != before {
		t.Errorf("after all was discarded: %+v, before %+v", after, before)
	}
}

// A put that gives up waiting for the write of another holds nothing.
func TestPutStopsWaiting(t *testing.T) {
	p := newTestPool(t, 64<<20)
	before := p.Usage()
	held := holdWrites(t, p)
	b := p.Begin()
	body := random(1, 5000)
	first := make(chan error, 1)
	go func() {
		_, err := b.Put(ctx, int64(len(body)), bytes.NewReader(body))
		first <- err
	}()
	<-held.writing
	stopped, stop := context.WithCancel(ctx)
	// Put looks at ctx before it reads the contents, and again while it waits.
	last := readerFunc(func(b []byte) (int, error) {
		stop()
		return copy(b, body), nil
	})
	if _, err := b.Put(stopped, int64(len(body)), last); !errors.Is(err, context.Canceled) {
		t.Errorf("put: %v, expected %v", err, context.Canceled)
	}
	held.end <- nil
	if err := <-first; err != nil {
		t.Errorf("the put that was waited for: %v", err)
	}
	b.Discard()
	if after := p.Usage(); after != before {
		t.Errorf("after all was discarded: %+v, before %+v", after, before)
	}
}

type readerFunc func([]byte) (int, error)

func (f readerFunc) Read(b []byte) (int, error) { return f(b) }

// A put whose write fails leaves nothing, wherever it diverges from contents of the pool.
func TestPutFaults(t *testing.T) {
	first := random(1, 1<<20)
	other := bytes.Clone(first)
	other[3*chunk] ^= 1
	for at := 1; ; at++ {
		f := &faults{}
		p, err := Create(newSimRegion(simSize, f), filepath.Join(fastDir(t), "index"), Options{})
		if err != nil {
			t.Fatal(err)
		}
		defer p.Close()
		b := p.Begin()
		defer b.Discard()
		put(t, b, first)
		before := p.Usage()
		f.n, f.at = 0, at
		if _, err := b.Put(ctx, int64(len(other)), bytes.NewReader(other)); err == nil {
			if at < 4 {
				t.Errorf("only %d operations in a put", at-1)
			}
			break
		} else if !errors.Is(err, errFault) {
			t.Fatal(err)
		}
		if after := p.Usage(); after != before {
			t.Errorf("operation %d failed, usage %+v, before %+v", at, after, before)
		}
		put(t, b, other)
		mustCheck(t, p)
	}
}

// A put that compares with contents of the pool, and then diverges or fails, holds them no longer.
func TestPutReleasesAlike(t *testing.T) {
	p := newTestPool(t, 64<<20)
	before := p.Usage()
	b := p.Begin()
	first := random(1, 3*chunk)
	put(t, b, first)
	other := bytes.Clone(first)
	other[2*chunk] ^= 1
	put(t, b, other)
	put(t, b, first)
	short := bytes.NewReader(first[:2*chunk])
	if _, err := b.Put(ctx, int64(len(first)), short); !errors.Is(err, io.ErrUnexpectedEOF) {
		t.Errorf("put of contents that end early: %v", err)
	}
	b.Discard()
	if after := p.Usage(); after != before {
		t.Errorf("after all was discarded: %+v, before %+v", after, before)
	}
}

// failingReads fails one read of a region.
type failingReads struct {
	region.Region
	n, at int
}

func (r *failingReads) ReadAt(b []byte, off int64) (int, error) {
	if r.n++; r.n == r.at {
		return 0, errFault
	}
	return r.Region.ReadAt(b, off)
}

// A put fails if it cannot read the contents with which it compares or from which it copies.
func TestPutReadFaults(t *testing.T) {
	p := newTestPool(t, 64<<20)
	b := p.Begin()
	defer b.Discard()
	first := random(1, 4*chunk)
	put(t, b, first)
	other := bytes.Clone(first)
	other[2*chunk] ^= 1
	before := p.Usage()
	r := &failingReads{Region: p.region}
	p.region = r
	defer func() { p.region = r.Region }()
	for r.at = 1; ; r.at++ {
		r.n = 0
		_, err := b.Put(ctx, int64(len(other)), bytes.NewReader(other))
		if r.n < r.at {
			if err != nil || r.n != 5 {
				t.Errorf("%v after %d reads, expected to compare 3 chunks and to copy 2", err, r.n)
			}
			break
		}
		if after := p.Usage(); !errors.Is(err, errFault) || after != before {
			t.Fatalf("read %d failed: %v, usage %+v, before %+v", r.at, err, after, before)
		}
	}
}

// The rest of the last page is zero even if the system could not clear the space that was freed before.
func TestTailInUsedSpace(t *testing.T) {
	for _, size := range []int{2 * alloc.Unit, chunk, 2 * chunk} {
		f := &faults{only: "punch"}
		p, err := Create(newSimRegion(simSize, f), filepath.Join(fastDir(t), "index"), Options{})
		noError(t, err)
		defer p.Close()
		f.n, f.at, f.stay = 0, 1, true
		b := p.Begin()
		used := put(t, b, random(1, size))
		b.Discard()
		b = p.Begin()
		d := put(t, b, random(2, size-100))
		if d.Off != used.Off || f.n == 0 {
			t.Errorf("%d bytes are at %d, expected the used space at %d", size, d.Off, used.Off)
		}
		noError(t, b.CommitLayer(ctx, "a", nil))
		mustCheck(t, p)
	}
}

// A layer that exists stays, and a batch that is committed to it gives up its contents.
func TestCommitExisting(t *testing.T) {
	p := newTestPool(t, 64<<20)
	for i, payload := range []string{"first", "second"} {
		b := p.Begin()
		put(t, b, random(uint64(i), 5000))
		noError(t, b.CommitLayer(ctx, "a", []byte(payload)))
	}
	if got, err := p.Layer("a"); err != nil || string(got) != "first" {
		t.Errorf("the layer is %q, %v", got, err)
	}
	if n := p.Usage().ExtentCount; n != 1 {
		t.Errorf("%d extents, expected the one of the layer", n)
	}
}

// Contents are found by their digest even if more contents begin alike than a put compares with.
func TestPutManyAlike(t *testing.T) {
	p := newTestPool(t, 64<<20)
	b := p.Begin()
	defer b.Discard()
	var places []int64
	var all [][]byte
	for i := range maxAlike + 2 {
		body := random(1, 2*chunk)
		body[chunk+i] ^= 1
		all = append(all, body)
		places = append(places, put(t, b, body).Off)
	}
	for i, body := range all {
		if d := put(t, b, body); d.Off != places[i] {
			t.Errorf("contents %d are at %d and at %d", i, places[i], d.Off)
		}
	}
	if n := p.Usage().ExtentCount; n != len(all) {
		t.Errorf("%d extents, expected %d", n, len(all))
	}
}
