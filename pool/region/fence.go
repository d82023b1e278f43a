package region

import "sync/atomic"

var fence atomic.Uint32

// Fence orders loads and stores before it against those behind it, for all sharing processors.
func Fence() { fence.Add(1) }

// FlushShared writes the cache lines of mapped memory back, drops them, and fences. After a store it
// makes the bytes visible to machines whose caches are not coherent with ours; before a load it makes
// their bytes visible here. On processors other than amd64 it only fences: such memory must be
// coherent there.
func FlushShared(b []byte) {
	_ = flush(b) // never fails
	Fence()
}
