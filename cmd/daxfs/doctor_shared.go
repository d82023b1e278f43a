package main

import (
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/daxfs/daxfs-snapshotter/config"
	"github.com/daxfs/daxfs-snapshotter/pool/region"
	"github.com/daxfs/daxfs-snapshotter/store"
	"github.com/daxfs/daxfs-snapshotter/store/shared"
)

// checkLeases looks for the lease regions of the readers of the daemon's pool. A missing region claims
// nothing, so images that its reader uses would be freed.
func checkLeases(c *config.Config, add adder) {
	if c.Pool.Readers != store.ReadersLeases {
		return
	}
	for _, spec := range c.Pool.Leases {
		path := strings.TrimPrefix(spec, "flock:")
		if i := strings.LastIndex(path, "@"); i > 0 {
			path = path[:i]
		}
		if filepath.IsAbs(path) {
			_, err := os.Stat(path)
			add("lease region "+spec, err == nil,
				"%v: it keeps nothing for its reader; make it, or take it out of pool.leases", err)
		}
	}
}

// checkIdentity finds readers whose identity would change at a boot.
func checkIdentity(c *config.Config, add adder) {
	if len(c.Shared.Leases) == 0 || shared.Identified() {
		return
	}
	dir := existing(c.Root)
	var st unix.Statfs_t
	lost := unix.Statfs(dir, &st) == nil && (st.Type == unix.TMPFS_MAGIC || st.Type == unix.RAMFS_MAGIC)
	add("identity of this machine", !lost,
		"neither /etc/machine-id nor a UUID of the firmware, and %s is in memory: after "+
			"a boot the lease regions belong to another reader; give the machine one of them (-uuid of QEMU)", dir)
}

// checkSharedFiles checks the pools of other owners while the daemon does not run.
func checkSharedFiles(c *config.Config, add adder) {
	for _, name := range c.Shared.Pools {
		rc, err := region.Named(name)
		if err == nil {
			rc.Force = rc.Kind == region.KindPhys // the owner reserved the range
			_, err = catalogue(rc)
		}
		add("shared pool "+name, err == nil, "%v; its images cannot be used", err)
		if spec := c.Shared.Leases[name]; filepath.IsAbs(spec) && !strings.Contains(spec, "@") {
			_, err := os.Stat(spec)
			add("lease for shared pool "+name, err == nil,
				"%v; give this machine its lease region, or the owner may free what is in use here", err)
		}
	}
}
