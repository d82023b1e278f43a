//go:build linux

package main

import (
	"os"
	"unsafe"

	"golang.org/x/sys/unix"
)

// address returns the address of mapped memory, for the index into the pagemap. b is not empty.
func address(b []byte) uintptr { return uintptr(unsafe.Pointer(&b[0])) }

// mapOver maps the start of a file over the existing mapping b.
func mapOver(b []byte, f *os.File) error {
	_, err := unix.MmapPtr(int(f.Fd()), 0, unsafe.Pointer(&b[0]), uintptr(len(b)), unix.PROT_READ,
		unix.MAP_PRIVATE|unix.MAP_FIXED)
	return err
}
