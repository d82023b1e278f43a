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
	// maxGap is the largest gap that is fetched to save a request, in bytes.
	maxGap = 64 << 10
	// freeGap is the largest gap that is always fetched: the headers of a request are as large.
	freeGap = 1 << 10
	// maxWaste limits all gaps to 1/10 of the needed bytes, unless there are more requests than manySpans.
	maxWaste  = 10
	manySpans = 256
	// maxPart bounds a request. All concurrent requests are in memory.
	maxPart = 4 << 20
)

// span is the bytes [from, to) of a blob.
type span struct{ from, to int64 }

// join joins ordered spans over small gaps, the smallest gaps first. needed is the number of bytes to
// fetch without the gaps.
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

// cut cuts spans into parts of at most maxPart.
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

// fetcher fetches parts of a blob in order and ahead of the reader. Its methods belong to one goroutine.
type fetcher struct {
	src    Source
	parts  []span
	ctx    context.Context
	cancel context.CancelFunc

	started int
	results chan chan result // of started parts not yet read, in order
	running sync.WaitGroup

	reading int    // index of the current part; -1 before the first
	buf     []byte // its bytes
	fetched int64  // bytes of all parts read so far
}

// sourceError is an error of a Source. It never matches io.EOF: a lost connection does not end the contents.
type sourceError struct{ err error }

func (e sourceError) Error() string        { return e.err.Error() }
func (e sourceError) Is(target error) bool { return target != io.EOF && errors.Is(e.err, target) }
func (e sourceError) As(target any) bool   { return errors.As(e.err, target) }

type result struct {
	b   []byte
	err error
}

// newFetcher fetches at most ahead parts concurrently. The caller closes it.
func newFetcher(ctx context.Context, src Source, parts []span, ahead int) *fetcher {
	f := &fetcher{src: src, parts: parts, results: make(chan chan result, ahead), reading: -1}
	f.ctx, f.cancel = context.WithCancel(ctx)
	return f
}

// read reads bytes from off on. Offsets must not decrease.
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

// Close cancels running requests.
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
