package region

import (
	"fmt"
	"runtime/debug"
)

// Guard calls f, which touches mapped memory, and turns a fault into an error: an unreadable disk
// block, poisoned memory, a truncated file. f must not touch the memory in other goroutines.
func Guard(f func()) (err error) {
	defer debug.SetPanicOnFault(debug.SetPanicOnFault(true))
	defer func() {
		if r := recover(); r != nil {
			fault, ok := r.(interface {
				error
				Addr() uintptr // only memory faults have one
			})
			if !ok {
				panic(r)
			}
			err = fmt.Errorf("mapped memory at %#x: %w", fault.Addr(), fault)
		}
	}()
	f()
	return nil
}
