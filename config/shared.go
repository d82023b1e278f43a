package config

import (
	"fmt"
	"path/filepath"
	"strings"
)

// Shared configures the use of pools of other owners.
type Shared struct {
	Pools []string `toml:"pools"`
	// Leases are the lease regions in which this machine tells the owners what it uses, by pool.
	Leases map[string]string `toml:"leases"`
	// Attach are the containerd namespaces to which all images of the pools are attached.
	Attach []string `toml:"attach"`
	// Snapshotter is the name of this snapshotter in containerd.
	Snapshotter string `toml:"snapshotter"`
}

func (s *Shared) validate() []error {
	var errs []error
	bad := func(key, format string, args ...any) {
		errs = append(errs, fmt.Errorf("key %q: "+format, append([]any{key}, args...)...))
	}
	seen := map[string]bool{}
	for _, p := range s.Pools {
		if !isMemory(p) {
			bad("shared.pools", "%q is neither an absolute path nor ADDRESS+SIZE", p)
		}
		if seen[p] {
			bad("shared.pools", "%q stands there twice", p)
		}
		seen[p] = true
	}
	regions := map[string]bool{}
	for p, lease := range s.Leases {
		if regions[lease] {
			bad("shared.leases", "%q is that of two pools, expected one for each", lease)
		}
		regions[lease] = true
		if !seen[p] {
			bad("shared.leases", "%q is not in shared.pools", p)
		}
		if !isMemory(lease) {
			bad("shared.leases", "%q is neither an absolute path nor ADDRESS+SIZE", lease)
		}
	}
	if len(s.Attach) > 0 && len(s.Pools) == 0 {
		bad("shared.attach", "needs shared.pools")
	}
	if s.Snapshotter == "" {
		bad("shared.snapshotter", "is empty")
	}
	return errs
}

// isMemory reports whether a name can be a file, a device or a physical range.
func isMemory(name string) bool {
	if filepath.IsAbs(name) {
		return true
	}
	addr, size, ok := strings.Cut(name, "+")
	return ok && addr != "" && size != "" && !strings.Contains(name, "/")
}
