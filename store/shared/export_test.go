package shared

import "github.com/opencontainers/go-digest"

// WithoutIdentity removes the identity of this machine until restore is called.
func WithoutIdentity() (restore func()) {
	old := identities
	identities = nil
	return func() { identities = old }
}

// BoundDocuments limits how much of documents is read until restore is called.
func BoundDocuments(n int64) (restore func()) {
	old := maxDocuments
	maxDocuments = n
	return func() { maxDocuments = old }
}

// Slot returns the slot of the image that is claimed for a chain.
func (p *Pools) Slot(chain digest.Digest) (slot int, ok bool) {
	for _, m := range p.members {
		m.mu.Lock()
		c, has := m.claims[chain]
		m.mu.Unlock()
		if has {
			return c.Slot, true
		}
	}
	return 0, false
}
