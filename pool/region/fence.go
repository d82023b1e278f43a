package region

import "sync/atomic"

var fence atomic.Uint32

// Fence orders all loads and stores before it against all behind it, for every processor that has the memory.
func Fence() { fence.Add(1) }

// FlushShared writes the cache lines of mapped memory back to it, drops them, and fences. After a store it makes the bytes
// visible to machines whose caches know nothing of each other; before a load it makes the load see theirs. On processors
// other than amd64 it only fences: there such memory has to be coherent.
func FlushShared(b []byte) {
	_ = flush(b) // never fails
	Fence()
}
