package pool

import (
	"maps"
	"slices"
)

// UnusedLayers returns the keys of the layers without any contents in an image, sorted. Removing them
// takes nothing from images; a later image of such a layer needs its contents again.
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
