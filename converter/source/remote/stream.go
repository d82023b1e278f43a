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

// progress is how many bytes make the limits of retries count anew. A registry that sends a byte for each connection
// would keep us for ever otherwise.
const progress = 64 << 10

// stream reads a blob, and asks for the rest when the connection is lost: layers are large, and registries give up on
// whoever reads slowly. Read is for one goroutine, Close for any.
type stream struct {
	repo   *Repository
	want   ocispec.Descriptor
	hosts  []*endpoint // in the order in which they are asked
	from   *endpoint   // that body comes from
	ctx    context.Context
	cancel context.CancelFunc // Close
	at     int64
	mark   int64 // at when the budget was new
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

// open asks for what comes next, and replaces the body.
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
		if ctx.Err() != nil { // Close may have been before us
			body.Close()
		}
		return ctx.Err()
	})
}

func (s *stream) Read(p []byte) (int, error) {
	for {
		n, err := s.body.Read(p)
		s.at += int64(n)
		all := s.at >= s.want.Size // of what was promised; the reader finds out if there is more
		switch {
		case err == nil:
			return n, nil
		case err == io.EOF && (all || s.want.Size == 0), all && s.want.Size > 0:
			return n, io.EOF
		case n > 0:
			return n, nil // the error comes again
		}
		if s.ctx.Err() != nil {
			return 0, context.Cause(s.ctx)
		}
		if err := s.resume(err); err != nil {
			return 0, err
		}
	}
}

// resume goes on after the body gave err.
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

// last makes e the host that is asked last: it began to send, and did not go on.
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
