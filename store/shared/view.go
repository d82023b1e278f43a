package shared

import (
	"context"
	"errors"
	"fmt"

	"github.com/containerd/log"
	"github.com/opencontainers/go-digest"

	"github.com/daxfs/daxfs-snapshotter/pool"
	"github.com/daxfs/daxfs-snapshotter/store"
)

// maxDocuments limits the bytes of documents read from one pool; meanwhile all requests for images
// wait. An honest document has about ten KiB, but the entries of a malicious pool may all name one
// large document.
var maxDocuments int64 = 256 << 20

// view is the contents of one generation of a pool.
type view struct {
	cat *pool.Catalogue
	// chains maps chain IDs to images. Of several with equal trees the first counts.
	chains map[digest.Digest]pool.Image
	// known holds the documents that were read, by their place.
	known map[docID]*entry
}

// docID identifies a document.
type docID struct {
	image imageID
	doc   pool.Document
}

// entry is a document without its blobs.
type entry struct {
	chain digest.Digest // empty if the document is invalid
	names []OCIImage
}

// OCIImage is an OCI image whose tree a pool holds.
type OCIImage struct {
	// Name is the reference; Namespace is the owner's containerd namespace that has it.
	Name, Namespace string
	// Target is the digest of the index or manifest that the name refers to.
	Target digest.Digest
	// Chain is the chain ID of the tree.
	Chain digest.Digest
	// Pool is the name of the pool, as configured.
	Pool string
}

// read returns the view of the newest generation. Preconditions: mu is held.
func (m *member) read(ctx context.Context) (*view, error) {
	cat, err := pool.ReadCatalogue(m.mem)
	if cat == nil {
		return nil, err
	}
	if err != nil {
		m.complain(ctx, fmt.Errorf("some of its images: %w", err))
	}
	if cat.Size > m.mem.Size() {
		return nil,
			fmt.Errorf("%w: it has %d bytes, of which %d are there: was the memory cut off, or only "+
				"a part of it handed on", ErrSize, cat.Size, m.mem.Size())
	}
	old := m.view
	if old != nil && old.cat.PoolID == cat.PoolID && old.cat.Geometry == cat.Geometry &&
		old.cat.Generation == cat.Generation {
		return old, nil
	}
	v := &view{cat: cat, chains: map[digest.Digest]pool.Image{}, known: map[docID]*entry{}}
	room, out := maxDocuments, 0
	for _, img := range cat.Images {
		if img.Document == (pool.Document{}) {
			continue // the owner does not know its chain
		}
		if room -= img.Document.Size; room < 0 {
			out++
			continue
		}
		id := docID{idOf(img), img.Document}
		var e *entry
		if old != nil {
			e = old.known[id]
		}
		if e == nil {
			e = m.readEntry(ctx, img)
		}
		v.known[id] = e
		if _, ok := v.chains[e.chain]; !ok && e.chain != "" {
			v.chains[e.chain] = img
		}
	}
	if out > 0 {
		m.complain(ctx, fmt.Errorf("%d of its images are left out: the documents of all have more than %d bytes", out,
			maxDocuments))
	}
	return v, ctx.Err()
}

// readEntry reads the document of an image. An invalid document excludes only its own image.
func (m *member) readEntry(ctx context.Context, img pool.Image) *entry {
	doc, err := m.document(img)
	if err != nil {
		// The owner may have removed the image meanwhile.
		log.G(ctx).WithError(err).WithField("pool", m.src.Name).WithField("image",
			img.Key).Warn("an image of a shared pool is left out")
		return &entry{}
	}
	e := &entry{chain: doc.ChainID}
	for _, o := range doc.Images {
		e.names = append(e.names, OCIImage{
			Name: o.Name, Namespace: o.Namespace, Target: o.Target.Digest, Chain: doc.ChainID, Pool: m.src.Name,
		})
	}
	return e
}

// document reads the document of an image.
func (m *member) document(img pool.Image) (*store.Document, error) {
	raw, err := pool.ReadDocument(m.mem, img)
	if err != nil {
		return nil, err
	}
	return store.ParseDocument(raw)
}

// OCIImages lists the OCI images that the pools had when they were last read. If several pools have a
// name in a namespace, the first counts.
func (p *Pools) OCIImages() []OCIImage {
	type key struct{ namespace, name string }
	seen := map[key]bool{}
	var out []OCIImage
	for _, m := range p.members {
		m.mu.Lock()
		if m.view != nil {
			for _, img := range m.view.cat.Images {
				e := m.view.known[docID{idOf(img), img.Document}]
				if e == nil {
					continue
				}
				for _, o := range e.names {
					if k := (key{o.Namespace, o.Name}); !seen[k] {
						seen[k] = true
						out = append(out, o)
					}
				}
			}
		}
		m.mu.Unlock()
	}
	return out
}

// Document returns the document of an image from OCIImages. Errors: ErrNotFound if it is gone.
func (p *Pools) Document(o OCIImage) (*store.Document, error) {
	for _, m := range p.members {
		if m.src.Name != o.Pool {
			continue
		}
		m.mu.Lock()
		defer m.mu.Unlock()
		if m.view == nil {
			return nil, errors.Join(m.err, ErrNotFound)
		}
		img, ok := m.view.chains[o.Chain]
		if !ok {
			return nil, fmt.Errorf("chain %s: %w", o.Chain, ErrNotFound)
		}
		return m.document(img)
	}
	return nil, fmt.Errorf("pool %q: %w", o.Pool, ErrNotFound)
}
