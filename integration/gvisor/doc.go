// Package gvisor tests that containers of gVisor run on daxfs: docs/gvisor.md.
package gvisor
