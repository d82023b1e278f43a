package pool

import (
	"context"
	"crypto/sha256"
	"fmt"
	"io"

	"github.com/daxfs/daxfs-snapshotter/pool/internal/alloc"
)

// MaxDocument limits the document of an image, in bytes, because readers allocate untrusted sizes.
const MaxDocument = 8 << 20

// Document is the place of an image's document: bytes that the owner's store wrote for readers. The
// pool does not interpret them. The zero value means no document.
type Document struct {
	Off  int64    // offset in the pool, a multiple of 4096
	Size int64    // in bytes, at most MaxDocument
	Sum  [32]byte // SHA-256
}

// check returns an error if the place is invalid in a pool of size bytes.
func (d Document) check(size int64) error {
	if d == (Document{}) {
		return nil
	}
	if d.Size <= 0 || d.Size > MaxDocument {
		return fmt.Errorf("document of %d bytes, expected 1 to %d", d.Size, MaxDocument)
	}
	if d.Off <= 0 || d.Off%alloc.Unit != 0 || d.Off > size-alloc.RoundUnit(d.Size) {
		return fmt.Errorf("document of %d bytes at %d of %d", d.Size, d.Off, size)
	}
	return nil
}

// ReadDocument reads the document of an image from ReadCatalogue, without locks. It trusts no byte:
// the result has the digest that the catalogue gives.
//
// Errors: ErrNotFound if there is no document; ErrCorrupt if the digest differs. Then the owner has
// replaced the document or removed the image, unless a catalogue that is read afterwards has the same
// Document.
func ReadDocument(r io.ReaderAt, m Image) ([]byte, error) {
	d := m.Document
	if d == (Document{}) {
		return nil, fmt.Errorf("document of image %q: %w", m.Key, ErrNotFound)
	}
	if err := d.check(MaxSize); err != nil {
		return nil, fmt.Errorf("image %q: %w: %w", m.Key, ErrCorrupt, err)
	}
	b := make([]byte, d.Size)
	if n, err := r.ReadAt(b, d.Off); n < len(b) {
		return nil, fmt.Errorf("document of image %q: read %d bytes at %d: %w", m.Key, len(b), d.Off, err)
	}
	if sum := sha256.Sum256(b); sum != d.Sum {
		return nil,
			fmt.Errorf("%w: document of image %q has sum %x, the catalogue says %x", ErrCorrupt, m.Key, sum, d.Sum)
	}
	return b, nil
}

// SetDocument sets or replaces the document of an image; an empty doc removes it. On return the
// document is durable and in the catalogue. Readers of the old one may meanwhile find other bytes,
// which have another digest.
//
// Errors: ErrNotFound; ErrFull, with nothing changed; ErrInvalid if doc is too large. After another
// error the image has the old or the new document; the same call finishes the change.
func (p *Pool) SetDocument(ctx context.Context, key string, doc []byte) error {
	if len(doc) > MaxDocument {
		return fmt.Errorf("pool: document of image %q: %d bytes, expected at most %d: %w", key, len(doc),
			MaxDocument, ErrInvalid)
	}
	p.commit.Lock()
	defer p.commit.Unlock()
	if err := ctx.Err(); err != nil {
		return err
	}
	if err := p.setDocument(key, doc); err != nil {
		return fmt.Errorf("pool: document of image %q: %w", key, err)
	}
	return nil
}

// setDocument is SetDocument. Preconditions: commit is held.
func (p *Pool) setDocument(key string, doc []byte) error {
	p.mu.Lock()
	m, closed := p.images[key], p.closed
	same := m != nil && m.Document.Size == int64(len(doc)) &&
		(m.doc == nil || m.Document.Sum == sha256.Sum256(doc) && !m.doc.damaged)
	p.mu.Unlock()
	switch {
	case closed:
		return ErrClosed
	case m == nil:
		return ErrNotFound
	case same && (p.stale[m.Slot] != nil || p.unannounced):
		return p.republishStale()
	case same:
		return nil
	}
	e, err := p.writeDocument(doc)
	if err != nil {
		return err
	}
	now := *m.storedImage
	now.Document = Document{}
	if e != nil {
		now.Document = Document{Off: e.off, Size: e.size, Sum: e.sum}
	}
	if err := p.index.putStored(&now, p.header.generation+1); err != nil {
		if e != nil {
			p.unref(e)
		}
		return err
	}
	p.mu.Lock()
	if m.doc != nil {
		p.retired = append(p.retired, m.doc)
	}
	m.storedImage, m.doc = &now, e
	p.mu.Unlock()
	p.stale[m.Slot], p.unannounced = m.slot, true
	return p.publish(m)
}

// writeDocument writes a document durably, or returns nil for an empty one. No file shares its extent.
func (p *Pool) writeDocument(doc []byte) (*extent, error) {
	if len(doc) == 0 {
		return nil, nil
	}
	p.mu.Lock()
	e, err := p.newExtent(int64(len(doc)))
	p.mu.Unlock()
	if err != nil {
		return nil, err
	}
	full := make([]byte, e.span().Len) // the rest of the last page is zero
	copy(full, doc)
	err = p.write(full, e.off)
	if err == nil {
		err = p.sync([]*extent{e})
	}
	if err != nil {
		p.unref(e)
		return nil, err
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	e.document, e.sum = true, sha256.Sum256(doc) // from now on a scrub may read it
	return e, nil
}

// adoptDocument gives a loaded image its document, after all other extents of the index were adopted.
func (p *Pool) adoptDocument(m *image) error {
	d := m.Document
	if d == (Document{}) {
		return nil
	}
	if p.extents[d.Off] != nil {
		return fmt.Errorf("image %q: at %d is its document, and other contents", m.Key, d.Off)
	}
	m.doc = &extent{extentID: extentID{off: d.Off, size: d.Size, sum: d.Sum}, refs: 1, synced: true, document: true}
	p.extents[d.Off] = m.doc
	return nil
}

// freeRetired frees replaced documents that no entry refers to. Preconditions: commit is held, mu is
// not, and the newest header is durable.
func (p *Pool) freeRetired() {
	if len(p.stale) > 0 {
		return // an entry may still name one of them
	}
	old := p.retired
	p.unannounced = false
	p.retired = nil
	p.unref(old...)
}

// checkDocuments compares the documents of images with their extents.
func (c *checker) checkDocuments(context.Context) error {
	p := c.p
	p.mu.Lock()
	defer p.mu.Unlock()
	for key, m := range p.images {
		switch d := m.Document; {
		case m.doc == nil && d == (Document{}):
		case m.doc == nil || p.extents[d.Off] != m.doc || !m.doc.document || m.doc.size != d.Size || m.doc.sum != d.Sum:
			c.found("pool.document", key, d.Off, "no document of %d bytes with sum %x is there", d.Size, d.Sum)
		}
	}
	return nil
}
