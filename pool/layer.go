package pool

import (
	"context"
	"fmt"
	"maps"
	"slices"
)

// Layer returns a copy of a layer's payload. Errors: ErrNotFound.
func (p *Pool) Layer(key string) ([]byte, error) {
	b, err := p.index.payload(key)
	if err != nil {
		return nil, fmt.Errorf("pool: %w", err)
	}
	return b, nil
}

// HasLayer reports whether the layer exists.
func (p *Pool) HasLayer(key string) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	_, ok := p.layers[key]
	return ok
}

// Layers returns the keys of all layers, sorted.
func (p *Pool) Layers() []string {
	p.mu.Lock()
	defer p.mu.Unlock()
	return slices.Sorted(maps.Keys(p.layers))
}

// RemoveLayer removes a layer and frees the extents that nothing else holds. Errors: ErrNotFound; any
// other error leaves the layer unchanged.
func (p *Pool) RemoveLayer(ctx context.Context, key string) error {
	p.commit.Lock()
	defer p.commit.Unlock()
	if err := ctx.Err(); err != nil {
		return err
	}
	p.mu.Lock()
	held, ok := p.layers[key]
	p.mu.Unlock()
	if !ok {
		return fmt.Errorf("pool: layer %q: %w", key, ErrNotFound)
	}
	if err := p.index.removeLayer(key); err != nil {
		return fmt.Errorf("pool: layer %q: %w", key, err)
	}
	p.mu.Lock()
	delete(p.layers, key)
	p.mu.Unlock()
	p.unref(held...)
	return nil
}
