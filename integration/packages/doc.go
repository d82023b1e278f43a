// Package packages installs the output of "make dist" in clean Debian systems, and plays the operator
// of docs/operations.md there. "make test" does it in Debian 12, for the ways to install that need no
// other system. "make test-dist" (build tag dist) does all, and "make test-versions" tries the packages
// on several versions of containerd.
package packages
