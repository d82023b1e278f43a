package daemon

import (
	"fmt"

	"github.com/daxfs/daxfs-snapshotter/config"
	"github.com/daxfs/daxfs-snapshotter/converter/source"
	"github.com/daxfs/daxfs-snapshotter/store"
)

// registries returns how layers are restored from registries; nil if the configuration does not allow that.
func registries(c *config.Config) store.Registry {
	if !c.Layers.Registries {
		return nil
	}
	return func(name string) (source.Source, error) {
		src, err := source.Parse("docker://"+name, source.Config{
			HostDirs: c.Registries.HostsDirs, MaxSize: int64(c.Layers.MaxSize),
		})
		if err != nil {
			return nil, fmt.Errorf("name of an image: %w", err)
		}
		return src, nil
	}
}
