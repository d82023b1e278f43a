package pool

import (
	"errors"
	"path/filepath"
	"testing"

	"github.com/daxfs/daxfs-snapshotter/daxfs"
)

// asked answers a pool that asks for its readers.
type asked struct {
	users func(m Image) ([]string, error)
	any   func() ([]string, error)
}

func (a *asked) Users(_ [16]byte, m Image) ([]string, error) { return a.users(m) }
func (a *asked) Any([16]byte) ([]string, error)              { return a.any() }

// leasedPool makes a pool with the images a and b, in memory that knows what was synced.
func leasedPool(t *testing.T, f *faults) (p *Pool, r *simRegion, index string) {
	t.Helper()
	r, index = newSimRegion(simSize, f), filepath.Join(fastDir(t), "index")
	p, err := Create(r, index, Options{Slots: 8})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { p.Close() })
	addImage(t, p, "a", bodies.a, bodies.b)
	addImage(t, p, "b", bodies.b, bodies.c)
	return p, r, index
}

// listed returns the keys in the catalogue of a region, joined.
func listed(t *testing.T, r *simRegion) (keys string) {
	t.Helper()
	c, err := ReadCatalogue(r)
	if err != nil {
		t.Fatal(err)
	}
	for _, m := range c.Images {
		if _, err := imageFiles(r, m); err != nil {
			t.Errorf("image %q: %v", m.Key, err)
		}
		keys += m.Key
	}
	return keys
}

// reopened returns what the catalogue lists after a power loss and the next opening.
func reopened(t *testing.T, r *simRegion, index string) string {
	t.Helper()
	copied := index + ".copy"
	copyFile(t, index, copied)
	clone := r.syncedClone()
	p, err := Open(clone, copied, Options{})
	if err != nil {
		t.Errorf("open after a power loss: %v", err)
		return ""
	}
	defer p.Close()
	mustCheck(t, p)
	return listed(t, clone)
}

// The pool asks for the readers of an image after the catalogue has durably stopped listing the image.
func TestRemoveAsksReaders(t *testing.T) {
	p, r, index := leasedPool(t, &faults{})
	p.SetLeases(&asked{users: func(m Image) ([]string, error) {
		if keys := listed(t, r.syncedClone()); m.Key != "a" || keys != "b" {
			t.Errorf("asked for %q while the catalogue lists %q", m.Key, keys)
		}
		if keys := reopened(t, r, index); keys != "b" {
			t.Errorf("after a power loss the catalogue lists %q", keys)
		}
		return []string{"reader"}, nil
	}})
	if err := p.RemoveImage(ctx, "a"); !errors.Is(err, ErrLeased) || !p.Unlisted("a") || p.Unlisted("b") {
		t.Errorf("remove: %v, unlisted %t", err, p.Unlisted("a"))
	}
	readImage(t, r, p.Images()[0])
	if err := p.Relist(ctx, "a"); err != nil || listed(t, r) != "ab" {
		t.Errorf("list again: %v, the catalogue lists %q", err, listed(t, r))
	}
	p.SetLeases(&asked{users: func(Image) ([]string, error) { return nil, errFault }})
	if err := p.RemoveImage(ctx, "a"); !errors.Is(err, errFault) {
		t.Errorf("remove while nobody knows the readers: %v", err)
	}
	readImage(t, r, p.Images()[0])
	p.SetLeases(&asked{users: func(Image) ([]string, error) { return nil, nil }})
	if err := p.RemoveImage(ctx, "a"); err != nil || listed(t, r) != "b" {
		t.Errorf("remove without readers: %v, the catalogue lists %q", err, listed(t, r))
	}
	mustCheck(t, p)
}

// TestRemoveLeasedFaults fails each operation of such a removal. The next removal asks readers only after
// the catalogue has stopped listing the image.
func TestRemoveLeasedFaults(t *testing.T) {
	for at := 1; ; at++ {
		f := &faults{}
		p, r, _ := leasedPool(t, f)
		p.index.fail = f.hit
		p.SetLeases(&asked{users: func(Image) ([]string, error) {
			if keys := listed(t, r.syncedClone()); keys != "b" {
				t.Errorf("after a fault at operation %d the catalogue lists %q when readers are asked", at, keys)
			}
			return []string{"reader"}, nil
		}})
		f.n, f.at = 0, at
		err := p.RemoveImage(ctx, "a")
		finished := f.n < at
		f.at = 0
		if !finished && !errors.Is(err, errFault) {
			t.Errorf("operation %d: %v", at, err)
		}
		if err := p.RemoveImage(ctx, "a"); !errors.Is(err, ErrLeased) {
			t.Errorf("operation %d: remove again: %v", at, err)
		}
		if err := p.Relist(ctx, "a"); err != nil || listed(t, r) != "ab" {
			t.Errorf("operation %d: list again: %v, the catalogue lists %q", at, err, listed(t, r))
		}
		mustCheck(t, p)
		if finished || t.Failed() {
			break
		}
	}
}

// A new epoch begins only if no reader uses the pool after the catalogue has durably become empty.
func TestEpochAsksReaders(t *testing.T) {
	p, r, index := leasedPool(t, &faults{})
	if err := p.SetDocument(ctx, "a", bodies.g); err != nil {
		t.Fatal(err)
	}
	leases := &asked{}
	p.SetLeases(leases)
	uuid, calls := p.UUID(), 0
	lists := func(want string) {
		t.Helper()
		if keys := listed(t, r); keys != want || p.UUID() != uuid {
			t.Errorf("the catalogue lists %q, expected %q; the epoch is another: %t", keys, want, p.UUID() != uuid)
		}
		mustCheck(t, p)
	}
	// A known reader: images do not disappear even for a moment.
	gen := p.Generation()
	leases.any = func() ([]string, error) { return []string{"reader"}, nil }
	if err := p.NewEpoch(ctx); !errors.Is(err, ErrLeased) || p.Generation() != gen {
		t.Errorf("epoch with a reader: %v, generation %d, expected %d", err, p.Generation(), gen)
	}
	lists("ab")
	// A reader that comes while the catalogue becomes empty.
	for _, late := range []error{nil, errFault} {
		calls = 0
		leases.any = func() ([]string, error) {
			if calls++; calls == 1 {
				return nil, nil
			}
			if keys := listed(t, r.syncedClone()); keys != "" {
				t.Errorf("asked for readers while the catalogue lists %q", keys)
			}
			if keys := reopened(t, r, index); keys != "ab" {
				t.Errorf("after a power loss the catalogue lists %q, expected all", keys)
			}
			return []string{"reader"}, late
		}
		if err := p.NewEpoch(ctx); !errors.Is(err, ErrLeased) && (late == nil || !errors.Is(err, late)) || calls != 2 {
			t.Errorf("epoch with a late reader: %v after %d questions", err, calls)
		}
		lists("ab")
	}
	leases.any = func() ([]string, error) { return nil, nil }
	p.index.fail = func(op string) error {
		if op == "epoch" {
			return errFault
		}
		return nil
	}
	if err := p.NewEpoch(ctx); !errors.Is(err, errFault) {
		t.Errorf("epoch that the index refuses: %v", err)
	}
	lists("ab")
	p.index.fail = func(string) error { return nil }
	if err := p.NewEpoch(ctx); err != nil || p.UUID() == uuid || len(p.Images()) != 0 {
		t.Errorf("epoch without readers: %v, %d images", err, len(p.Images()))
	}
	if u := p.Usage(); u.Documents != 0 {
		t.Errorf("%d bytes of documents without an image", u.Documents)
	}
	uuid = p.UUID()
	addImage(t, p, "c", bodies.a)
	lists("c")
}

// However much a new epoch would gain, readers keep the old one. Only if nobody knows whether there are
// readers, that is worth a warning.
func TestReadersKeepFullEpoch(t *testing.T) {
	p, r, _ := leasedPool(t, &faults{})
	for i := range 6 {
		b := p.Begin()
		_, err := p.AddImage(ctx, "more", tree(put(t, b, random(uint64(i), 100))), daxfs.Options{})
		noError(t, errors.Join(err, p.RemoveImage(ctx, "more")))
		b.Discard()
	}
	uuid := p.UUID()
	for _, c := range []struct {
		users  []string
		err    error
		keys   string
		warned bool
	}{
		{users: []string{"reader"}, keys: "ab"},
		{err: errFault, keys: "ab", warned: true},
		{},
	} {
		var warned error
		p.warn = func(err error) { warned = err }
		p.SetLeases(&asked{any: func() ([]string, error) { return c.users, c.err }})
		turned, err := p.NothingMounted(ctx)
		keys := listed(t, r)
		if err != nil || keys != c.keys || turned != (keys == "") || turned != (p.UUID() != uuid) {
			t.Errorf("readers %q, %v: turned %t, %v; the catalogue lists %q", c.users, c.err, turned, err, keys)
		}
		if !errors.Is(warned, c.err) || (warned != nil) != c.warned {
			t.Errorf("readers %q, %v: the warning is %v", c.users, c.err, warned)
		}
		mustCheck(t, p)
	}
}

// TestHideUnpublished adds an image while each operation from one on fails. If the index has the image and
// the region does not, an epoch that does not begin must not put it into the catalogue.
func TestHideUnpublished(t *testing.T) {
	unpublished := 0
	for at := 1; ; at++ {
		f := &faults{}
		p, r, index := leasedPool(t, f)
		p.index.fail = f.hit
		b := p.Begin()
		d := put(t, b, bodies.d)
		f.n, f.at, f.stay = 0, at, true
		_, err := p.AddImage(ctx, "c", tree(d), daxfs.Options{})
		finished := f.n < at
		f.at = 0
		if finished != (err == nil) {
			t.Errorf("operation %d: %v", at, err)
		}
		calls := 0
		p.SetLeases(&asked{any: func() ([]string, error) {
			if calls++; calls == 1 {
				return nil, nil
			}
			return []string{"reader"}, nil
		}})
		unpublished += len(p.stale)
		if err := p.NewEpoch(ctx); !errors.Is(err, ErrLeased) {
			t.Errorf("operation %d: epoch: %v", at, err)
		}
		listed(t, r) // each image can be read
		if _, err := p.AddImage(ctx, "c", tree(d), daxfs.Options{}); err != nil || listed(t, r) != "abc" {
			t.Errorf("operation %d: add again: %v, the catalogue lists %q", at, err, listed(t, r))
		}
		if keys := reopened(t, r, index); keys != "abc" {
			t.Errorf("operation %d: after a power loss the catalogue lists %q", at, keys)
		}
		b.Discard()
		mustCheck(t, p)
		if finished || t.Failed() {
			break
		}
	}
	if unpublished == 0 {
		t.Error("no fault came between the index and the slot")
	}
}
