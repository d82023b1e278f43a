//go:build linux

package main

import "unsafe"

// address is where mapped memory is, for the index into the pagemap. b is not empty.
func address(b []byte) uintptr { return uintptr(unsafe.Pointer(&b[0])) }
