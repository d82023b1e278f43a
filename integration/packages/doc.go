// Package packages installs what "make dist" makes in clean Debian systems, and plays the operator of docs/operations.md
// there. But for TestDist the tests have the build tag dist: "make test-dist" runs them, "make test" does not. "make test-versions"
// tries the packages on several versions of containerd.
package packages
