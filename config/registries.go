package config

import (
	"fmt"
	"path/filepath"
)

// Registries configures how the daemon reaches registries, for every kind of fetch.
type Registries struct {
	// HostsDirs are directories with a hosts.toml per registry. The first one that has the registry wins.
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
