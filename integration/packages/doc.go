// Package packages installs the output of "make dist" in clean Debian systems, and plays the operator
// of docs/operations.md there. All tests except TestDist have the build tag dist: "make test-dist"
// runs them, "make test" does not. "make test-versions" tries the packages on several versions of containerd.
package packages
