package blob

import (
	"bytes"
	"encoding/binary"
	"errors"
	"io"
	"runtime"
	"strings"
	"testing"

	"github.com/klauspost/compress/zstd"
)

// TestZstdWindow: a few bytes of a frame can request any window. Windows that zstd accepts by default
// are decoded; nothing larger is allocated.
func TestZstdWindow(t *testing.T) {
	frame := func(windowLog int) []byte {
		// Magic, no flags, window, and an empty last block.
		return []byte{0x28, 0xb5, 0x2f, 0xfd, 0, byte(windowLog-10) << 3, 1, 0, 0}
	}
	single := func(size uint64) []byte { // the window is the whole contents
		b := binary.LittleEndian.AppendUint64([]byte{0x28, 0xb5, 0x2f, 0xfd, 0xe0}, size)
		return append(b, 1, 0, 0)
	}
	for _, c := range []struct {
		name  string
		frame []byte
		ok    bool
	}{
		{"128 MiB", frame(27), true},
		{"256 MiB", frame(28), false},
		{"512 GiB", frame(39), false},
		{"contents of 1 TiB", single(1 << 40), false},
		{"contents of 2^64-1", single(1<<64 - 1), false},
	} {
		var before, after runtime.MemStats
		runtime.ReadMemStats(&before)
		_, _, err := read(t, c.frame, Spec{}, 1<<20)
		runtime.ReadMemStats(&after)
		if c.ok && err != nil || !c.ok && (err == nil || !strings.Contains(err.Error(), "zstd")) {
			t.Errorf("%s: %v", c.name, err)
		}
		if n := after.TotalAlloc - before.TotalAlloc; !c.ok && n > 64<<20 {
			t.Errorf("%s: %d bytes were allocated", c.name, n)
		}
	}
}

// TestWindowOfLongDistance: the output of zstd --long=27 can be read.
func TestWindowOfLongDistance(t *testing.T) {
	tar := text(3 << 20)
	var b bytes.Buffer
	w, err := zstd.NewWriter(&b, zstd.WithWindowSize(maxWindow))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := w.Write(tar); err != nil {
		t.Fatal(err)
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	if got, _, err := read(t, b.Bytes(), specOf(b.Bytes(), tar), 1<<30); err != nil || !bytes.Equal(got, tar) {
		t.Errorf("%d bytes (%v), expected %d", len(got), err, len(tar))
	}
}

// TestCut: a blob that ends early is an error even if the digest matches.
func TestCut(t *testing.T) {
	tar := text(1 << 20)
	for _, p := range []packing{gzipped, zstandard} {
		blob := pack(t, tar, p)
		for _, n := range []int{1, 8, len(blob) / 2, len(blob) - 8} {
			cut := blob[:len(blob)-n]
			if _, _, err := read(t, cut, specOf(cut, tar), 1<<30); !errors.Is(err, io.ErrUnexpectedEOF) {
				t.Errorf("%v without its last %d bytes: error %v, expected %v", p, n, err, io.ErrUnexpectedEOF)
			}
		}
	}
}
