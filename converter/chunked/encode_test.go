package chunked

import (
	"archive/tar"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"strings"
	"testing"
	"time"

	"github.com/klauspost/compress/zstd"
	"github.com/opencontainers/go-digest"
)

// file is an entry of a tar for tests.
type file struct {
	tar.Header
	data []byte
}

// tarOf writes a tar.
func tarOf(t testing.TB, files ...file) []byte {
	t.Helper()
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	for _, f := range files {
		if f.Typeflag == 0 || f.Typeflag == tar.TypeReg {
			f.Size = int64(len(f.data))
		}
		if err := w.WriteHeader(&f.Header); err != nil {
			t.Fatalf("%s: %v", f.Name, err)
		}
		if _, err := w.Write(f.data); err != nil {
			t.Fatal(err)
		}
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

func regular(name string, data []byte) file {
	return file{tar.Header{Name: name, Mode: 0o644, ModTime: time.Unix(1700000000, 0)}, data}
}

func special(name string, typeflag byte) file {
	return file{tar.Header{Name: name, Linkname: "target", Typeflag: typeflag, Mode: 0o755}, nil}
}

// random returns bytes that are the same in all runs.
func random(seed uint64, n int) []byte {
	b := make([]byte, n)
	r := rand.NewChaCha8([32]byte{byte(seed)})
	_, _ = r.Read(b)
	return b
}

// encode encodes a tar and checks the guarantees for a blob.
func encode(t testing.TB, raw []byte, workers int) ([]byte, *Encoded, error) {
	t.Helper()
	var out bytes.Buffer
	e, err := Encode(t.Context(), &out, bytes.NewReader(raw), workers)
	if err != nil {
		return nil, nil, err
	}
	blob := out.Bytes()
	if e.Size != int64(len(blob)) || e.Digest != digest.FromBytes(blob) || e.DiffID != digest.FromBytes(raw) {
		t.Fatalf("says size %d, digest %s, diff ID %s of a blob with %d, %s, %s",
			e.Size, e.Digest, e.DiffID, len(blob), digest.FromBytes(blob), digest.FromBytes(raw))
	}
	z, err := zstd.NewReader(bytes.NewReader(blob))
	if err != nil {
		t.Fatal(err)
	}
	defer z.Close()
	if got, err := io.ReadAll(z); err != nil || !bytes.Equal(got, raw) {
		t.Fatalf("the blob is decompressed to %d bytes and %v, expected the tar of %d bytes", len(got), err, len(raw))
	}
	return blob, e, nil
}

// TestSameBytes: the output does not depend on the number of goroutines.
func TestSameBytes(t *testing.T) {
	files := []file{{tar.Header{Name: "dir/", Typeflag: tar.TypeDir, Mode: 0o755}, nil}}
	for i := range 300 {
		files = append(files, regular(fmt.Sprint("dir/", i), bytes.Repeat(random(uint64(i), 100), i)))
	}
	raw := tarOf(t, append(files, regular("large", random(1, 6<<20)), regular("zeros", make([]byte, 5<<20)))...)
	want, _, err := encode(t, raw, 1)
	if err != nil {
		t.Fatal(err)
	}
	for _, workers := range []int{2, 7} {
		if got, _, err := encode(t, raw, workers); err != nil || !bytes.Equal(got, want) {
			t.Errorf("%d workers: other bytes than 1, error %v", workers, err)
		}
	}
}

// TestLargeFilesHaveChunksInCommon: an additional byte at the start changes only its chunk.
func TestLargeFilesHaveChunksInCommon(t *testing.T) {
	data := random(3, 24<<20)
	chunks := func(data []byte) map[digest.Digest]bool {
		sums := map[digest.Digest]bool{}
		for len(data) > 0 {
			var c cutter
			n, _ := c.find(data)
			sums[digest.FromBytes(data[:n])] = true
			data = data[n:]
		}
		return sums
	}
	a, b := chunks(data), chunks(append([]byte{1}, data...))
	if len(a) < 24/4 || len(a) > 24*2 {
		t.Errorf("%d chunks of 24 MiB", len(a))
	}
	common := 0
	for sum := range a {
		if b[sum] {
			common++
		}
	}
	if common < len(a)-2 {
		t.Errorf("%d of %d chunks are still there", common, len(a))
	}
}

// TestUnsuitable: a tar that a table of contents cannot express gives an error with the reason.
func TestUnsuitable(t *testing.T) {
	link := tar.Header{Name: "l", Typeflag: tar.TypeLink, Linkname: "a"}
	good := tarOf(t, regular("a", []byte("x")))
	for _, c := range []struct {
		name, reason string
		raw          []byte
	}{
		{"nothing", "empty", nil},
		{"same name twice", `"./a": the name occurs more than`, tarOf(t, regular("a", nil), regular("./a", nil))},
		{"same name, absolute", `"/a": the name occurs more than`, tarOf(t, regular("a", nil), regular("/a", nil))},
		{"name that leads up", `".." in a name`, tarOf(t, regular("a/../../b", nil))},
		{"file like a directory", `"/" at the end`, withType(tarOf(t, special("a/", '5')), '0')},
		{"whiteout with contents", "a whiteout with contents", tarOf(t, regular(".wh.a", []byte("x")))},
		{"no directory", `no entry for the directory "a/b"`, tarOf(t, special("a/", '5'), regular("a/b/c", nil))},
		{"directory later", `no entry for the directory "a"`, tarOf(t, regular("a/b", nil), special("a/", '5'))},
		{"below a link", `no entry for the directory "l"`, tarOf(t, special("l", '2'), regular("l/a", nil))},
		{"headers without end", "headers of more than", bytes.Repeat(tarOf(t, file{Header: tar.Header{
			Name: "a", PAXRecords: map[string]string{"VENDOR.x": strings.Repeat("x", 500_000)},
		}})[:500_000&^511+1024], 20)},
		{"global header", "type 'g'", tarOf(t, file{Header: tar.Header{
			Typeflag: tar.TypeXGlobalHeader, Name: "g", PAXRecords: map[string]string{"comment": "x"},
		}})},
		{"name of other bytes", "not UTF-8", tarOf(t, file{Header: tar.Header{Name: "\xff", Format: tar.FormatGNU}})},
		{"year", "the year", tarOf(t, file{Header: tar.Header{
			Name: "a", ModTime: time.Unix(1<<40, 0), Format: tar.FormatGNU,
		}})},
		{"cut off", "unexpected EOF", tarOf(t, regular("a", make([]byte, 9999)))[:5000]},
		{"bytes behind the end", "follow its end", append(bytes.Clone(good), good...)},
		{"half a block behind the end", "follow its end", append(bytes.Clone(good), make([]byte, 100)...)},
		{"no tar", "invalid tar header", bytes.Repeat([]byte("no tar "), 1000)},
		{"link with a size", "a hardlink of 5 bytes", withSize(tarOf(t, file{Header: link}), 5)},
	} {
		_, _, err := encode(t, c.raw, 2)
		if !errors.Is(err, ErrUnsuitable) || !strings.Contains(err.Error(), c.reason) {
			t.Errorf("%s: error %v, expected one with %q", c.name, err, c.reason)
		}
	}
}

// withSize changes the size in the first header of a tar.
func withSize(raw []byte, n int) []byte {
	copy(raw[124:136], fmt.Sprintf("%011o\x00", n))
	return checksummed(raw)
}

// withType changes the type in the first header of a tar.
func withType(raw []byte, typeflag byte) []byte {
	raw[156] = typeflag
	return checksummed(raw)
}

// checksummed corrects the checksum of the first header.
func checksummed(raw []byte) []byte {
	copy(raw[148:156], "        ")
	sum := 0
	for _, b := range raw[:512] {
		sum += int(b)
	}
	copy(raw[148:156], fmt.Sprintf("%06o\x00 ", sum))
	return raw
}

// failing fails after n bytes.
type failing struct {
	n   int
	err error
}

func (f *failing) Write(p []byte) (int, error) {
	if f.n -= len(p); f.n < 0 {
		return 0, f.err
	}
	return len(p), nil
}

// TestErrorsOfOthers: errors of reading, writing and the context are not attributed to the tar.
func TestErrorsOfOthers(t *testing.T) {
	raw := tarOf(t, regular("a", random(1, 9<<20)), regular("b", []byte("b")))
	want := errors.New("broken")
	for n := 0; n < len(raw); n += 4_000_000 {
		if _, err := Encode(t.Context(), &failing{n, want}, bytes.NewReader(raw), 2); !errors.Is(err, want) {
			t.Errorf("write fails after %d bytes: error %v", n, err)
		}
		r := io.MultiReader(bytes.NewReader(raw[:n]), errReader{want})
		if _, err := Encode(t.Context(), io.Discard, r, 2); !errors.Is(err, want) || errors.Is(err, ErrUnsuitable) {
			t.Errorf("read fails after %d bytes: error %v", n, err)
		}
		ctx, cancel := context.WithCancelCause(t.Context())
		r = io.MultiReader(bytes.NewReader(raw[:n]), cancelReader{cancel, want}, bytes.NewReader(raw[n:]))
		if _, err := Encode(ctx, io.Discard, r, 2); !errors.Is(err, want) {
			t.Errorf("cancelled after %d bytes: error %v", n, err)
		}
	}
}

type errReader struct{ err error }

func (r errReader) Read([]byte) (int, error) { return 0, r.err }

type cancelReader struct {
	cancel context.CancelCauseFunc
	err    error
}

func (r cancelReader) Read([]byte) (int, error) {
	r.cancel(r.err)
	return 0, io.EOF
}
