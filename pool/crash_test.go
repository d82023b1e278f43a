package pool

import (
	"bytes"
	"errors"
	"fmt"
	"maps"
	"math/rand/v2"
	"path/filepath"
	"slices"
	"testing"

	"github.com/daxfs/daxfs-snapshotter/daxfs"
	"github.com/daxfs/daxfs-snapshotter/pool/internal/alloc"
)

// model is the expected contents of a pool: bodies by key.
type model struct {
	layers map[string][][]byte
	images map[string][][]byte
	docs   map[string][]byte // of images
}

func newModel() *model {
	return &model{layers: map[string][][]byte{}, images: map[string][][]byte{}, docs: map[string][]byte{}}
}

func (m *model) clone() *model {
	return &model{maps.Clone(m.layers), maps.Clone(m.images), maps.Clone(m.docs)}
}

// world is a pool and the model of its state. A step changes the pool and, on success, the model.
type world struct {
	t     testing.TB
	r     *simRegion
	index string
	p     *Pool
	m     *model
	next  *model // m after the step in progress
	done  func(op string) error
}

func (w *world) open(f *faults, how func() (*Pool, error)) error {
	p, err := how()
	if err != nil {
		return err
	}
	w.p = p
	p.index.fail = f.hit
	if w.done != nil {
		p.index.done = w.done
	}
	return nil
}

func (w *world) layer(key string, bodies ...[]byte) error {
	w.next.layers[key] = bodies
	b := w.p.Begin()
	defer b.Discard()
	for _, body := range bodies {
		if _, err := b.Put(ctx, int64(len(body)), bytes.NewReader(body)); err != nil {
			return err
		}
	}
	return b.CommitLayer(ctx, key, []byte(key))
}

// image makes an image of the contents of a layer. Putting them again finds them.
func (w *world) image(key string, bodies ...[]byte) error {
	w.next.images[key] = bodies
	b := w.p.Begin()
	defer b.Discard()
	var files []daxfs.Data
	for _, body := range bodies {
		d, err := b.Put(ctx, int64(len(body)), bytes.NewReader(body))
		if err != nil {
			return err
		}
		files = append(files, d)
	}
	_, err := w.p.AddImage(ctx, key, tree(files...), daxfs.Options{})
	return err
}

func (w *world) removeLayer(key string) error {
	delete(w.next.layers, key)
	return w.p.RemoveLayer(ctx, key)
}

func (w *world) removeImage(key string) error {
	delete(w.next.images, key)
	delete(w.next.docs, key)
	return w.p.RemoveImage(ctx, key)
}

func (w *world) document(key string, doc []byte) error {
	w.next.docs[key] = doc
	if len(doc) == 0 {
		delete(w.next.docs, key)
	}
	return w.p.SetDocument(ctx, key, doc)
}

func (w *world) discard(bodies ...[]byte) error {
	b := w.p.Begin()
	defer b.Discard()
	for _, body := range bodies {
		if _, err := b.Put(ctx, int64(len(body)), bytes.NewReader(body)); err != nil {
			return err
		}
	}
	return nil
}

// turn begins a new epoch: the current one has enough removed images.
func (w *world) turn() error {
	clear(w.next.images)
	clear(w.next.docs)
	turned, err := w.p.NothingMounted(ctx)
	if err == nil && !turned {
		return errors.New("the epoch did not turn")
	}
	return err
}

func (w *world) reopen(f *faults) error {
	if err := w.p.Close(); err != nil {
		return err
	}
	return w.open(f, func() (*Pool, error) { return Open(w.r, w.index, Options{}) })
}

const simSize = 16 << 20

// bodies are the contents in these tests: c is large and has a tail, and e is a multiple of 2 MiB.
var bodies = struct{ a, b, c, d, e, g []byte }{
	random(1, 3000), random(2, 70_000), random(3, smallMax+chunk/2), random(4, 4096), random(5, 2<<20), random(6, 100),
}

// steps is the life of a pool. Space is freed and reused; the images overlap.
func steps(f *faults) []func(w *world) error {
	a, b, c, d, e, g := bodies.a, bodies.b, bodies.c, bodies.d, bodies.e, bodies.g
	return []func(w *world) error{
		func(w *world) error {
			return w.open(f,
				func() (*Pool, error) { return Create(w.r, w.index, Options{Slots: 5, Windows: Yes, Device: No}) })
		},
		func(w *world) error { return w.layer("A", a, b, c) },
		func(w *world) error { return w.image("A", a, b, c) },
		func(w *world) error { return w.document("A", b) },
		func(w *world) error { return w.layer("B", a, c, d) },
		func(w *world) error { return w.image("B", a, c, d) },
		func(w *world) error { return w.document("B", c) },
		func(w *world) error { return w.document("B", a) },
		func(w *world) error { return w.document("A", nil) },
		func(w *world) error { return w.document("A", g) },
		func(w *world) error { return w.discard(e, g, a) },
		func(w *world) error { return w.removeLayer("A") },
		func(w *world) error { return w.removeImage("A") },
		func(w *world) error { return reap(w.p) },
		func(w *world) error { return w.layer("C", e, b, g) },
		func(w *world) error { return w.image("C", e, b, g) },
		func(w *world) error { return w.document("C", d) },
		func(w *world) error { return w.reopen(f) },
		func(w *world) error { return w.document("C", b) },
		func(w *world) error { return w.removeImage("B") },
		func(w *world) error { return w.removeLayer("B") },
		func(w *world) error { return w.layer("D", c, a) },
		func(w *world) error { return w.image("D", a, c) },
		func(w *world) error { return w.removeImage("C") },
		func(w *world) error { return w.turn() },
		func(w *world) error { return w.image("E", c, d) },
	}
}

// Indexes in steps.
const (
	reopenStep = 17
	turnStep   = 24
)

var documentSteps = []int{3, 6, 7, 8, 9, 16, 18}

// matches returns an error if the pool differs from the model.
func (m *model) matches(p *Pool) error {
	if got, want := p.Layers(), slices.Sorted(maps.Keys(m.layers)); !slices.Equal(got, want) {
		return fmt.Errorf("layers %q, expected %q", got, want)
	}
	if len(p.Images()) != len(m.images) {
		return fmt.Errorf("%d images, expected %d", len(p.Images()), len(m.images))
	}
	for key := range m.layers {
		if b, err := p.Layer(key); err != nil || string(b) != key {
			return fmt.Errorf("layer %q: payload %q, %w", key, b, err)
		}
	}
	for key, bodies := range m.images {
		img, err := p.Image(key)
		if err != nil {
			return err
		}
		files, err := imageFiles(p.Region(), img)
		if err != nil {
			return fmt.Errorf("image %q: %w", key, err)
		}
		for i, want := range bodies {
			if got := files[fmt.Sprintf("file%05d", i)]; !bytes.Equal(got, want) {
				return fmt.Errorf("image %q: file %d has %d other bytes", key, i, len(got))
			}
		}
	}
	if err := m.sameDocuments(p); err != nil {
		return err
	}
	documents := int64(0)
	for key := range m.images {
		documents += alloc.RoundUnit(int64(len(m.docs[key])))
	}
	if n := p.Usage().Documents; n != documents {
		return fmt.Errorf("%d bytes of documents, expected %d", n, documents)
	}
	held := map[string]bool{}
	for _, holders := range []map[string][][]byte{m.layers, m.images} {
		for _, bodies := range holders {
			for _, b := range bodies {
				held[string(b)] = true
			}
		}
	}
	if n := p.Usage().ExtentCount; n != len(held) {
		return fmt.Errorf("%d extents, expected %d: a leak or a loss", n, len(held))
	}
	return nil
}

// sameDocuments returns an error if a document differs from the model. A replaced one may still exist.
func (m *model) sameDocuments(p *Pool) error {
	for key := range m.images {
		if err := m.sameDocument(p, key); err != nil {
			return fmt.Errorf("image %q: %w", key, err)
		}
	}
	return nil
}

// sameDocument returns an error if the document of an image differs from the model.
func (m *model) sameDocument(p *Pool, key string) error {
	img, err := p.Image(key)
	if err != nil {
		return err
	}
	doc, err := ReadDocument(p.Region(), img)
	if errors.Is(err, ErrNotFound) && m.docs[key] == nil {
		return nil
	}
	if err == nil && !bytes.Equal(doc, m.docs[key]) {
		err = fmt.Errorf("its document has %d other bytes than the %d expected", len(doc), len(m.docs[key]))
	}
	return err
}

// TestCrash cuts the power at every operation on the region and the index in turn. After reopening,
// everything that was committed must be there, the step in progress must have happened completely or
// not at all, and the pool must work.
func TestCrash(t *testing.T) {
	seeds, stride := uint64(2), 1
	if testing.Short() { // also under the race detector, which finds nothing in one thread
		seeds, stride = 1, 25
	}
	for seed := range seeds {
		rng := rand.New(rand.NewPCG(seed, 0))
		for at := 1; ; at += stride {
			if crashAt(t, at, rng) {
				if at < 50 {
					t.Fatalf("the scenario has only %d operations", at)
				}
				t.Logf("seed %d: up to %d operations", seed, at-1)
				break
			}
			if t.Failed() {
				t.Fatalf("after a crash at operation %d, seed %d", at, seed)
			}
		}
	}
}

// crashAt returns true if the scenario ends before operation at.
func crashAt(t *testing.T, at int, rng *rand.Rand) (finished bool) {
	dir := fastDir(t)
	f := &faults{at: at, stay: true}
	w := &world{t: t, r: newSimRegion(simSize, f), index: filepath.Join(dir, "index"), m: newModel()}
	var survivor *simRegion
	copied := filepath.Join(dir, "copy")
	f.onFail = func() {
		survivor = w.r.crashClone(rng)
		copyFile(t, w.index, copied)
	}
	step := -1
	for i, do := range steps(f) {
		w.next = w.m.clone()
		if err := do(w); err != nil {
			if !errors.Is(err, errFault) {
				t.Fatalf("step %d: %v", i, err)
			}
			step = i
			break
		}
		w.m = w.next
	}
	if w.p != nil {
		defer w.p.Close()
	}
	if survivor == nil {
		return true
	}
	if step < 0 {
		// The fault was only a warning, for example of a punch: everything happened.
		w.next = w.m
	}
	p, err := Open(survivor, copied, Options{})
	switch {
	case step == 0 && (errors.Is(err, ErrWiped) || errors.Is(err, ErrForeign)):
		p, err = Reset(survivor, copied, Options{Force: errors.Is(err, ErrForeign)})
	case err != nil:
		t.Errorf("step %d: open: %v", step, err)
		return false
	}
	if err != nil {
		t.Fatal(err)
	}
	defer p.Close()
	mustCheck(t, p)
	before, after := w.m.matches(p), w.next.matches(p)
	if before != nil && after != nil {
		t.Errorf("step %d: the pool is neither as before it (%v) nor as after it (%v)", step, before, after)
	}
	addImage(t, p, "new", random(99, 1<<20))
	mustCheck(t, p)
	return false
}

// TestFaults fails every operation in turn, once, in a process that goes on: a step that returns an
// error must have changed nothing, and must succeed on the next try.
func TestFaults(t *testing.T) {
	stride := 1
	if testing.Short() {
		stride = 25
	}
	for at := 1; ; at += stride {
		if faultAt(t, at) {
			t.Logf("up to %d operations", at-1)
			break
		}
		if t.Failed() {
			t.Fatalf("after a fault at operation %d", at)
		}
	}
}

func faultAt(t *testing.T, at int) (finished bool) {
	f := &faults{at: at}
	w := &world{t: t, r: newSimRegion(simSize, f), index: filepath.Join(fastDir(t), "index"), m: newModel()}
	for i, do := range steps(f) {
		w.next = w.m.clone()
		err := do(w)
		if err != nil {
			if !errors.Is(err, errFault) {
				t.Fatalf("step %d: %v", i, err)
			}
			w.settle(i, f, err)
			if t.Failed() {
				return false
			}
			continue
		}
		w.m = w.next
		if err := w.m.matches(w.p); err != nil {
			t.Fatalf("step %d: %v", i, err)
		}
	}
	defer w.p.Close()
	mustCheck(t, w.p)
	finished = f.n < at
	f.at = 0
	if err := w.reopen(f); err != nil {
		t.Fatal(err)
	}
	if err := w.m.matches(w.p); err != nil {
		t.Fatalf("after reopening: %v", err)
	}
	mustCheck(t, w.p)
	return finished
}

// settle checks the pool after a failed step and repeats the step.
func (w *world) settle(i int, f *faults, cause error) {
	isOpen := i == 0 || i == reopenStep
	if isOpen {
		// Reopen a pool that could not be opened; a half-made one is wiped.
		if err := w.open(f, func() (*Pool, error) { return Open(w.r, w.index, Options{}) }); err != nil {
			if i != 0 || !errors.Is(err, ErrWiped) {
				w.t.Fatalf("open again after %v: %v", cause, err)
			}
			if err := w.open(f, func() (*Pool,
				error,
			) {
				return Reset(w.r, w.index, Options{Slots: 5, Windows: Yes, Device: No})
			}); err != nil {
				w.t.Fatalf("reset after %v: %v", cause, err)
			}
		}
	}
	if i == turnStep && w.next.matches(w.p) == nil {
		w.m = w.next // the epoch has turned; the next image writes its tree
		return
	}
	if slices.Contains(documentSteps, i) && w.next.sameDocuments(w.p) == nil {
		w.again(i, f, cause) // the index has the document; the same call publishes it
		mustCheck(w.t, w.p)
		return
	}
	if err := w.m.matches(w.p); err != nil {
		w.t.Fatalf("step %d failed with %v, but: %v", i, cause, err)
	}
	mustCheck(w.t, w.p)
	if isOpen {
		return
	}
	w.again(i, f, cause)
}

// again repeats a failed step, which must succeed.
func (w *world) again(i int, f *faults, cause error) {
	w.next = w.m.clone()
	if err := steps(f)[i](w); err != nil {
		w.t.Fatalf("step %d again after %v: %v", i, cause, err)
	}
	w.m = w.next
	if err := w.m.matches(w.p); err != nil {
		w.t.Fatalf("step %d again after %v: %v", i, cause, err)
	}
}

// TestIndexUnknown lets the disk fail at the end of every change of the index in turn, so that the
// change may or may not be there. The pool must report that and make no more changes; when it is
// opened again, either state is fine.
func TestIndexUnknown(t *testing.T) {
	stride := 1
	if testing.Short() {
		stride = 5
	}
	for at := 1; ; at += stride {
		if unknownAt(t, at) {
			if at < 10 {
				t.Fatalf("the scenario has only %d changes", at)
			}
			t.Logf("up to %d changes", at-1)
			break
		}
		if t.Failed() {
			t.Fatalf("after change %d", at)
		}
	}
}

// unknownAt returns true if the scenario ends before change at.
func unknownAt(t *testing.T, at int) (finished bool) {
	dir := fastDir(t)
	before, after := filepath.Join(dir, "before"), filepath.Join(dir, "index")
	f, end := &faults{}, &faults{at: at}
	w := &world{t: t, r: newSimRegion(simSize, f), index: after, m: newModel(), done: end.hit}
	f.each = func() { copyFile(t, after, before) }
	for i, do := range steps(f) {
		w.next = w.m.clone()
		err := do(w)
		if err == nil {
			w.m = w.next
			continue
		}
		if !errors.Is(err, errUnknown) || !errors.Is(err, errFault) {
			t.Fatalf("step %d: %v", i, err)
		}
		f.each = nil
		if err := childLayer(w.p, "more", 1); !errors.Is(err, errUnknown) {
			t.Errorf("step %d: a change after that: %v, expected %v", i, err, errUnknown)
		}
		if err := w.p.Check(ctx, func(Finding) bool { return true }); !errors.Is(err, errUnknown) {
			t.Errorf("step %d: check: %v", i, err)
		}
		if err := w.p.Close(); err != nil {
			t.Error(err)
		}
		for _, index := range []string{before, after} {
			r := newSimRegion(simSize, &faults{})
			copy(r.mem, w.r.mem)
			p, err := Open(r, index, Options{})
			if err != nil {
				t.Fatalf("step %d: open with the index %q: %v", i, filepath.Base(index), err)
			}
			mustCheck(t, p)
			if b, a := w.m.matches(p), w.next.matches(p); b != nil && a != nil {
				t.Errorf("step %d, index %q: the pool is neither as before it (%v) nor as after it (%v)", i,
					filepath.Base(index), b, a)
			}
			addImage(t, p, "new", random(99, 1<<20))
			mustCheck(t, p)
			p.Close()
		}
		return false
	}
	w.p.Close()
	return true
}
