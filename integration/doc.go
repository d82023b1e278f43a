// Package integration holds the tests that run daxfs on the real thing: containerd with its clients (this package, on
// package stack), containerd's own tests (package clientsuite) and other kernels (package qemu). One file per behaviour.
package integration
