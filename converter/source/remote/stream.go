package remote

import (
	"context"
	"errors"
	"fmt"
	"io"
	"sync"

	"github.com/containerd/containerd/v2/core/images"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// progress is the number of bytes that resets the limits of retries. With a smaller one, a registry
// that sends a byte per connection would keep a reader for ever.
const progress = 64 << 10

// stream reads a blob and requests the rest after a lost connection: layers are large, and registries
// disconnect slow readers. Read belongs to one goroutine; any may call Close.
type stream struct {
	repo   *Repository
	want   ocispec.Descriptor
	hosts  []*endpoint // in the order of trial
	from   *endpoint   // origin of body
	ctx    context.Context
	cancel context.CancelFunc // for Close
	at     int64
	mark   int64 // at when the budget was reset
	budget budget

	mu   sync.Mutex // guards changes of body, which only Read makes
	body io.ReadCloser
}

func (s *stream) kind() string {
	if images.IsManifestType(s.want.MediaType) || images.IsIndexType(s.want.MediaType) {
		return "manifests"
	}
	return "blobs"
}

func (s *stream) what() string {
	return fmt.Sprintf("%s %s", s.kind()[:len(s.kind())-1], s.want.Digest)
}

// open requests the rest of the blob and replaces the body.
func (s *stream) open() error {
	var accept []string
	if s.kind() == "manifests" {
		accept = manifestTypes
	}
	return s.repo.try(s.ctx, s.what(), s.hosts, &s.budget, func(ctx context.Context, e *endpoint) error {
		u := e.url(s.repo.path, s.kind(), s.want.Digest.String())
		body, err := e.blob(ctx, u, accept, s.at, s.want.Size)
		if err != nil {
			return err
		}
		s.from = e
		s.mu.Lock()
		defer s.mu.Unlock()
		if s.body != nil {
			s.body.Close()
		}
		s.body = body
		if ctx.Err() != nil { // Close may have come first
			body.Close()
		}
		return ctx.Err()
	})
}

func (s *stream) Read(p []byte) (int, error) {
	for {
		n, err := s.body.Read(p)
		s.at += int64(n)
		all := s.at >= s.want.Size // of the promised bytes; the reader detects additional ones
		switch {
		case err == nil:
			return n, nil
		case err == io.EOF && (all || s.want.Size == 0), all && s.want.Size > 0:
			return n, io.EOF
		case n > 0:
			return n, nil // the error will be repeated
		}
		if s.ctx.Err() != nil {
			return 0, context.Cause(s.ctx)
		}
		if err := s.resume(err); err != nil {
			return 0, err
		}
	}
}

// resume continues after the error err of the body.
func (s *stream) resume(err error) error {
	if errors.Is(err, io.EOF) {
		err = io.ErrUnexpectedEOF
	}
	err = fmt.Errorf("%s: connection lost: %w", s.from.name, err)
	if s.at-s.mark >= progress {
		s.mark, s.budget = s.at, budget{}
	} else {
		s.last(s.from)
		s.budget.failures++
		until := s.budget.waited + s.budget.pause()
		if s.budget.failures >= maxAttempts || until > maxWait {
			return s.repo.failed(s.what(), []*endpoint{s.from}, []error{err}, &s.budget)
		}
		if err := s.repo.wait(s.ctx, s.what(), err, &s.budget, until); err != nil {
			return err
		}
	}
	return s.open()
}

// last moves e to the end of the hosts: it started to send and stopped.
func (s *stream) last(e *endpoint) {
	var order []*endpoint
	for _, h := range s.hosts {
		if h != e {
			order = append(order, h)
		}
	}
	s.hosts = append(order, e)
}

func (s *stream) Close() error {
	s.cancel()
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.body.Close()
}
