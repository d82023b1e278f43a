package blob

import (
	"cmp"
	"context"
	_ "crypto/sha256" // the algorithms that a digest may name
	_ "crypto/sha512"
	"errors"
	"fmt"
	"io"
	"sync"

	"github.com/klauspost/compress/zstd"
	"github.com/opencontainers/go-digest"
)

// maxWindow bounds the memory of a zstd frame: the window of zstd --long=27, the default limit of zstd.
const maxWindow = 128 << 20

var (
	// ErrMismatch is wrapped by every *MismatchError.
	ErrMismatch = errors.New("blob does not match its description")
	// ErrTooLarge reports a layer larger than Spec.MaxSize after decompression.
	ErrTooLarge = errors.New("layer exceeds the size limit")
)

// MismatchError names the property of a blob that differs from its description.
type MismatchError struct {
	What      string // "size", "digest" or "diff ID"
	Want, Got string
}

func (e *MismatchError) Error() string {
	return fmt.Sprintf("%s mismatch: expected %s, found %s", e.What, e.Want, e.Got)
}

// Unwrap makes errors.Is(err, ErrMismatch) true.
func (e *MismatchError) Unwrap() error { return ErrMismatch }

// Spec describes a layer blob before it is read. Unknown properties are zero and not verified.
type Spec struct {
	// MediaType is the layer's media type. If it is empty, the first bytes determine the compression.
	MediaType string
	// Digest and Size describe the stored blob; Size is in bytes.
	Digest digest.Digest
	Size   int64
	// DiffID is the digest of the uncompressed tar.
	DiffID digest.Digest
	// MaxSize limits the bytes of the uncompressed tar; 0 means no limit.
	MaxSize int64
	// Progress is called by one goroutine with the number of bytes just read from the source.
	Progress func(n int)
}

// Reader reads the uncompressed tar of one layer. Its methods belong to one goroutine.
type Reader struct {
	reader
	spec        Spec
	src         io.ReadCloser
	closeSource func() error // runs once
	ctx         context.Context
	cancel      context.CancelCauseFunc
	stages      sync.WaitGroup

	raw *hasher // of the blob; nil if Digest is unknown
	tar *hasher // of the uncompressed tar; nil if it equals the blob, or while that is unknown

	read int64 // bytes read from the blob
	size int64 // bytes of the tar
	// trailing is true if ignored bytes follow the compressed data.
	trailing bool
	looks    string // apparent compression of the tar, for the message if it cannot be parsed
	srcErr   error  // why reading the blob failed; nil at its end
	digest   digest.Digest
	diffID   digest.Digest
}

// NewReader starts to read src and takes ownership of it: Close closes src, and so does a failing
// NewReader. Cancelling ctx ends all reads with its cause.
func NewReader(ctx context.Context, src io.ReadCloser, spec Spec) (*Reader, error) {
	pack, err := packingOf(spec.MediaType)
	for _, d := range []digest.Digest{spec.Digest, spec.DiffID} {
		if d != "" && err == nil {
			if err = d.Validate(); err != nil {
				err = fmt.Errorf("digest %q: %w", d, err)
			}
		}
	}
	if err != nil {
		src.Close()
		return nil, err
	}
	ctx, cancel := context.WithCancelCause(ctx)
	r := &Reader{spec: spec, src: src, ctx: ctx, cancel: cancel, closeSource: sync.OnceValue(src.Close)}
	context.AfterFunc(ctx, func() { r.closeSource() }) // interrupts a read from a network
	in, out := newStream(ctx), newStream(ctx)
	r.reader.s = out
	if spec.Digest != "" {
		r.raw = newHasher(spec.Digest.Algorithm().Hash())
	}
	r.stages.Add(2)
	go func() {
		defer r.stages.Done()
		r.srcErr = r.fetch(in)
		in.close(r.srcErr)
		if r.raw != nil {
			r.raw.close()
		}
	}()
	go func() {
		defer r.stages.Done()
		out.close(r.unpack(pack, in, out))
		if r.tar != nil {
			r.tar.close()
		}
	}()
	return r, nil
}

// fetch reads the source to its end, to one byte past its size, or to an error.
func (r *Reader) fetch(in *stream) error {
	for {
		c := newChunk()
		n, err := io.ReadFull(r.src, c.buf[:])
		c.n = n
		r.read += int64(n)
		if r.spec.Progress != nil && n > 0 {
			r.spec.Progress(n)
		}
		if r.spec.Size > 0 && r.read > r.spec.Size {
			c.release()
			return &MismatchError{"size", fmt.Sprint(r.spec.Size, " bytes"), "more"}
		}
		if n == 0 {
			c.release()
		} else {
			if r.raw != nil {
				r.raw.add(c)
			}
			if err := in.send(c); err != nil {
				return err
			}
		}
		switch err {
		case nil:
		case io.EOF, io.ErrUnexpectedEOF: // from ReadFull: the source ended
			return nil
		default:
			return fmt.Errorf("read after %d bytes: %w", r.read, err)
		}
	}
}

// unpack decompresses the blob into the tar. It always reads the blob to its end, so that a wrong blob
// can be told from a decompressor's error.
func (r *Reader) unpack(pack packing, in, out *stream) error {
	src := &reader{s: in}
	defer src.drop()
	if pack == sniffed || pack == plain {
		if err := src.fill(); err != nil && !errors.Is(err, io.EOF) {
			return err
		}
		var head []byte // of a nonempty blob
		if src.cur != nil {
			head = src.cur.bytes()
		}
		if pack == sniffed {
			pack = sniff(head)
		}
		if pack == plain {
			r.looks = LooksLike(head)
		}
	}
	algo := r.diffAlgorithm()
	if pack != plain || r.raw == nil || r.spec.Digest.Algorithm() != algo {
		r.tar = newHasher(algo.Hash())
	}
	var dec io.WriterTo
	switch pack {
	case plain:
		return r.forward(src, out)
	case gzipped:
		z, err := newGzipMembers(src)
		if err != nil {
			return fmt.Errorf("gzip: %w", err)
		}
		dec = z
	case zstandard:
		z, err := zstd.NewReader(src, zstd.WithDecoderMaxWindow(maxWindow), zstd.WithDecoderLowmem(true),
			zstd.WithDecoderConcurrency(2))
		if err != nil {
			return fmt.Errorf("zstd: %w", err)
		}
		defer z.Close()
		dec = z
	}
	w := &chunkWriter{r: r, out: out}
	_, err := dec.WriteTo(w)
	if errors.Is(err, zstd.ErrMagicMismatch) && w.written > 0 {
		err = errTrailing // the first bytes behind a frame are not a frame
	}
	if errors.Is(err, errTrailing) && r.spec.DiffID != "" {
		r.trailing, err = true, nil // the diff ID detects missing data
	}
	if err == nil {
		err = w.flush()
	}
	w.drop()
	if err != nil && (src.err == nil || errors.Is(src.err, io.EOF)) && w.err == nil {
		err = fmt.Errorf("%s: %w", pack, err) // an error of neither the source nor the consumer
	}
	return err
}

// forward passes the chunks of an uncompressed blob through.
func (r *Reader) forward(src *reader, out *stream) error {
	for {
		if err := src.fill(); errors.Is(err, io.EOF) {
			return nil
		} else if err != nil {
			return err
		}
		c := src.cur
		src.cur = nil
		if err := r.emit(c, out); err != nil {
			return err
		}
	}
}

// emit hashes one chunk of the tar and sends it.
func (r *Reader) emit(c *chunk, out *stream) error {
	r.size += int64(c.n)
	if r.spec.MaxSize > 0 && r.size > r.spec.MaxSize {
		c.release()
		return fmt.Errorf("%w of %d bytes", ErrTooLarge, r.spec.MaxSize)
	}
	if r.tar != nil {
		r.tar.add(c)
	}
	return out.send(c)
}

// chunkWriter collects the decompressor's output in chunks.
type chunkWriter struct {
	r   *Reader
	out *stream
	cur *chunk
	err error // why the consumer wants no more bytes

	written int64
}

func (w *chunkWriter) Write(p []byte) (int, error) {
	total := len(p)
	w.written += int64(total)
	for len(p) > 0 {
		if w.cur == nil {
			w.cur = newChunk()
		}
		n := copy(w.cur.buf[w.cur.n:], p)
		w.cur.n += n
		p = p[n:]
		if w.cur.n == chunkSize {
			if err := w.flush(); err != nil {
				return 0, err
			}
		}
	}
	return total, nil
}

func (w *chunkWriter) flush() error {
	c := w.cur
	w.cur = nil
	if c == nil {
		return nil
	}
	w.err = w.r.emit(c, w.out)
	return w.err
}

func (w *chunkWriter) drop() {
	if w.cur != nil {
		w.cur.release()
		w.cur = nil
	}
}

// Finish reads the rest that the parser left (padding after the tar counts for the hashes), verifies
// size, digest and diff ID, and closes the Reader. cause is the parser's error. Finish returns it only
// if the blob is correct, because a damaged blob explains the failure better.
func (r *Reader) Finish(cause error) error {
	defer r.Close()
	_, readErr := r.reader.WriteTo(io.Discard)
	r.stages.Wait()
	if err := context.Cause(r.ctx); err != nil {
		return cmp.Or(cause, err)
	}
	if r.srcErr != nil {
		return r.srcErr // too long, or not read to its end: the hash means nothing
	}
	if err := r.verifyBlob(); err != nil {
		return err
	}
	if err := cmp.Or(cause, readErr); err != nil {
		if r.looks != "" {
			said := "gzip, zstd or an uncompressed tar"
			if r.spec.MediaType != "" {
				said += fmt.Sprintf(", as media type %q says", r.spec.MediaType)
			}
			return fmt.Errorf("%w (it looks like %s, expected %s)", err, r.looks, said)
		}
		return err
	}
	r.diffID = r.digest
	if r.tar != nil {
		r.diffID = digest.NewDigest(r.diffAlgorithm(), r.tar.h)
	}
	if r.spec.DiffID != "" && r.diffID != r.spec.DiffID {
		err := &MismatchError{"diff ID", r.spec.DiffID.String(), r.diffID.String()}
		if r.trailing {
			return fmt.Errorf("%w (%w)", err, errTrailing)
		}
		return err
	}
	return nil
}

func (r *Reader) diffAlgorithm() digest.Algorithm {
	if r.spec.DiffID != "" {
		return r.spec.DiffID.Algorithm()
	}
	return digest.Canonical
}

func (r *Reader) verifyBlob() error {
	if r.spec.Size > 0 && r.read != r.spec.Size {
		return &MismatchError{"size", fmt.Sprint(r.spec.Size, " bytes"), fmt.Sprint(r.read, " bytes")}
	}
	if r.raw != nil {
		r.digest = digest.NewDigest(r.spec.Digest.Algorithm(), r.raw.h)
		if r.digest != r.spec.Digest {
			return &MismatchError{"digest", r.spec.Digest.String(), r.digest.String()}
		}
	}
	return nil
}

// DiffID returns the digest of the uncompressed tar. It is valid once Finish has returned nil.
func (r *Reader) DiffID() digest.Digest { return r.diffID }

// Size returns the size of the uncompressed tar in bytes. It is valid once Finish has returned nil.
func (r *Reader) Size() int64 { return r.size }

// BytesRead returns the bytes read from the source. It is valid once Finish has returned.
func (r *Reader) BytesRead() int64 { return r.read }

var errClosed = errors.New("blob reader is closed")

// Close ends reading and closes the source. It may be called repeatedly, also after Finish.
func (r *Reader) Close() error {
	r.cancel(errClosed) // also closes the source
	r.reader.drop()
	r.stages.Wait()
	r.closeSource()
	return nil
}
