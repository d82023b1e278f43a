// Package integration tests daxfs with real programs: containerd and its clients (this package, on
// package stack), containerd's own tests (package clientsuite) and other kernels (package qemu). One
// file per behaviour.
package integration
