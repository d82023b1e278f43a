package pool

import (
	"maps"
	"slices"
)

// UnusedLayers returns the keys of the layers none of whose contents an image holds, sorted. Removing them takes nothing
// from what can be mounted; an image that needs them later needs their contents again.
func (p *Pool) UnusedLayers() []string {
	p.mu.Lock()
	defer p.mu.Unlock()
	var out []string
	for _, key := range slices.Sorted(maps.Keys(p.layers)) {
		if !slices.ContainsFunc(p.layers[key], func(e *extent) bool { return e.images > 0 }) {
			out = append(out, key)
		}
	}
	return out
}
