package chunked

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"slices"
	"sync"
)

const (
	// maxGap is how many bytes that nobody needs are fetched at most rather than a further request made.
	maxGap = 64 << 10
	// freeGap is how many are always fetched: what a request and its answer say besides takes as many.
	freeGap = 1 << 10
	// maxWaste is which part (1/10) of what is needed all gaps may take, unless there would be more requests than
	// manySpans.
	maxWaste  = 10
	manySpans = 256
	// maxPart bounds a request. As many of them as are made at once are in memory.
	maxPart = 4 << 20
)

// span are bytes [from, to) of a blob.
type span struct{ from, to int64 }

// join joins spans, which come in order, over small gaps, the smallest ones first. needed is how many bytes are fetched
// besides the gaps.
func join(spans []span, needed int64) []span {
	gaps := make([]int, 0, len(spans)) // before each span but the first
	for i := 1; i < len(spans); i++ {
		gaps = append(gaps, i)
	}
	gap := func(i int) int64 { return spans[i].from - spans[i-1].to }
	slices.SortFunc(gaps, func(a, b int) int { return cmp.Or(cmp.Compare(gap(a), gap(b)), cmp.Compare(a, b)) })
	joined := make([]bool, len(spans))
	waste, left := int64(0), len(spans)
	for _, i := range gaps {
		n := gap(i)
		if n > maxGap || n > freeGap && left <= manySpans && waste+n > needed/maxWaste {
			break
		}
		joined[i] = true
		waste += n
		left--
	}
	var out []span
	for i, s := range spans {
		if joined[i] {
			out[len(out)-1].to = s.to
		} else {
			out = append(out, s)
		}
	}
	return out
}

// cut makes parts of spans that are at most maxPart long.
func cut(spans []span) []span {
	var parts []span
	for _, s := range spans {
		for ; s.to-s.from > maxPart; s.from += maxPart {
			parts = append(parts, span{s.from, s.from + maxPart})
		}
		parts = append(parts, s)
	}
	return parts
}

// fetcher fetches parts of a blob in order, some of them ahead of what is read. Its methods are for one goroutine.
type fetcher struct {
	src    Source
	parts  []span
	ctx    context.Context
	cancel context.CancelFunc

	started int
	results chan chan result // of the parts that were started and not read, in their order
	running sync.WaitGroup

	reading int    // the part that is being read; -1: none yet
	buf     []byte // its bytes
	fetched int64  // bytes of all parts that were read
}

// sourceError is an error of a Source. A connection that was lost is no end of anything that is read.
type sourceError struct{ err error }

func (e sourceError) Error() string        { return e.err.Error() }
func (e sourceError) Is(target error) bool { return target != io.EOF && errors.Is(e.err, target) }
func (e sourceError) As(target any) bool   { return errors.As(e.err, target) }

type result struct {
	b   []byte
	err error
}

// newFetcher fetches at most ahead parts at once. The caller closes it.
func newFetcher(ctx context.Context, src Source, parts []span, ahead int) *fetcher {
	f := &fetcher{src: src, parts: parts, results: make(chan chan result, ahead), reading: -1}
	f.ctx, f.cancel = context.WithCancel(ctx)
	return f
}

// read reads bytes from off on. Offsets never go back.
func (f *fetcher) read(p []byte, off int64) (int, error) {
	for f.reading < 0 || off >= f.parts[f.reading].to {
		if err := f.next(); err != nil {
			return 0, err
		}
	}
	s := f.parts[f.reading]
	if off < s.from {
		return 0, fmt.Errorf("bytes from %d on were not asked for", off)
	}
	return copy(p, f.buf[off-s.from:]), nil
}

// next waits for the next part.
func (f *fetcher) next() error {
	f.buf = nil
	for f.started < len(f.parts) && len(f.results) < cap(f.results) {
		s, done := f.parts[f.started], make(chan result, 1)
		f.started++
		f.results <- done
		f.running.Go(func() {
			b, err := f.src.Part(f.ctx, s.from, s.to)
			if err == nil && int64(len(b)) != s.to-s.from {
				err = invalidf("%d bytes from %d on, expected %d", len(b), s.from, s.to-s.from)
			}
			if err != nil {
				err = sourceError{err}
			}
			done <- result{b, err}
		})
	}
	if len(f.results) == 0 {
		return io.ErrUnexpectedEOF
	}
	r := <-<-f.results
	if r.err != nil {
		return r.err
	}
	f.reading++
	f.buf = r.b
	f.fetched += int64(len(r.b))
	return nil
}

// Close ends what is being fetched.
func (f *fetcher) Close() {
	f.cancel()
	f.running.Wait()
}

// frames reads the bytes [off, to).
type frames struct {
	f       *fetcher
	off, to int64
}

func (r *frames) Read(p []byte) (int, error) {
	if r.off >= r.to {
		return 0, io.EOF
	}
	n, err := r.f.read(p[:min(int64(len(p)), r.to-r.off)], r.off)
	r.off += int64(n)
	return n, err
}
