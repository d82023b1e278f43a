// Package clientsuite runs containerd's own client tests (integration/client, as they are in its module) with daxfs as
// the snapshotter. They want images from the internet: a registry on 127.0.0.1 takes the place of the two hosts and has
// images of the same names.
//
// docs/containerd-tests.md lists the tests that run and those that do not. The package reads the list from there, so it
// is complete and true or the package fails.
package clientsuite
