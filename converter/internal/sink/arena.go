package sink

import (
	"fmt"
	"unsafe"

	"golang.org/x/sys/unix"
)

// arena is the memory of the packs: mapped once, outside of Go's heap, in huge pages if available.
// Unused memory costs nothing, the garbage collector ignores it, and nobody clears it twice.
type arena struct {
	mem  []byte // as mapped
	next []byte // the unused part, aligned to 2 MiB
}

// newArena reserves address space for n packs.
func newArena(n int) (arena, error) {
	mem, err := unix.Mmap(-1, 0, (n+1)*huge, unix.PROT_READ|unix.PROT_WRITE,
		unix.MAP_PRIVATE|unix.MAP_ANONYMOUS|unix.MAP_NORESERVE)
	if err != nil {
		return arena{}, fmt.Errorf("reserve %d MiB of memory: %w", (n+1)*huge>>20, err)
	}
	skip := -uintptr(unsafe.Pointer(&mem[0])) % huge
	next := mem[skip : int(skip)+n*huge]
	// Failure only costs time.
	_ = unix.Madvise(next, unix.MADV_HUGEPAGE)
	return arena{mem, next}, nil
}

// pack returns 2 MiB with the same alignment. Packs beyond the reservation come from the heap.
func (a *arena) pack() []byte {
	if len(a.next) < huge {
		return make([]byte, huge)
	}
	p := a.next[:huge:huge]
	a.next = a.next[huge:]
	return p
}

// close frees all packs, which must be unused.
func (a *arena) close() {
	if a.mem != nil {
		_ = unix.Munmap(a.mem)
		*a = arena{}
	}
}
