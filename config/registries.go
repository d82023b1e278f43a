package config

import (
	"fmt"
	"path/filepath"
)

// Registries says how the daemon reaches registries, whatever it fetches.
type Registries struct {
	// HostsDirs are directories with a hosts.toml per registry. The first one that knows a registry counts.
	HostsDirs []string `toml:"hosts_dirs"`
}

func (r *Registries) validate() []error {
	var errs []error
	for _, dir := range r.HostsDirs {
		if !filepath.IsAbs(dir) {
			errs = append(errs, fmt.Errorf("key %q: %q is not an absolute path", "registries.hosts_dirs", dir))
		}
	}
	return errs
}
