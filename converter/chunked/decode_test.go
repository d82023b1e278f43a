package chunked_test

import (
	"archive/tar"
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"math/rand/v2"
	"slices"
	"sync"
	"sync/atomic"
	"testing"

	"github.com/klauspost/compress/zstd"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/daxfs/daxfs-snapshotter/converter/chunked"
	"github.com/daxfs/daxfs-snapshotter/internal/chunkedtest"
)

// memory is a blob in memory.
type memory struct {
	b      []byte
	parts  atomic.Int64
	bytes  atomic.Int64
	mu     sync.Mutex // held while mangle, if set, changes a part
	mangle func(from int64, b []byte) ([]byte, error)
}

func (m *memory) Part(ctx context.Context, from, to int64) ([]byte, error) {
	if from < 0 || from > to || to > int64(len(m.b)) {
		return nil, fmt.Errorf("bytes %d to %d of %d", from, to, len(m.b))
	}
	m.parts.Add(1)
	m.bytes.Add(to - from)
	b := bytes.Clone(m.b[from:to])
	if m.mangle != nil {
		m.mu.Lock()
		defer m.mu.Unlock()
		return m.mangle(from, b)
	}
	return b, ctx.Err()
}

// have finds contents by their digest.
type have map[[32]byte][]byte

func (h have) Find(sum [32]byte, size int64) (io.ReaderAt, bool) {
	b, ok := h[sum]
	return bytes.NewReader(b), ok && int64(len(b)) == size
}

// files returns some files; tarOf makes a tar of them, in order of name.
func files(n int, seed uint64) map[string][]byte {
	rng := rand.New(rand.NewPCG(seed, 1))
	out := map[string][]byte{}
	for i := range n {
		b := make([]byte, rng.IntN(9000)+1)
		for j := range b {
			b[j] = byte(rng.IntN(40))
		}
		out[fmt.Sprintf("./dir/file-%03d", i)] = b
	}
	return out
}

func tarOf(t testing.TB, files map[string][]byte) []byte {
	t.Helper()
	var raw bytes.Buffer
	w := tar.NewWriter(&raw)
	must(t, w.WriteHeader(&tar.Header{Typeflag: tar.TypeDir, Name: "./dir/", Mode: 0o755}))
	for _, name := range slices.Sorted(maps.Keys(files)) {
		must(t, w.WriteHeader(&tar.Header{Name: name, Mode: 0o644, Size: int64(len(files[name]))}))
		_, err := w.Write(files[name])
		must(t, err)
	}
	must(t, w.WriteHeader(&tar.Header{Typeflag: tar.TypeSymlink, Name: "link", Linkname: "dir"}))
	must(t, w.Close())
	return raw.Bytes()
}

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func encode(t testing.TB, raw []byte, o chunkedtest.Options) *chunkedtest.Layer {
	t.Helper()
	l, err := chunkedtest.Encode(raw, o)
	must(t, err)
	return l
}

// pull acts like a pull and returns the tar.
func pull(t testing.TB, src chunked.Source, d ocispec.Descriptor, h chunked.Contents) ([]byte, *chunked.Plan, error) {
	t.Helper()
	layout, err := chunked.ParseLayout(d)
	if err != nil {
		return nil, nil, err
	}
	tables, err := chunked.ReadTables(t.Context(), src, layout)
	if err != nil {
		return nil, nil, err
	}
	plan := chunked.NewPlan(tables, h)
	r, err := plan.Tar(t.Context(), src, chunked.Options{SpoolDir: t.TempDir()})
	must(t, err)
	raw, err := io.ReadAll(r)
	must(t, r.Close())
	return raw, plan, err
}

// TestTar: the tar is equal byte by byte, whichever files are present, and only missing ones are fetched.
func TestTar(t *testing.T) {
	all := files(200, 1)
	all["./dir/same-1"] = bytes.Repeat([]byte("again "), 50_000)
	all["./dir/same-2"] = all["./dir/same-1"]
	all["./dir/holes"] = append(append([]byte("begin"), make([]byte, 90_000)...), "end"...)
	all["./dir/empty"] = nil
	large := make([]byte, 9<<20)
	rng := rand.New(rand.NewPCG(3, 3))
	for i := range large {
		large[i] = byte(rng.Uint32())
	}
	all["./dir/large"] = large
	raw := tarOf(t, all)
	for _, chunk := range []int{0, 4096} {
		l := encode(t, raw, chunkedtest.Options{Chunk: chunk})
		for _, nth := range []int{0, 1, 2, 10} {
			t.Run(fmt.Sprintf("chunk=%d/nth=%d", chunk, nth), func(t *testing.T) {
				h, missing, sizes := have{}, map[digest.Digest]int64{}, int64(0)
				for i, name := range slices.Sorted(maps.Keys(all)) {
					sum := digest.FromBytes(all[name])
					if nth > 0 && i%nth == 0 {
						h[sha256.Sum256(all[name])] = all[name]
						continue
					}
					missing[sum] = int64(len(all[name]))
				}
				for _, b := range h {
					delete(missing, digest.FromBytes(b))
				}
				for _, n := range missing {
					sizes += n
				}
				src := &memory{b: l.Blob}
				got, plan, err := pull(t, src, l.Desc, h)
				must(t, err)
				if !bytes.Equal(got, raw) {
					t.Errorf("%d bytes with digest %s, expected %d with %s", len(got), digest.FromBytes(got),
						len(raw), l.DiffID)
				}
				if plan.Missing != sizes {
					t.Errorf("%d bytes are missing, expected %d", plan.Missing, sizes)
				}
				fetched, requests := src.bytes.Load()-plan.Fetch, src.parts.Load()-int64(plan.Ranges)
				if want := tablesOf(t, l); fetched != want || requests != 1 {
					t.Errorf("%d bytes in %d requests besides those of the plan, expected %d in one",
						fetched, requests, want)
				}
				if nth == 1 && plan.Fetch != 0 {
					t.Errorf("%d bytes are fetched although all is there", plan.Fetch)
				}
			})
		}
	}
}

// tablesOf returns the length of the one request for both tables.
func tablesOf(t testing.TB, l *chunkedtest.Layer) int64 {
	layout, err := chunked.ParseLayout(l.Desc)
	must(t, err)
	return layout.TarSplit.Offset + layout.TarSplit.Length - layout.TOC.Offset
}

// TestLies: a layer that lies gives an error or a tar with another digest, within the limits.
func TestLies(t *testing.T) {
	raw := tarOf(t, files(20, 2))
	for name, o := range chunkedtest.Lies() {
		t.Run(name, func(t *testing.T) {
			l := encode(t, raw, o)
			src := &memory{b: l.Blob}
			got, _, err := pull(t, src, l.Desc, have{})
			if err == nil && digest.FromBytes(got) == l.DiffID {
				t.Error("the lie is believed")
			}
			if err != nil && len(got) > len(raw) {
				t.Errorf("%d bytes were read of a tar of %d", len(got), len(raw))
			}
			if err == nil && name != chunkedtest.SegmentLie {
				t.Error("no error")
			}
			if n := src.bytes.Load(); n > int64(len(l.Blob))+1<<20 {
				t.Errorf("%d bytes were fetched of a blob of %d", n, len(l.Blob))
			}
			t.Log(err)
		})
	}
}

// TestSizesAddUp: if the sum of sizes overflowed, nothing would seem missing.
func TestSizesAddUp(t *testing.T) {
	l := encode(t, tarOf(t, files(20, 2)), chunkedtest.Options{TOC: func(t *chunked.TOC) {
		for i := range t.Entries {
			if t.Entries[i].Digest != "" {
				t.Entries[i].Size = 1 << 49
			}
		}
	}})
	layout, err := chunked.ParseLayout(l.Desc)
	must(t, err)
	if _, err := chunked.ReadTables(t.Context(), &memory{b: l.Blob}, layout); !errors.Is(err, chunked.ErrTooLarge) {
		t.Errorf("error %v, expected %v", err, chunked.ErrTooLarge)
	}
}

// TestLayout: annotations are checked before anything is fetched.
func TestLayout(t *testing.T) {
	l := encode(t, tarOf(t, files(3, 3)), chunkedtest.Options{})
	for name, c := range map[string]struct {
		key, value string
		want       error
	}{
		"none":           {chunked.AnnotationTOCDigest, "", chunked.ErrNotChunked},
		"no tar-split":   {chunked.AnnotationTarSplitPosition, "", chunked.ErrNotChunked},
		"type":           {chunked.AnnotationTOCPosition, "100:10:20:2", chunked.ErrNotChunked},
		"digest":         {chunked.AnnotationTOCDigest, "sha256:00", chunked.ErrInvalid},
		"not numbers":    {chunked.AnnotationTOCPosition, "a:b:c:1", chunked.ErrInvalid},
		"negative":       {chunked.AnnotationTOCPosition, "-1:10:20:1", chunked.ErrInvalid},
		"overflow":       {chunked.AnnotationTOCPosition, "9223372036854775807:9:9:1", chunked.ErrInvalid},
		"outside":        {chunked.AnnotationTOCPosition, "100000000:10:20:1", chunked.ErrInvalid},
		"empty":          {chunked.AnnotationTOCPosition, "100:0:20:1", chunked.ErrInvalid},
		"a gigabyte":     {chunked.AnnotationTOCPosition, "100:10:1073741824:1", chunked.ErrTooLarge},
		"large":          {chunked.AnnotationTarSplitPosition, "100:1073741824:1073741824", chunked.ErrTooLarge},
		"split: outside": {chunked.AnnotationTarSplitPosition, "100000000:10:20", chunked.ErrInvalid},
	} {
		t.Run(name, func(t *testing.T) {
			d := l.Desc
			d.Annotations = maps.Clone(d.Annotations)
			d.Annotations[c.key] = c.value
			if _, err := chunked.ParseLayout(d); !errors.Is(err, c.want) {
				t.Errorf("error %v, expected %v", err, c.want)
			}
		})
	}
}

// TestRawLength: tables with another uncompressed length than annotated are refused, at the first excess byte.
func TestRawLength(t *testing.T) {
	l := encode(t, tarOf(t, files(3, 3)), chunkedtest.Options{})
	for _, key := range []string{chunked.AnnotationTOCPosition, chunked.AnnotationTarSplitPosition} {
		for _, by := range []int64{-1, 1} {
			d := l.Desc
			d.Annotations = maps.Clone(d.Annotations)
			var off, n, raw int64
			_, err := fmt.Sscanf(d.Annotations[key], "%d:%d:%d", &off, &n, &raw)
			must(t, err)
			d.Annotations[key] = fmt.Sprintf("%d:%d:%d", off, n, raw+by)
			if key == chunked.AnnotationTOCPosition {
				d.Annotations[key] += ":1"
			}
			if _, _, err := pull(t, &memory{b: l.Blob}, d, have{}); !errors.Is(err, chunked.ErrInvalid) {
				t.Errorf("%s by %d: error %v, expected %v", key, by, err, chunked.ErrInvalid)
			}
		}
	}
}

// TestOtherBytes: ranges with other bytes, or another number of bytes, are detected.
func TestOtherBytes(t *testing.T) {
	all := files(50, 4)
	raw := tarOf(t, all)
	h := have{}
	for i, name := range slices.Sorted(maps.Keys(all)) {
		if i%10 != 0 {
			h[sha256.Sum256(all[name])] = all[name]
		}
	}
	l := encode(t, raw, chunkedtest.Options{})
	for seed := range uint64(50) {
		rng := rand.New(rand.NewPCG(seed, 0))
		at := rng.IntN(4)
		n := 0
		src := &memory{b: l.Blob, mangle: func(from int64, b []byte) ([]byte, error) {
			if n++; n <= at {
				return b, nil
			}
			switch rng.IntN(3) {
			case 0:
				return b[:rng.IntN(len(b))], nil
			case 1:
				return append(b, 0), nil
			}
			b[rng.IntN(len(b))] ^= byte(1 + rng.IntN(255))
			return b, nil
		}}
		got, _, err := pull(t, src, l.Desc, h)
		if err == nil && !bytes.Equal(got, raw) {
			t.Errorf("seed %d: other bytes are believed", seed)
		}
	}
}

// FuzzTables: no tables cause a panic, and the length of a tar is bounded by files and tables.
func FuzzTables(f *testing.F) {
	l := encode(f, tarOf(f, files(3, 5)), chunkedtest.Options{Chunk: 1000})
	z, err := zstd.NewReader(nil)
	must(f, err)
	layout, err := chunked.ParseLayout(l.Desc)
	must(f, err)
	raw := func(p chunked.Position) []byte {
		b, err := z.DecodeAll(l.Blob[p.Offset:p.Offset+p.Length], nil)
		must(f, err)
		return b
	}
	f.Add(raw(layout.TOC), raw(layout.TarSplit))
	f.Add([]byte(`{"version":1,"entries":null}`), []byte("{}"))
	w, err := zstd.NewWriter(nil)
	must(f, err)
	f.Fuzz(func(t *testing.T, toc, split []byte) {
		var table chunked.TOC
		storedSplit := w.EncodeAll(split, nil)
		if json.Unmarshal(toc, &table) == nil { // the right digest lets more inputs pass
			table.TarSplitDigest = digest.FromBytes(storedSplit)
			toc, _ = json.Marshal(table)
		}
		blob := bytes.Clone(l.Blob[:layout.TOC.Offset])
		storedTOC := w.EncodeAll(toc, nil)
		at := len(blob)
		blob = append(append(blob, storedTOC...), storedSplit...)
		d := ocispec.Descriptor{Size: int64(len(blob)), Annotations: map[string]string{
			chunked.AnnotationTOCDigest:   digest.FromBytes(storedTOC).String(),
			chunked.AnnotationTOCPosition: fmt.Sprintf("%d:%d:%d:1", at, len(storedTOC), len(toc)),
			chunked.AnnotationTarSplitPosition: fmt.Sprintf("%d:%d:%d", at+len(storedTOC),
				len(storedSplit), len(split)),
		}}
		got, _, err := pull(t, &memory{b: blob}, d, have{})
		if err == nil && int64(len(got)) > int64(len(split))+sizesOf(toc) {
			t.Errorf("a tar of %d bytes", len(got))
		}
	})
}

// sizesOf returns the bytes of all files in a table that the decoder took. It reads no other fields,
// because the decoder does not either: a table may be believed although its times are wrong.
func sizesOf(toc []byte) (n int64) {
	var table struct{ Entries []struct{ Size int64 } }
	_ = json.Unmarshal(toc, &table)
	for _, e := range table.Entries {
		n += max(e.Size, 0)
	}
	return n
}

// TestSourceFails: a lost connection does not end a file, and the error gives the cause.
func TestSourceFails(t *testing.T) {
	l := encode(t, tarOf(t, files(20, 6)), chunkedtest.Options{})
	lost := &lostError{}
	n := 0
	src := &memory{b: l.Blob, mangle: func(_ int64, b []byte) ([]byte, error) {
		if n++; n > 1 {
			return nil, fmt.Errorf("get: %w: %w", lost, io.EOF)
		}
		return b, nil
	}}
	_, _, err := pull(t, src, l.Desc, have{})
	var got *lostError
	if !errors.As(err, &got) || !errors.Is(err, lost) || errors.Is(err, io.EOF) {
		t.Errorf("error %v, expected that of the source, and no end", err)
	}
}

type lostError struct{}

func (*lostError) Error() string { return "lost" }

// TestCloseWhileReading: closing a tar ends a read that waits for the registry.
func TestCloseWhileReading(t *testing.T) {
	raw := tarOf(t, files(100, 7))
	l := encode(t, raw, chunkedtest.Options{})
	layout, err := chunked.ParseLayout(l.Desc)
	must(t, err)
	for i := range 200 {
		src := &memory{b: l.Blob}
		tables, err := chunked.ReadTables(t.Context(), src, layout)
		must(t, err)
		r, err := chunked.NewPlan(tables, have{}).Tar(t.Context(), src, chunked.Options{SpoolDir: t.TempDir()})
		must(t, err)
		begun, ended := make(chan struct{}), make(chan error)
		go func() {
			buf, n := make([]byte, 100), 0
			for {
				k, err := r.Read(buf)
				if at := i * len(raw) / 300; n <= at && n+k > at {
					close(begun)
				}
				n += k
				if err != nil {
					ended <- err
					return
				}
			}
		}()
		<-begun
		must(t, r.Close())
		if err := <-ended; err == nil || errors.Is(err, chunked.ErrInvalid) {
			t.Fatalf("after Close: %v", err)
		}
	}
}
