package pool

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"path/filepath"
	"slices"
	"testing"

	"github.com/daxfs/daxfs-snapshotter/daxfs"
)

// TestSyncOrder cuts the power before every sync of the region and after every step, and loses all that was
// not synced: the index must never name what is not durable.
func TestSyncOrder(t *testing.T) {
	f := &faults{only: "sync"}
	w := &world{t: t, r: newSimRegion(simSize, f), index: filepath.Join(fastDir(t), "index"), m: newModel()}
	step, seen := 0, 0
	f.each = func() {
		if step == 0 || t.Failed() {
			return // no pool yet
		}
		id := w.p.index.transaction()
		if testing.Short() && id == seen {
			return // the index names nothing new
		}
		seen = id
		w.lose(step, w.m, w.next)
	}
	for i, do := range steps(f) {
		step, w.next = i, w.m.clone()
		if err := do(w); err != nil {
			t.Fatalf("step %d: %v", i, err)
		}
		w.m = w.next
		w.lose(i, w.m)
	}
	w.p.Close()
	if f.n < 50 {
		t.Errorf("the scenario has only %d syncs", f.n)
	}
}

// TestSyncFails fails every sync of the region in turn, once. If the step succeeds nevertheless, what it
// did must survive a power loss.
func TestSyncFails(t *testing.T) {
	stride := 1
	if testing.Short() {
		stride = 10
	}
	for at := 1; ; at += stride {
		f := &faults{only: "sync", at: at}
		w := &world{t: t, r: newSimRegion(simSize, f), index: filepath.Join(fastDir(t), "index"), m: newModel()}
		for i, do := range steps(f) {
			w.next = w.m.clone()
			err := do(w)
			if err != nil && !errors.Is(err, errFault) {
				t.Fatalf("step %d: %v", i, err)
			}
			if err != nil {
				break // TestFaults examines what is left then
			}
			if w.m = w.next; f.n >= at {
				w.lose(i, w.m)
				break
			}
		}
		if w.p != nil {
			w.p.Close()
		}
		if f.n < at {
			t.Logf("up to %d syncs", at-1)
			break
		}
		if t.Failed() {
			t.Fatalf("after a failed sync %d", at)
		}
	}
}

// lose opens the pool as it is after a power loss that takes all that was not synced. It must be as one
// of the models says.
func (w *world) lose(step int, models ...*model) {
	copied := w.index + ".copy"
	copyFile(w.t, w.index, copied)
	p, err := Open(w.r.syncedClone(), copied, Options{})
	if err != nil {
		w.t.Errorf("step %d: open: %v", step, err)
		return
	}
	defer p.Close()
	mustCheck(w.t, p)
	if got, want := publishedSlots(w.t, p), slotsOf(p); !slices.Equal(got, want) {
		w.t.Errorf("step %d: slots %v are published, expected %v", step, got, want)
	}
	var errs []error
	for _, m := range models {
		err := m.matches(p)
		if err == nil {
			return
		}
		errs = append(errs, err)
	}
	w.t.Errorf("step %d: the pool is in no expected state: %v", step, errors.Join(errs...))
}

// publishedSlots returns the slots of the live tree that hold an image.
func publishedSlots(t testing.TB, p *Pool) (slots []int) {
	t.Helper()
	live, err := daxfs.OpenLive(p.Region(), p.Region().Size())
	if err != nil {
		t.Fatal(err)
	}
	for i := range live.Geometry().Slots {
		switch _, err := live.Image(i); {
		case err == nil:
			slots = append(slots, i)
		case !errors.Is(err, fs.ErrNotExist):
			t.Errorf("slot %d: %v", i, err)
		}
	}
	return slots
}

// slotsOf returns the slots of the images in the index.
func slotsOf(p *Pool) (slots []int) {
	for _, m := range p.Images() {
		slots = append(slots, m.Slot)
	}
	return slots
}

// TestReaders looks at the pool as a reader on another kernel does, at every operation on the region and
// the index: each image of the catalogue has the contents of before or after the step in progress. The
// generation rises after each change.
func TestReaders(t *testing.T) {
	f := &faults{}
	w := &world{t: t, r: newSimRegion(simSize, f), index: filepath.Join(fastDir(t), "index"), m: newModel()}
	step, looks, images := 0, 0, 0
	last, changed, seen := uint64(0), uint64(0), "[]"
	f.each = func() {
		if step == 0 || t.Failed() {
			return // no pool yet
		}
		looks++
		c, err := ReadCatalogue(w.r)
		if err != nil || c.Generation < last {
			t.Errorf("step %d, operation %d: generation %d after %d, %v", step, f.n, c.Generation, last, err)
			return
		}
		if now := fmt.Sprint(c.Images); now != seen {
			changed, seen = last, now
		}
		last = c.Generation
		for _, m := range c.Images {
			images++
			if err := w.readable(m); err != nil {
				t.Errorf("step %d, operation %d: image %q: %v", step, f.n, m.Key, err)
			}
		}
	}
	for i, do := range steps(f) {
		step, w.next = i, w.m.clone()
		if err := do(w); err != nil {
			t.Fatalf("step %d: %v", i, err)
		}
		w.m = w.next
		if gen := w.p.Generation(); i > 0 && gen <= changed {
			t.Errorf("step %d: the catalogue changed after generation %d, and generation %d announces it", i,
				changed, gen)
		}
	}
	w.p.Close()
	if looks < 100 || images < 100 {
		t.Errorf("looked %d times and read %d images: nothing was tested", looks, images)
	}
}

// readable returns an error if a reader gets neither the old nor the new contents of an image.
func (w *world) readable(m Image) error {
	bodies, ok := w.m.images[m.Key]
	if !ok {
		bodies, ok = w.next.images[m.Key]
	}
	if !ok {
		return errors.New("it was never added, or was removed long ago")
	}
	files, err := imageFiles(w.r, m)
	if err != nil {
		return err
	}
	for i, want := range bodies {
		if got := files[fmt.Sprintf("file%05d", i)]; !bytes.Equal(got, want) {
			return fmt.Errorf("file %d has %d other bytes", i, len(got))
		}
	}
	doc, err := ReadDocument(w.r, m)
	if errors.Is(err, ErrNotFound) {
		err = nil
	}
	if err != nil {
		return err
	}
	if !bytes.Equal(doc, w.m.docs[m.Key]) && !bytes.Equal(doc, w.next.docs[m.Key]) {
		return fmt.Errorf("its document has %d other bytes", len(doc))
	}
	return nil
}
