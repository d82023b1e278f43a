package daxfs

import (
	"errors"
	"fmt"
	"io"
)

// Mapped is an io.ReaderAt whose bytes are all in memory. Readers of an image use that memory without
// copying. The bytes must stay mapped for as long as anything opened on them is in use.
type Mapped interface {
	io.ReaderAt
	// Bytes returns the memory, or nil if there is none and ReadAt must be used.
	Bytes() []byte
}

// Mem is an image in memory, for instance a mapped file. It is a Mapped reader.
type Mem []byte

// Bytes returns the memory itself.
func (m Mem) Bytes() []byte { return m }

// ReadAt implements io.ReaderAt.
func (m Mem) ReadAt(p []byte, off int64) (int, error) {
	if off < 0 {
		return 0, fmt.Errorf("daxfs: negative offset %d", off)
	}
	if off >= int64(len(m)) {
		return 0, io.EOF
	}
	n := copy(p, m[off:])
	if n < len(p) {
		return n, io.EOF
	}
	return n, nil
}

// source gives bounds-checked access to the bytes of an image. It is safe for concurrent use if its reader is.
//
// The memory is shared, so bytes may change at any time. Callers decode a value once and check the
// decoded copy; they never check a byte and read it again.
type source struct {
	r    io.ReaderAt
	b    []byte // the whole image if it is in memory, else nil
	size int64
}

// maxImage is the reach of 32-bit block numbers. The sum of two offsets in an image does not overflow.
const maxImage = (1<<32 - 1) * BlockSize

func newSource(r io.ReaderAt, size int64) (source, error) {
	if size < BlockSize {
		return source{}, corrupt(RuleImageSize, -1, 0, "size is %d bytes, expected at least %d", size, BlockSize)
	}
	if size > maxImage {
		return source{},
			unsupported(RuleImageSize, -1, 0, "size is %d bytes, expected at most %d", size, int64(maxImage))
	}
	s := source{r: r, size: size}
	if m, ok := r.(Mapped); ok {
		if b := m.Bytes(); int64(len(b)) >= size {
			s.b = b[:size:size]
		}
	}
	return s, nil
}

// reader returns the source as a reader that Open uses without copying.
func (s *source) reader() io.ReaderAt {
	if s.b != nil {
		return Mem(s.b)
	}
	return s.r
}

// holds reports whether [off, off+n) lies in the image. It is safe for any values.
func (s *source) holds(off, n int64) bool {
	return off >= 0 && n >= 0 && off <= s.size && n <= s.size-off
}

// view returns the n bytes at off: memory of the image, or a fresh copy. The caller must not write to them.
//
// Preconditions: n is bounded by what the caller uses at once.
func (s *source) view(off int64, n int) ([]byte, error) {
	if !s.holds(off, int64(n)) {
		return nil, fmt.Errorf("daxfs: read of %d bytes at %d: outside of the image of %d bytes", n, off, s.size)
	}
	if s.b != nil {
		return s.b[off : off+int64(n) : off+int64(n)], nil
	}
	p := make([]byte, n)
	if err := s.readFull(p, off); err != nil {
		return nil, err
	}
	return p, nil
}

func (s *source) readFull(p []byte, off int64) error {
	if !s.holds(off, int64(len(p))) {
		return fmt.Errorf("daxfs: read of %d bytes at %d: outside of the image of %d bytes", len(p), off, s.size)
	}
	if s.b != nil {
		copy(p, s.b[off:])
		return nil
	}
	n, err := s.r.ReadAt(p, off)
	if n == len(p) {
		return nil
	}
	if err == nil || errors.Is(err, io.EOF) {
		err = io.ErrUnexpectedEOF
	}
	return fmt.Errorf("daxfs: read of %d bytes at %d: %w", len(p), off, err)
}
