//go:build linux

package main

import (
	"os"
	"unsafe"

	"golang.org/x/sys/unix"
)

// address is where mapped memory is, for the index into the pagemap. b is not empty.
func address(b []byte) uintptr { return uintptr(unsafe.Pointer(&b[0])) }

// mapOver maps the start of a file in the place of b, memory that was mapped before.
func mapOver(b []byte, f *os.File) error {
	_, err := unix.MmapPtr(int(f.Fd()), 0, unsafe.Pointer(&b[0]), uintptr(len(b)), unix.PROT_READ,
		unix.MAP_PRIVATE|unix.MAP_FIXED)
	return err
}
