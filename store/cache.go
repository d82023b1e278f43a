package store

import (
	"sync"

	"github.com/daxfs/daxfs-snapshotter/converter/layer"
)

// maxCached limits the decoded layers in memory, in entries of about 50 bytes each. The layers of a
// pull are merged right after they were read, and images share lower layers.
const maxCached = 100_000

// cache keeps the most recently used decoded layers. The zero value is ready to use.
type cache struct {
	mu    sync.Mutex
	order []cached // the most recently used one is last
	cost  int64
}

// cached is one decoded layer, and the size of its tar.
type cached struct {
	key    string
	parsed *layer.Layer
	size   int64
}

func (c *cache) get(key string) (parsed *layer.Layer, size int64, ok bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	e, ok := c.take(key)
	if ok {
		c.put(e)
	}
	return e.parsed, e.size, ok
}

func (c *cache) add(key string, parsed *layer.Layer, size int64) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.take(key)
	c.put(cached{key, parsed, size})
}

func (c *cache) drop(key string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.take(key)
}

// take removes an entry. Preconditions: mu is held.
func (c *cache) take(key string) (cached, bool) {
	for i, e := range c.order {
		if e.key == key {
			c.order = append(c.order[:i], c.order[i+1:]...)
			c.cost -= e.parsed.Cost()
			return e, true
		}
	}
	return cached{}, false
}

// put appends an entry, and removes old ones to make room. Preconditions: mu is held.
func (c *cache) put(e cached) {
	c.order = append(c.order, e)
	c.cost += e.parsed.Cost()
	for c.cost > maxCached && len(c.order) > 0 {
		c.cost -= c.order[0].parsed.Cost()
		c.order[0] = cached{}
		c.order = c.order[1:]
	}
}
