package pool

import (
	"bytes"
	"crypto/sha256"
	"errors"
	"fmt"
	"sync"
	"testing"

	"github.com/daxfs/daxfs-snapshotter/internal/slow"
	"github.com/daxfs/daxfs-snapshotter/pool/internal/alloc"
)

// readDocument reads the document of an image as readers do.
func readDocument(t testing.TB, p *Pool, key string) ([]byte, error) {
	t.Helper()
	c, err := ReadCatalogue(p.Region())
	if err != nil {
		t.Fatal(err)
	}
	for _, m := range c.Images {
		if m.Key == key {
			return ReadDocument(p.Region(), m)
		}
	}
	return nil, ErrNotFound
}

func TestDocument(t *testing.T) {
	p := newTestPool(t, 64<<20)
	if err := p.SetDocument(ctx, "a", []byte("x")); !errors.Is(err, ErrNotFound) {
		t.Errorf("document of no image: %v, expected ErrNotFound", err)
	}
	addImage(t, p, "a", random(1, 5000))
	if _, err := readDocument(t, p, "a"); !errors.Is(err, ErrNotFound) {
		t.Errorf("no document: %v, expected ErrNotFound", err)
	}
	before := p.Usage()
	for i, doc := range [][]byte{
		[]byte("{}"), random(2, 3<<20), random(2, 3<<20), random(3, MaxDocument),
		[]byte("last"),
	} {
		if err := p.SetDocument(ctx, "a", doc); err != nil {
			t.Fatal(err)
		}
		got, err := readDocument(t, p, "a")
		if err != nil || !bytes.Equal(got, doc) {
			t.Errorf("document %d: read %d other bytes, %v", i, len(got), err)
		}
		// The old one is freed.
		if u := p.Usage(); u.Documents != alloc.RoundUnit(int64(len(doc))) || u.Extents != before.Extents {
			t.Errorf("document %d: %+v, before it %+v", i, u, before)
		}
		mustCheck(t, p)
	}
	if err := p.SetDocument(ctx, "a", make([]byte, MaxDocument+1)); !errors.Is(err, ErrInvalid) {
		t.Errorf("large document: %v, expected ErrInvalid", err)
	}
	if err := p.SetDocument(ctx, "a", nil); err != nil {
		t.Fatal(err)
	}
	if _, err := readDocument(t, p, "a"); !errors.Is(err, ErrNotFound) {
		t.Errorf("removed document: %v, expected ErrNotFound", err)
	}
	if u := p.Usage(); u.Documents != 0 || u.Free != before.Free {
		t.Errorf("after removing: %+v, before %+v", u, before)
	}
	if err := p.SetDocument(ctx, "a", []byte("again")); err != nil {
		t.Fatal(err)
	}
	if err := p.RemoveImage(ctx, "a"); err != nil {
		t.Fatal(err)
	}
	if u := p.Usage(); u.Documents != 0 {
		t.Errorf("%d bytes of documents without an image", u.Documents)
	}
}

// TestDocumentSame sets the same document again, as the owner does at each sweep: nothing changes.
func TestDocumentSame(t *testing.T) {
	p := newTestPool(t, 64<<20)
	addImage(t, p, "a", random(1, 5000))
	if err := p.SetDocument(ctx, "a", []byte("same")); err != nil {
		t.Fatal(err)
	}
	before, err := ReadCatalogue(p.Region())
	if err != nil {
		t.Fatal(err)
	}
	if err := p.SetDocument(ctx, "a", []byte("same")); err != nil {
		t.Fatal(err)
	}
	after, err := ReadCatalogue(p.Region())
	if err != nil || after.Generation != before.Generation {
		t.Errorf("generation %d after the same document, expected %d: %v", after.Generation, before.Generation, err)
	}
}

// TestDocumentReaders reads documents while the owner replaces them and reuses their space: a reader
// gets a document that was set, or an error that tells it to look again.
func TestDocumentReaders(t *testing.T) {
	p := newTestPool(t, 64<<20)
	addImage(t, p, "a", random(1, 5000))
	set := func(i int) {
		if err := p.SetDocument(ctx, "a", bytes.Repeat([]byte{byte(i)}, 1+i*997)); err != nil {
			t.Error(err)
		}
	}
	set(1)
	var wg sync.WaitGroup
	done := make(chan struct{})
	for range 2 {
		wg.Go(func() {
			last := 0
			for {
				select {
				case <-done:
					return
				default:
				}
				c, err := ReadCatalogue(p.Region())
				if err != nil {
					t.Error(err)
					return
				}
				b, err := ReadDocument(p.Region(), c.Images[0])
				if errors.Is(err, ErrCorrupt) {
					continue // it was replaced
				}
				if err != nil || len(b) != 1+int(b[0])*997 || int(b[0]) < last {
					t.Errorf("%d bytes of document %d after document %d: %v", len(b), b[0], last, err)
					return
				}
				last = int(b[0])
			}
		})
	}
	changes := 100
	if slow.Leave() {
		changes = 20
	}
	for i := range changes {
		set(i + 2)
		b := p.Begin()
		put(t, b, random(uint64(i), 4096))
		b.Discard()
	}
	close(done)
	wg.Wait()
}

func TestReadDocumentRefuses(t *testing.T) {
	r := bytes.NewReader(make([]byte, 1<<20))
	none, one := sha256.Sum256(nil), sha256.Sum256([]byte{0})
	for name, d := range map[string]Document{
		"huge":              {Off: 4096, Size: 1 << 40},
		"empty":             {Off: 4096, Sum: none},
		"negative":          {Off: 4096, Size: -1},
		"misaligned":        {Off: 1, Size: 1, Sum: one},
		"in the header":     {Size: 1, Sum: one},
		"before the pool":   {Off: -4096, Size: 1, Sum: one},
		"behind all memory": {Off: MaxSize, Size: 1, Sum: one},
		"digest":            {Off: 4096, Size: 10},
	} {
		if b, err := ReadDocument(r, Image{Key: "a", Document: d}); !errors.Is(err, ErrCorrupt) {
			t.Errorf("%s: %q, %v; expected ErrCorrupt", name, b, err)
		}
	}
	if b, err := ReadDocument(r, Image{Key: "a", Document: Document{Off: 1 << 20, Size: 10}}); err == nil {
		t.Errorf("behind the end: read %q", b)
	}
}

// TestDocumentKeptForReaders fails each operation of replacing a document. The same call then announces the
// new one. If the document of another image is replaced before, what the catalogue names stays readable.
func TestDocumentKeptForReaders(t *testing.T) {
	kept := 0
	replace := func(at int, between bool) (finished bool) {
		f := &faults{}
		p, _, _ := leasedPool(t, f)
		p.index.fail = f.hit
		noError(t, p.SetDocument(ctx, "a", bodies.b))
		noError(t, p.SetDocument(ctx, "b", bodies.d))
		before := p.Usage()
		gen := p.Generation()
		f.n, f.at = 0, at
		err := p.SetDocument(ctx, "b", bodies.g)
		finished = f.n < at
		f.at = 0
		if err != nil && !errors.Is(err, errFault) {
			t.Fatal(err)
		}
		if between {
			noError(t, p.SetDocument(ctx, "a", bodies.c[:len(bodies.b)]))
			doc, err := readDocument(t, p, "b")
			if err != nil || !bytes.Equal(doc, bodies.d) && !bytes.Equal(doc, bodies.g) {
				t.Errorf("operation %d: readers find %d other bytes, %v", at, len(doc), err)
			}
			if len(p.stale) > 0 && bytes.Equal(doc, bodies.d) {
				kept++
			}
		}
		noError(t, p.SetDocument(ctx, "b", bodies.g))
		doc, err := readDocument(t, p, "b")
		if err != nil || !bytes.Equal(doc, bodies.g) || p.Generation() <= gen {
			t.Errorf("operation %d: set again, readers find %d other bytes in generation %d, %v; before it was %d", at,
				len(doc), p.Generation(), err, gen)
		}
		u := p.Usage()
		if u.Documents != before.Documents || u.Free != before.Free || u.ExtentCount != before.ExtentCount {
			t.Errorf("operation %d: %+v, expected as much as before: %+v", at, u, before)
		}
		mustCheck(t, p)
		return finished
	}
	for at := 1; ; at++ {
		one, other := replace(at, false), replace(at, true)
		if one && other || t.Failed() {
			break
		}
	}
	if kept == 0 {
		t.Error("no fault left the old document in the catalogue")
	}
}

// TestDocumentDamaged changes the bytes of a document. Check names it, a scrub takes it, but not its
// image, out of the catalogue, and setting it again repairs it.
func TestDocumentDamaged(t *testing.T) {
	p := newTestPool(t, 64<<20)
	addImage(t, p, "a", random(1, 5000))
	doc := []byte("a document")
	if err := p.SetDocument(ctx, "a", doc); err != nil {
		t.Fatal(err)
	}
	m, err := p.Image("a")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := p.Region().WriteAt([]byte{'A'}, m.Document.Off); err != nil {
		t.Fatal(err)
	}
	if _, err := readDocument(t, p, "a"); !errors.Is(err, ErrCorrupt) {
		t.Errorf("read: %v, expected ErrCorrupt", err)
	}
	var rules []string
	if err := p.Check(ctx, func(f Finding) bool { rules = append(rules, f.Rule); return true }); err != nil {
		t.Fatal(err)
	}
	if fmt.Sprint(rules) != "[pool.document]" {
		t.Errorf("findings %q, expected pool.document alone", rules)
	}
	found := 0
	if _, err := p.Scrub(ctx, ScrubOptions{}, func(d Damage) {
		found++
		if f := d.Finding(); f.Rule != "pool.document" || f.Key != "a" {
			t.Errorf("scrub: %v", f)
		}
	}); err != nil || found != 1 {
		t.Errorf("scrub found %d, %v", found, err)
	}
	if _, err := readDocument(t, p, "a"); !errors.Is(err, ErrNotFound) {
		t.Errorf("after the scrub: %v, expected ErrNotFound", err)
	}
	if p.ImageDamaged("a") {
		t.Error("the image counts as damaged")
	}
	if err := p.SetDocument(ctx, "a", doc); err != nil {
		t.Fatal(err)
	}
	if b, err := readDocument(t, p, "a"); err != nil || !bytes.Equal(b, doc) || p.DamagedCount() != 0 {
		t.Errorf("mended: %q, %v, %d damaged", b, err, p.DamagedCount())
	}
}

// TestEpochFreesReplacedDocuments fails each operation of replacing a document. The old document, which the
// catalogue may still name then, is freed by the next epoch, and only once.
func TestEpochFreesReplacedDocuments(t *testing.T) {
	waited := 0
	for at := 1; ; at++ {
		f := &faults{}
		p, _, _ := leasedPool(t, f)
		noError(t, p.SetDocument(ctx, "b", bodies.d))
		f.n, f.at = 0, at
		err := p.SetDocument(ctx, "b", bodies.g)
		finished := f.n < at
		f.at = 0
		if err != nil && !errors.Is(err, errFault) {
			t.Fatal(err)
		}
		waited += len(p.retired)
		noError(t, p.NewEpoch(ctx))
		if u := p.Usage(); u.Documents != 0 {
			t.Errorf("operation %d: %d bytes of documents without an image", at, u.Documents)
		}
		mustCheck(t, p)
		addImage(t, p, "c", bodies.a)
		for _, doc := range [][]byte{bodies.d, bodies.g} {
			noError(t, p.SetDocument(ctx, "c", doc))
			if got, err := readDocument(t, p, "c"); err != nil || !bytes.Equal(got, doc) {
				t.Errorf("operation %d: in the new epoch the document has %d other bytes, %v", at, len(got), err)
			}
			if u := p.Usage(); u.Documents != alloc.RoundUnit(int64(len(doc))) {
				t.Errorf("operation %d: in the new epoch %d bytes are documents, expected one", at, u.Documents)
			}
		}
		mustCheck(t, p)
		if finished || t.Failed() {
			break
		}
	}
	if waited == 0 {
		t.Error("no replaced document waited for the next epoch")
	}
}
