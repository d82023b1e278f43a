package daxfs

import (
	"bytes"
	"errors"
	"io"
	"math/rand/v2"
	"testing"
)

// countedReader counts the calls of ReadAt.
type countedReader struct {
	io.ReaderAt
	calls int
}

func (c *countedReader) ReadAt(p []byte, off int64) (int, error) {
	c.calls++
	return c.ReaderAt.ReadAt(p, off)
}

// TestReadCache: every read gives the same as the underlying reader, the end included, in far fewer calls.
func TestReadCache(t *testing.T) {
	r := rand.New(rand.NewPCG(1, 2))
	b := make([]byte, 2<<20+12345)
	for i := range b {
		b[i] = byte(r.Uint32())
	}
	below := &countedReader{ReaderAt: bytes.NewReader(b)}
	c := NewReadCache(below, int64(len(b)))
	read := func(off int64, n int) {
		got, want := make([]byte, n), make([]byte, n)
		gotN, gotErr := c.ReadAt(got, off)
		wantN, wantErr := bytes.NewReader(b).ReadAt(want, off)
		if gotN != wantN || !errors.Is(gotErr, wantErr) || !bytes.Equal(got, want) {
			t.Fatalf("%d bytes at %d: %d, %v, expected %d, %v", n, off, gotN, gotErr, wantN, wantErr)
		}
	}
	for range 2000 {
		read(r.Int64N(int64(len(b))+10), r.IntN(3*cacheChunk))
	}
	if _, err := c.ReadAt(make([]byte, 1), -1); err == nil {
		t.Error("a negative offset is no error")
	}
	below.calls = 0
	for off := int64(0); off < int64(len(b)); off += 64 {
		read(off, 64)
	}
	if most := len(b)/cacheChunk + 1; below.calls > most {
		t.Errorf("%d reads below, expected at most %d", below.calls, most)
	}
}
