package blob

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"io"
	"math/rand/v2"
	"runtime"
	"strings"
	"testing"
	"testing/iotest"
	"time"

	"github.com/klauspost/compress/gzip"
	"github.com/klauspost/compress/zstd"
	"github.com/opencontainers/go-digest"
)

func pack(t testing.TB, b []byte, p packing) []byte {
	t.Helper()
	var out bytes.Buffer
	var w io.WriteCloser
	switch p {
	case plain:
		return b
	case gzipped:
		w = gzip.NewWriter(&out)
	case zstandard:
		z, err := zstd.NewWriter(&out)
		if err != nil {
			t.Fatal(err)
		}
		w = z
	}
	if _, err := w.Write(b); err != nil {
		t.Fatal(err)
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return out.Bytes()
}

// text is compressible, but not to nothing.
func text(n int) []byte {
	rnd := rand.New(rand.NewPCG(1, 2))
	b := make([]byte, n)
	for i := range b {
		b[i] = byte(rnd.Uint32()) & 15
	}
	return b
}

func specOf(blob, tar []byte) Spec {
	return Spec{Digest: digest.FromBytes(blob), Size: int64(len(blob)), DiffID: digest.FromBytes(tar)}
}

// read reads a blob like a parser that stops before the end.
func read(t *testing.T, blob []byte, spec Spec, stop int64) ([]byte, *Reader, error) {
	t.Helper()
	r, err := NewReader(context.Background(), io.NopCloser(bytes.NewReader(blob)), spec)
	if err != nil {
		return nil, nil, err
	}
	b, err := io.ReadAll(io.LimitReader(r, stop))
	return b, r, r.Finish(err)
}

func TestRead(t *testing.T) {
	for _, n := range []int{0, 1, 511, chunkSize - 1, chunkSize, chunkSize + 1, 5*chunkSize + 77} {
		tar := text(n)
		for _, p := range []packing{plain, gzipped, zstandard} {
			blob := pack(t, tar, p)
			for _, stop := range []int64{int64(n), int64(n) / 2, 0} {
				got, r, err := read(t, blob, specOf(blob, tar), stop)
				if err != nil {
					t.Fatalf("%v, %d bytes: %v", p, n, err)
				}
				if !bytes.Equal(got, tar[:stop]) {
					t.Errorf("%v, %d bytes: another content", p, n)
				}
				if r.DiffID() != digest.FromBytes(tar) || r.Size() != int64(n) || r.BytesRead() != int64(len(blob)) {
					t.Errorf("%v: diff ID %s, size %d, read %d; expected %s, %d, %d",
						p, r.DiffID(), r.Size(), r.BytesRead(), digest.FromBytes(tar), n, len(blob))
				}
			}
		}
	}
}

// TestDiffIDIsComputed: a differ does not know the diff ID beforehand.
func TestDiffIDIsComputed(t *testing.T) {
	tar := text(100_000)
	for _, p := range []packing{plain, gzipped} {
		blob := pack(t, tar, p)
		_, r, err := read(t, blob, Spec{Digest: digest.FromBytes(blob)}, 10)
		if err != nil || r.DiffID() != digest.FromBytes(tar) {
			t.Errorf("%v: diff ID %s (%v), expected %s", p, r.DiffID(), err, digest.FromBytes(tar))
		}
	}
}

// TestOtherAlgorithms: digest and diff ID may use different algorithms.
func TestOtherAlgorithms(t *testing.T) {
	tar := text(300_000)
	spec := Spec{Digest: digest.SHA512.FromBytes(tar), DiffID: digest.SHA256.FromBytes(tar)}
	if _, _, err := read(t, tar, spec, 10); err != nil {
		t.Error(err)
	}
	spec.DiffID = digest.SHA384.FromBytes(tar)
	if _, _, err := read(t, tar, spec, 10); err != nil {
		t.Error(err)
	}
}

func TestSeveralMembers(t *testing.T) {
	tar := text(1_000_000)
	for _, p := range []packing{gzipped, zstandard} {
		blob := append(pack(t, tar[:400_000], p), pack(t, tar[400_000:], p)...)
		if p == zstandard { // like zstd:chunked: a skippable frame at the end and at the start
			skip := []byte{0x50, 0x2a, 0x4d, 0x18, 3, 0, 0, 0, 1, 2, 3}
			blob = append(append(skip, blob...), skip...)
		}
		got, _, err := read(t, blob, specOf(blob, tar), int64(len(tar)))
		if err != nil || !bytes.Equal(got, tar) {
			t.Errorf("%v: %d bytes, %v", p, len(got), err)
		}
	}
}

func TestMismatch(t *testing.T) {
	tar := text(700_000)
	for _, p := range []packing{plain, gzipped, zstandard} {
		blob := pack(t, tar, p)
		good := specOf(blob, tar)
		want := func(what, field string, blob []byte, spec Spec) {
			t.Helper()
			_, _, err := read(t, blob, spec, 1000)
			var m *MismatchError
			if !errors.As(err, &m) || m.What != field || !errors.Is(err, ErrMismatch) {
				t.Errorf("%v, %s: error %v, expected a mismatch of %s", p, what, err, field)
			}
		}
		for _, at := range []int{0, len(blob) / 2, len(blob) - 1} {
			bad := bytes.Clone(blob)
			bad[at] ^= 0x10
			want("a flipped bit", "digest", bad, good)
		}
		want("a short blob", "size", blob[:len(blob)-1], good)
		want("a long blob", "size", append(bytes.Clone(blob), 0), good)
		spec := good
		spec.DiffID = digest.FromString("x")
		want("a wrong diff ID", "diff ID", blob, spec)
	}
}

// TestDamagedBehindTheDigest: the digest is correct, but the blob cannot be decompressed.
func TestDamagedBehindTheDigest(t *testing.T) {
	tar := text(700_000)
	for _, p := range []packing{gzipped, zstandard} {
		blob := pack(t, tar, p)
		bad := bytes.Clone(blob[:len(blob)-1000])
		_, _, err := read(t, bad, specOf(bad, tar), int64(len(tar)))
		if err == nil || errors.Is(err, ErrMismatch) {
			t.Errorf("%v: error %v, expected that of the decompressor", p, err)
		}
	}
}

func TestMediaTypes(t *testing.T) {
	tar := text(5000)
	gz := pack(t, tar, gzipped)
	for _, c := range []struct {
		mediaType string
		blob      []byte
		err       error
	}{
		{"application/vnd.oci.image.layer.v1.tar", tar, nil},
		{"application/vnd.oci.image.layer.v1.tar+gzip", gz, nil},
		{"application/vnd.oci.image.layer.v1.tar+zstd", pack(t, tar, zstandard), nil},
		{"application/vnd.oci.image.layer.nondistributable.v1.tar+gzip", gz, nil},
		{"application/vnd.docker.image.rootfs.diff.tar.gzip", gz, nil},
		{"application/vnd.docker.image.rootfs.diff.tar.gzip", tar, nil}, // relabelled by a tool
		{"application/vnd.docker.image.rootfs.diff.tar", gz, nil},
		{"application/vnd.docker.image.rootfs.foreign.diff.tar.gzip", gz, nil},
		{"", gz, nil},
		{"Application/Vnd.OCI.Image.Layer.v1.Tar+Gzip", gz, nil},
		{"application/vnd.docker.image.rootfs.diff.tar.gzip; charset=binary", gz, nil},
		{"application/vnd.oci.image.layer.v1.tar; x=y", tar, nil},
		{"application/vnd.oci.image.layer.v1.tar+gzip+encrypted", gz, ErrEncrypted},
		{"application/vnd.oci.image.layer.v1.tar+lzma", gz, ErrMediaType},
		{"application/vnd.oci.image.layer.v1.tarball", gz, ErrMediaType},
		{"application/vnd.in-toto+json", gz, ErrMediaType},
	} {
		spec := specOf(c.blob, tar)
		spec.MediaType = c.mediaType
		if _, _, err := read(t, c.blob, spec, 10); !errors.Is(err, c.err) {
			t.Errorf("%q: error %v, expected %v", c.mediaType, err, c.err)
		}
		if err := CheckMediaType(c.mediaType); !errors.Is(err, c.err) {
			t.Errorf("CheckMediaType(%q): %v, expected %v", c.mediaType, err, c.err)
		}
	}
}

// TestOtherCompression: when a tar cannot be parsed, the error says what it looks like.
func TestOtherCompression(t *testing.T) {
	const plainType = "application/vnd.oci.image.layer.v1.tar"
	broken := errors.New("no tar")
	for _, c := range []struct {
		mediaType string
		blob      []byte
		holds     string
	}{
		{"", []byte("BZh91AY&SY..."), "looks like bzip2"},
		{plainType + "+gzip", []byte("\xfd7zXZ\x00..."), "looks like xz"},
		{plainType + "+gzip", []byte("\x78\x9c..."), "looks like zlib"},
		{plainType, pack(t, text(100), gzipped), "looks like gzip"},
		{plainType, pack(t, text(100), zstandard), "looks like zstd"},
		{plainType, text(100), "no tar"},
		{"", nil, "no tar"},
	} {
		for _, cause := range []error{nil, broken} {
			r, err := NewReader(t.Context(), io.NopCloser(bytes.NewReader(c.blob)), Spec{MediaType: c.mediaType})
			if err != nil {
				t.Fatal(err)
			}
			if err := r.Finish(cause); !errors.Is(err, cause) || err != nil && !strings.Contains(err.Error(), c.holds) {
				t.Errorf("%.6q as %q: error %v, expected %v that says %q", c.blob, c.mediaType, err, cause, c.holds)
			}
		}
	}
}

func TestLimit(t *testing.T) {
	tar := make([]byte, 50<<20)
	for _, p := range []packing{plain, gzipped, zstandard} {
		blob := pack(t, tar, p)
		spec := specOf(blob, tar)
		spec.MaxSize = 1 << 20
		if _, _, err := read(t, blob, spec, int64(len(tar))); !errors.Is(err, ErrTooLarge) {
			t.Errorf("%v: error %v, expected %v", p, err, ErrTooLarge)
		}
		spec.MaxSize = int64(len(tar))
		if _, _, err := read(t, blob, spec, int64(len(tar))); err != nil {
			t.Errorf("%v: %v", p, err)
		}
	}
}

func TestSourceError(t *testing.T) {
	tar := text(1_000_000)
	why := errors.New("connection reset")
	for _, p := range []packing{plain, gzipped, zstandard} {
		blob := pack(t, tar, p)
		src := io.MultiReader(bytes.NewReader(blob[:len(blob)/2]), iotest.ErrReader(why))
		r, err := NewReader(context.Background(), io.NopCloser(src), specOf(blob, tar))
		if err != nil {
			t.Fatal(err)
		}
		_, err = io.Copy(io.Discard, r)
		if err := r.Finish(err); !errors.Is(err, why) || errors.Is(err, ErrMismatch) {
			t.Errorf("%v: error %v, expected %v", p, err, why)
		}
	}
}

// hanging is a source that blocks until it is closed.
type hanging struct {
	io.Reader
	closed chan struct{}
}

func (h *hanging) Read(p []byte) (int, error) {
	if n, err := h.Reader.Read(p); err == nil {
		return n, nil
	}
	<-h.closed
	return 0, errors.New("closed")
}

func (h *hanging) Close() error { close(h.closed); return nil }

// TestEndsWithoutFinish: Close and cancelling ctx end all goroutines, even those waiting for the source.
func TestEndsWithoutFinish(t *testing.T) {
	before := runtime.NumGoroutine()
	why := errors.New("stop")
	for _, p := range []packing{plain, gzipped, zstandard} {
		blob := pack(t, text(9<<20), p)
		for _, hang := range []bool{false, true} {
			ctx, cancel := context.WithCancelCause(context.Background())
			n := len(blob)
			if hang {
				n /= 2
			}
			r, err := NewReader(ctx, &hanging{bytes.NewReader(blob[:n]), make(chan struct{})},
				Spec{Digest: digest.FromBytes(blob)})
			if err != nil {
				t.Fatal(err)
			}
			if _, err := io.ReadFull(r, make([]byte, 1000)); err != nil {
				t.Fatal(err)
			}
			cancel(why)
			if hang {
				if err := r.Finish(nil); !errors.Is(err, why) {
					t.Errorf("%v: error %v, expected %v", p, err, why)
				}
			}
			r.Close()
			r.Close()
		}
	}
	for range 3000 {
		if runtime.NumGoroutine() <= before {
			return
		}
		time.Sleep(10 * time.Millisecond)
	}
	t.Errorf("%d goroutines, %d before", runtime.NumGoroutine(), before)
}

// FuzzReader: for any bytes, reading ends and gives no tar but the promised one.
func FuzzReader(f *testing.F) {
	tar := text(3000)
	for _, p := range []packing{plain, gzipped, zstandard} {
		f.Add(pack(f, tar, p))
	}
	f.Fuzz(func(t *testing.T, blob []byte) {
		got, r, err := read(t, blob, Spec{Size: int64(len(blob)), MaxSize: 1 << 20}, 1<<21)
		if err != nil {
			return
		}
		if want := digest.NewDigestFromBytes(digest.SHA256, sum(got)); r.DiffID() != want {
			t.Errorf("diff ID %s of a tar with %s", r.DiffID(), want)
		}
	})
}

func sum(b []byte) []byte { s := sha256.Sum256(b); return s[:] }

func BenchmarkReader(b *testing.B) {
	tar := text(32 << 20)
	for _, p := range []packing{plain, gzipped, zstandard} {
		blob := pack(b, tar, p)
		b.Run(p.String(), func(b *testing.B) {
			b.SetBytes(int64(len(tar)))
			b.ReportAllocs()
			for b.Loop() {
				r, err := NewReader(context.Background(), io.NopCloser(bytes.NewReader(blob)), specOf(blob, tar))
				if err != nil {
					b.Fatal(err)
				}
				if err := r.Finish(nil); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}
