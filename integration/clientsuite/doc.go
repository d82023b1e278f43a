// Package clientsuite runs containerd's own client tests (integration/client, as they are in its
// module) with daxfs as the snapshotter. The tests pull images from the internet: a registry on
// 127.0.0.1 stands in for the two hosts and has images of the same names.
//
// docs/containerd-tests.md lists the tests that run and those that do not. The package reads the list
// from there and fails if the list is incomplete or wrong.
package clientsuite
