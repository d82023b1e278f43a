package sink

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/daxfs/daxfs-snapshotter/daxfs"
	"github.com/daxfs/daxfs-snapshotter/internal/slow"
)

// content is one input of a test; without keep, the tree does not refer to it.
type content struct {
	b    []byte
	keep bool
	data daxfs.Data
}

// stack makes layers of random contents: small ones, sizes around those of blocks and packs, big ones,
// holes, and duplicates within and across layers.
func stack(seed uint64, layers, each int) [][]*content {
	rnd := rand.New(rand.NewPCG(seed, 1))
	var all []*content
	sizes := []int{1, 100, page - 1, page, page + 1, 3 * page, huge - 1, huge, huge + 1, 2*huge + 77}
	var out [][]*content
	for range layers {
		var l []*content
		for range each {
			c := &content{keep: rnd.IntN(5) > 0}
			switch {
			case len(all) > 0 && rnd.IntN(6) == 0:
				c.b = all[rnd.IntN(len(all))].b
			case rnd.IntN(40) == 0: // a big one with a hole at its end or in its middle
				c.b = make([]byte, 3*huge+rnd.IntN(huge))
				c.b[rnd.IntN(len(c.b))] = 1
			default:
				n := rnd.IntN(40_000) + 1
				if rnd.IntN(8) == 0 {
					n = sizes[rnd.IntN(len(sizes))]
				}
				c.b = make([]byte, n)
				for i := 0; i < n; i += 8 {
					c.b[i] = byte(rnd.Uint32())
				}
			}
			l = append(l, c)
			all = append(all, c)
		}
		out = append(out, l)
	}
	return out
}

// place runs a sink over concurrent layers and returns the image and the result of Finish.
func place(t *testing.T, layers [][]*content, o Options) ([]byte, Result) {
	t.Helper()
	f, err := os.Create(filepath.Join(t.TempDir(), "image"))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	s, err := New(f, len(layers), o)
	if err != nil {
		t.Fatal(err)
	}
	defer s.Abort()
	var wg sync.WaitGroup
	for i, l := range layers {
		wg.Go(func() {
			for _, c := range l {
				d, err := s.Layer(i).Put(context.Background(), int64(len(c.b)), bytes.NewReader(c.b))
				if err != nil {
					t.Error(err)
				}
				c.data = d
			}
			if err := s.Layer(i).Close(); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	root := &daxfs.Node{Mode: unix.S_IFDIR, Entries: map[string]*daxfs.Node{}}
	nodes := map[*content]*daxfs.Node{}
	for i, l := range layers {
		for j, c := range l {
			if c.keep {
				n := &daxfs.Node{Mode: unix.S_IFREG, Data: c.data}
				nodes[c] = n
				root.Entries[fmt.Sprint(i, "-", j)] = n
				root.Entries[fmt.Sprint(i, "-", j, "-again")] = n // a hard link
			}
		}
	}
	r, err := s.Finish(root)
	if err != nil {
		t.Fatal(err)
	}
	for c, n := range nodes {
		c.data = n.Data
	}
	b, err := os.ReadFile(f.Name())
	if err != nil {
		t.Fatal(err)
	}
	return b, r
}

// checkImage checks the guarantees of this package for an image.
func checkImage(t *testing.T, layers [][]*content, img []byte, r Result, aligned bool) {
	t.Helper()
	if r.End != int64(len(img)) || r.End%page != 0 {
		t.Fatalf("the file has %d bytes, expected End %d, a multiple of %d", len(img), r.End, page)
	}
	used := make([]bool, r.End/page)
	where := map[[32]byte]int64{}
	var blocks, total int64
	for _, l := range layers {
		for _, c := range l {
			if !c.keep {
				continue
			}
			off, size := c.data.Off, int64(len(c.b))
			if off < page || off%page != 0 || off+size > r.End {
				t.Fatalf("%d bytes at %d, expected them at a block between %d and %d", size, off, page, r.End)
			}
			if !bytes.Equal(img[off:off+size], c.b) {
				t.Fatalf("%d bytes at %d are not those that were put", size, off)
			}
			sum := sha256.Sum256(c.b)
			if c.data.Sum != sum || c.data.Size != size {
				t.Fatalf("%d bytes at %d have size %d and sum %x, expected sum %x", size, off, c.data.Size,
					c.data.Sum, sum)
			}
			if at, ok := where[sum]; ok {
				if at != off {
					t.Fatalf("equal contents of %d bytes at %d and %d", size, at, off)
				}
				continue
			}
			where[sum] = off
			if aligned && size >= huge && off%huge != 0 {
				t.Errorf("%d bytes at %d, expected a multiple of %d", size, off, huge)
			}
			for i := off / page; i < up(off+size, page)/page; i++ {
				if used[i] {
					t.Fatalf("two contents in the block at %d", i*page)
				}
				used[i] = true
			}
			for i := off + size; i < up(off+size, page); i++ {
				if img[i] != 0 {
					t.Fatalf("byte %d behind the contents at %d is not zero", i, off)
				}
			}
			blocks += up(size, page)
			total += size
		}
	}
	for i, u := range used {
		if !u && !allZero(img[i*page:(i+1)*page]) {
			t.Fatalf("unused block at %d is not zero", i*page)
		}
	}
	if int64(len(where)) != r.Contents || total != r.Bytes {
		t.Errorf("Finish counts %d contents of %d bytes, expected %d of %d", r.Contents, r.Bytes, len(where), total)
	}
	if gaps := r.End - page - blocks; gaps > max(huge, blocks/64) {
		t.Errorf("%d bytes of gaps beside %d bytes of blocks, expected at most 1/64", gaps, blocks)
	}
}

func TestPlaceRandomStacks(t *testing.T) {
	seeds := uint64(5)
	if slow.Leave() {
		seeds = 3
	}
	for seed := range seeds {
		layers := stack(seed, 1+int(seed), 60)
		var want []byte
		for _, memory := range []int64{16 << 20, 256 << 20} {
			img, r := place(t, layers, Options{Memory: memory})
			checkImage(t, layers, img, r, false)
			if want == nil {
				want = img
			} else if !bytes.Equal(img, want) {
				t.Fatalf("seed %d: with %d bytes of memory the image is another one", seed, memory)
			}
		}
	}
}

// TestSpill delays the lowest layer, whose turn it is, so that the others have to use the spill file.
func TestSpill(t *testing.T) {
	layers := stack(99, 4, 120)
	want, _ := place(t, layers, Options{Memory: 256 << 20})
	f, err := os.Create(filepath.Join(t.TempDir(), "image"))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	s, err := New(f, len(layers), Options{})
	if err != nil {
		t.Fatal(err)
	}
	defer s.Abort()
	put := func(i int) {
		for _, c := range layers[i] {
			if c.data, err = s.Layer(i).Put(context.Background(), int64(len(c.b)), bytes.NewReader(c.b)); err != nil {
				t.Error(err)
			}
		}
		if err := s.Layer(i).Close(); err != nil {
			t.Error(err)
		}
	}
	for i := len(layers) - 1; i >= 0; i-- {
		put(i)
		s.mu.Lock()
		if most := s.limit + len(layers); s.inUse > most {
			t.Errorf("%d packs in memory, expected at most %d", s.inUse, most)
		}
		s.mu.Unlock()
	}
	root := &daxfs.Node{Mode: unix.S_IFDIR, Entries: map[string]*daxfs.Node{}}
	for i, l := range layers {
		for j, c := range l {
			if c.keep {
				root.Entries[fmt.Sprint(i, j)] = &daxfs.Node{Mode: unix.S_IFREG, Data: c.data}
			}
		}
	}
	if _, err := s.Finish(root); err != nil {
		t.Fatal(err)
	}
	// Packs are spilled by hashing goroutines, the last one possibly just before Finish.
	s.mu.Lock()
	if s.spill.end == 0 {
		t.Error("nothing was spilled")
	}
	s.mu.Unlock()
	got, err := os.ReadFile(f.Name())
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(got, want) {
		t.Error("the image differs from the one that was never spilled")
	}
	if left, err := filepath.Glob(filepath.Join(filepath.Dir(f.Name()), ".*")); err != nil || len(left) > 0 {
		t.Errorf("left behind: %q, %v", left, err)
	}
}

// TestWait: nothing is spilled, early layers wait, in a lane or for one, and the image is the same.
func TestWait(t *testing.T) {
	layers := stack(99, 3*Lanes, 60)
	want, _ := place(t, layers, Options{Memory: 256 << 20})
	got, _ := place(t, layers, Options{Wait: true})
	if !bytes.Equal(got, want) {
		t.Error("the image differs from the one of layers that did not wait")
	}
}

// TestWaitEnds: if nobody reads the layer whose turn it is, the others are notified.
func TestWaitEnds(t *testing.T) {
	f, err := os.Create(filepath.Join(t.TempDir(), "image"))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	s, err := New(f, 2, Options{Wait: true})
	if err != nil {
		t.Fatal(err)
	}
	defer s.Abort()
	cause := errors.New("the lowest layer failed")
	ctx, cancel := context.WithCancelCause(t.Context())
	done := make(chan error)
	go func() {
		_, err := s.Layer(1).Put(ctx, 64<<20, bytes.NewReader(fill(64<<20, 1)))
		done <- err
	}()
	for {
		s.mu.Lock()
		full := s.inUse >= s.limit
		s.mu.Unlock()
		if full {
			break
		}
		time.Sleep(time.Millisecond)
	}
	select {
	case err := <-done:
		t.Fatalf("Put did not wait: %v", err)
	case <-time.After(50 * time.Millisecond):
	}
	if s.spill.f != nil {
		t.Error("contents were spilled")
	}
	cancel(cause)
	if err := <-done; !errors.Is(err, cause) {
		t.Errorf("error %v, expected %v", err, cause)
	}
}

func fill(n int, b byte) []byte {
	p := bytes.Repeat([]byte{b}, n)
	p[0] = ^b
	return p
}

// TestAlignment: a big file lies at a multiple of 2 MiB, small ones in the gap before it.
func TestAlignment(t *testing.T) {
	l := []*content{
		{b: fill(10, 1), keep: true},
		{b: fill(5<<20, 2), keep: true},
		{b: fill(1<<20, 3), keep: true},
		{b: fill(900<<10, 4), keep: true},
		{b: fill(300<<10, 5), keep: true},
	}
	img, r := place(t, [][]*content{l}, Options{})
	checkImage(t, [][]*content{l}, img, r, true)
	for i, want := range []int64{page, huge, 2 * page, 2*page + 1<<20, huge + 5<<20} {
		if l[i].data.Off != want {
			t.Errorf("content %d at %d, expected %d", i, l[i].data.Off, want)
		}
	}
	img, r = place(t, [][]*content{l}, Options{NoAlign: true})
	checkImage(t, [][]*content{l}, img, r, false)
	if l[1].data.Off != 2*page {
		t.Errorf("without alignment the big content is at %d, expected %d", l[1].data.Off, 2*page)
	}
}

// TestAlignmentIsBounded: files just above 2 MiB are not all aligned, which would double the image.
func TestAlignmentIsBounded(t *testing.T) {
	var l []*content
	for i := range 20 {
		l = append(l, &content{b: fill(huge+page, byte(i)), keep: true})
	}
	img, r := place(t, [][]*content{l}, Options{})
	checkImage(t, [][]*content{l}, img, r, false)
	if l[0].data.Off != huge {
		t.Errorf("the first content is at %d, expected %d", l[0].data.Off, huge)
	}
}

// TestDeadContentsAreDropped: dropped contents leave no gap if contents from the end fit.
func TestDeadContentsAreDropped(t *testing.T) {
	lower := []*content{{b: fill(8*page, 1)}, {b: fill(page, 2), keep: true}, {b: fill(page, 3)}}
	upper := []*content{
		{b: fill(3*page, 4), keep: true},
		{b: fill(5*page, 5), keep: true},
		{b: fill(page, 3), keep: true},
	}
	img, r := place(t, [][]*content{lower, upper}, Options{})
	checkImage(t, [][]*content{lower, upper}, img, r, true)
	if want := int64(page + 10*page); r.End != want {
		t.Errorf("the image ends at %d, expected %d", r.End, want)
	}
	if r.Moved != 8*page || r.Deduplicated != page {
		t.Errorf("moved %d and deduplicated %d bytes, expected %d and %d", r.Moved, r.Deduplicated, 8*page, page)
	}
}

func TestNothingAtAll(t *testing.T) {
	img, r := place(t, nil, Options{})
	checkImage(t, nil, img, r, true)
}

func TestPutErrors(t *testing.T) {
	f, err := os.Create(filepath.Join(t.TempDir(), "image"))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	s, err := New(f, 1, Options{MaxBytes: 3 * huge})
	if err != nil {
		t.Fatal(err)
	}
	defer s.Abort()
	ctx := context.Background()
	for _, size := range []int64{100, huge + 1} {
		if _, err := s.Layer(0).Put(ctx, size, bytes.NewReader(make([]byte, size-1))); !errors.Is(err,
			io.ErrUnexpectedEOF) {
			t.Errorf("a short content of %d bytes: %v, expected %v", size, err, io.ErrUnexpectedEOF)
		}
	}
	if _, err := s.Layer(0).Put(ctx, 2*huge, bytes.NewReader(nil)); !errors.Is(err, ErrTooLarge) {
		t.Errorf("beyond the limit: %v, expected %v", err, ErrTooLarge)
	}
}

// TestWriteError: a write error fails the layers and ends everything.
func TestWriteError(t *testing.T) {
	name := filepath.Join(t.TempDir(), "image")
	if err := os.WriteFile(name, nil, 0o644); err != nil {
		t.Fatal(err)
	}
	f, err := os.Open(name) // read only
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	failed := make(chan error, 1)
	s, err := New(f, 1, Options{Failed: func(err error) { failed <- err }})
	if err != nil {
		t.Fatal(err)
	}
	defer s.Abort()
	for {
		if _, err = s.Layer(0).Put(context.Background(), huge, bytes.NewReader(make([]byte, huge))); err != nil {
			break
		}
	}
	if !errors.Is(err, unix.EBADF) {
		t.Errorf("Put: %v, expected %v", err, unix.EBADF)
	}
	if err := <-failed; !errors.Is(err, unix.EBADF) {
		t.Errorf("Failed: %v, expected %v", err, unix.EBADF)
	}
	if _, err := s.Finish(&daxfs.Node{Mode: unix.S_IFDIR}); !errors.Is(err, unix.EBADF) {
		t.Errorf("Finish: %v, expected %v", err, unix.EBADF)
	}
}

func TestForeignAddress(t *testing.T) {
	f, err := os.Create(filepath.Join(t.TempDir(), "image"))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	s, err := New(f, 0, Options{})
	if err != nil {
		t.Fatal(err)
	}
	defer s.Abort()
	n := &daxfs.Node{Mode: unix.S_IFREG, Data: daxfs.Data{Off: page, Size: 1}}
	if _, err := s.Finish(&daxfs.Node{Mode: unix.S_IFDIR, Entries: map[string]*daxfs.Node{"a": n}}); err == nil {
		t.Error("an address of another store was accepted")
	}
}
