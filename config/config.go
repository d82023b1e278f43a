// Package config defines the configuration of the daemon daxfs-snapshotter: a TOML file over documented defaults.
//
//	c, err := config.Load("/etc/daxfs-snapshotter/config.toml")
//
// [Sample] explains every key; a test keeps it equal to Default. An unknown key is an error that names
// it, because a misspelt key would otherwise silently leave its default in force.
package config

import (
	"bytes"
	_ "embed"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/pelletier/go-toml/v2"
)

// Sample is the configuration file with all defaults and their explanations.
//
//go:embed sample.toml
var Sample []byte

// DefaultPath is the default path of the configuration file. That file may be missing.
const DefaultPath = "/etc/daxfs-snapshotter/config.toml"

// Config is the configuration of the daemon. sample.toml explains the keys.
type Config struct {
	Root       string     `toml:"root"`
	Address    string     `toml:"address"`
	Log        Log        `toml:"log"`
	Containerd Containerd `toml:"containerd"`
	Pool       Pool       `toml:"pool"`
	Shared     Shared     `toml:"shared"`
	Mount      Mount      `toml:"mount"`
	Layers     Layers     `toml:"layers"`
	Registries Registries `toml:"registries"`
	Partial    Partial    `toml:"partial"`
	Metrics    Metrics    `toml:"metrics"`
}

// Log configures the log.
type Log struct {
	Level  string `toml:"level"`
	Format string `toml:"format"`
}

// Containerd configures where streaming mode reads layers.
type Containerd struct {
	Address string `toml:"address"`
}

// Pool configures the shared memory.
type Pool struct {
	Kind string `toml:"kind"`
	Path string `toml:"path"`
	Size Size   `toml:"size"`
	Phys uint64 `toml:"phys"`
	// Windows selects whether images get windows for the kernel module daxfs.
	Windows string `toml:"windows"`
	// DAX selects whether kernels mount the pool with DAX.
	DAX string `toml:"dax"`
	// Scrub is the number of content bytes that the background scrub reads per second; 0 turns it off.
	Scrub Size `toml:"scrub"`
	// Readers selects how images are kept for other readers of the pool. Leases are their lease regions.
	Readers string   `toml:"readers"`
	Leases  []string `toml:"leases"`
}

// Mount configures the mounts of images and containers.
type Mount struct {
	Driver         string   `toml:"driver"`
	OverlayOptions []string `toml:"overlay_options"`
	RemapIDs       bool     `toml:"remap_ids"`
	FUSEHelper     string   `toml:"fuse_helper"`
}

// Layers configures the handling of layers.
type Layers struct {
	Durability string `toml:"durability"`
	Workers    int    `toml:"workers"`
	MaxSize    Size   `toml:"max_size"`
	MaxEntries int64  `toml:"max_entries"`
	// Registries lets the daemon fetch layers from registries if no copy is left on this machine.
	Registries bool `toml:"registries"`
}

// Metrics configures where the daemon serves its metrics.
type Metrics struct {
	Address string `toml:"address"`
	Pprof   bool   `toml:"pprof"`
}

// The values of Layers.Durability.
const (
	// DurabilityPack keeps a copy of each streamed blob below the root, where the pool does not survive a reboot.
	DurabilityPack = "pack"
	// DurabilityContent relies on containerd to keep the blobs.
	DurabilityContent = "content"
)

// kinds and drivers are the valid values of the keys. Their packages are not imported, so that a
// configuration can be checked on a machine that supports none of them.
var (
	kinds        = []string{"file", "tmpfs", "hugetlbfs", "pmem", "devdax", "dmabuf", "phys"}
	drivers      = []string{"auto", "erofs", "erofs-dax", "erofs-file", "erofs-loop", "daxfs", "fuse"}
	choices      = []string{"auto", "yes", "no"}
	durabilities = []string{DurabilityPack, DurabilityContent}
	readers      = []string{"none", "keep", "leases"}
	levels       = []string{"trace", "debug", "info", "warn", "error", "fatal"}
	formats      = []string{"text", "json"}
)

// Default returns the configuration that applies without a file.
func Default() *Config {
	return &Config{
		Root:       "/var/lib/daxfs-snapshotter",
		Address:    "/run/daxfs-snapshotter/daxfs.sock",
		Log:        Log{Level: "info", Format: "text"},
		Containerd: Containerd{Address: "/run/containerd/containerd.sock"},
		Pool: Pool{
			Kind: "file", Windows: "auto", DAX: "auto", Scrub: 2 << 20, Readers: "none",
			Leases: []string{},
		},
		Shared: Shared{Pools: []string{}, Leases: map[string]string{}, Attach: []string{}, Snapshotter: "daxfs"},
		Mount:  Mount{Driver: "auto", OverlayOptions: []string{}, RemapIDs: true},
		Layers: Layers{
			Durability: DurabilityPack, Workers: 2, MaxSize: 1 << 40, MaxEntries: 4 << 20,
		},
		Registries: Registries{HostsDirs: []string{"/etc/containerd/certs.d", "/etc/docker/certs.d"}},
		Partial: Partial{
			Enabled: true, Exclude: []string{}, Requests: 8,
			AnswerTimeout: Duration(10 * time.Second), LayerTimeout: Duration(2 * time.Minute),
		},
	}
}

// Load reads the file at path over the defaults and validates the result. The file at DefaultPath may be missing.
func Load(path string) (*Config, error) {
	raw, err := os.ReadFile(path)
	if errors.Is(err, fs.ErrNotExist) && path == DefaultPath {
		c := Default()
		return c, c.Validate()
	}
	if err != nil {
		return nil, err
	}
	c, err := Parse(raw)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	return c, nil
}

// Parse reads the text of a configuration file over the defaults and validates the result.
func Parse(raw []byte) (*Config, error) {
	c := Default()
	d := toml.NewDecoder(bytes.NewReader(raw)).DisallowUnknownFields()
	if err := d.Decode(c); err != nil {
		return nil, explain(err)
	}
	return c, c.Validate()
}

// removed maps keys of earlier versions to the reason for their removal.
var removed = map[string]string{
	"layers.settle": "an image is built when its last layer or its first container is known",
}

// explain turns an error of the decoder into one line.
func explain(err error) error {
	if strict, ok := errors.AsType[*toml.StrictMissingError](err); ok {
		var errs []error
		for _, e := range strict.Errors {
			line, _ := e.Position()
			key := strings.Join(e.Key(), ".")
			if why := removed[key]; why != "" {
				errs = append(errs, fmt.Errorf("line %d: key %q was removed: %s; delete the line", line, key, why))
				continue
			}
			errs = append(errs, fmt.Errorf("line %d: unknown key %q", line, key))
		}
		return errors.Join(errs...)
	}
	if de, ok := errors.AsType[*toml.DecodeError](err); ok {
		line, col := de.Position()
		if key := strings.Join(de.Key(), "."); key != "" {
			return fmt.Errorf("line %d, column %d: key %q: %w", line, col, key, err)
		}
		return fmt.Errorf("line %d, column %d: %w", line, col, err)
	}
	return err
}

// Validate returns all errors in the configuration, each with its key.
func (c *Config) Validate() error {
	var errs []error
	bad := func(key string, format string, args ...any) {
		errs = append(errs, fmt.Errorf("key %q: "+format, append([]any{key}, args...)...))
	}
	oneOf := func(key, value string, allowed []string) {
		if !slices.Contains(allowed, value) {
			bad(key, "%q is not one of %q", value, allowed)
		}
	}
	for _, p := range []struct{ key, value string }{
		{"root", c.Root}, {"address", c.Address}, {"containerd.address", c.Containerd.Address},
	} {
		if !filepath.IsAbs(p.value) {
			bad(p.key, "%q is not an absolute path", p.value)
		}
	}
	if strings.ContainsAny(c.Root, ":,\\") {
		// Directories below the root become overlay mount options.
		bad("root", "%q contains a colon, comma or backslash", c.Root)
	}
	if len(c.Address) > 107 {
		bad("address", "%q has %d bytes, a unix socket can have 107", c.Address, len(c.Address))
	}
	oneOf("log.level", c.Log.Level, levels)
	oneOf("log.format", c.Log.Format, formats)
	oneOf("pool.kind", c.Pool.Kind, kinds)
	oneOf("pool.windows", c.Pool.Windows, choices)
	oneOf("pool.dax", c.Pool.DAX, choices)
	oneOf("pool.readers", c.Pool.Readers, readers)
	oneOf("mount.driver", c.Mount.Driver, drivers)
	oneOf("layers.durability", c.Layers.Durability, durabilities)
	errs = append(errs, c.Pool.validate()...)
	errs = append(errs, c.Registries.validate()...)
	errs = append(errs, c.Partial.validate()...)
	errs = append(errs, c.Shared.validate()...)
	if h := c.Mount.FUSEHelper; h != "" && !filepath.IsAbs(h) {
		bad("mount.fuse_helper", "%q is not an absolute path", h)
	}
	if c.Layers.Workers < 1 || c.Layers.Workers > 64 {
		bad("layers.workers", "%d is not in 1 to 64", c.Layers.Workers)
	}
	if c.Layers.MaxSize < 1 {
		bad("layers.max_size", "%d is not positive", int64(c.Layers.MaxSize))
	}
	if c.Layers.MaxEntries < 1 {
		bad("layers.max_entries", "%d is not positive", c.Layers.MaxEntries)
	}
	if c.Metrics.Pprof && c.Metrics.Address == "" {
		bad("metrics.pprof", "needs metrics.address")
	}
	return errors.Join(errs...)
}

func (p *Pool) validate() []error {
	var errs []error
	if p.Size < 0 {
		errs = append(errs, fmt.Errorf("key %q: %d is negative", "pool.size", int64(p.Size)))
	}
	if p.Scrub < 0 {
		errs = append(errs, fmt.Errorf("key %q: %d is negative", "pool.scrub", int64(p.Scrub)))
	}
	if p.Readers == "leases" != (len(p.Leases) > 0) {
		errs = append(errs, fmt.Errorf("keys %q and %q: lease regions go with \"leases\", and it needs some",
			"pool.readers", "pool.leases"))
	}
	for _, l := range p.Leases {
		path := strings.TrimPrefix(l, "flock:")
		if !filepath.IsAbs(path) && (path != l || !strings.Contains(l, "+")) {
			errs = append(errs,
				fmt.Errorf("key %q: %q is neither an absolute path, flock:PATH nor ADDRESS+SIZE", "pool.leases", l))
		}
	}
	if p.Path != "" && !filepath.IsAbs(p.Path) {
		errs = append(errs, fmt.Errorf("key %q: %q is not an absolute path", "pool.path", p.Path))
	}
	switch p.Kind {
	case "file", "tmpfs", "phys":
	default:
		// The daemon never uses a device that the configuration does not name.
		if p.Path == "" && slices.Contains(kinds, p.Kind) {
			errs = append(errs, fmt.Errorf("key %q: is empty, a pool of kind %q needs it", "pool.path", p.Kind))
		}
	}
	if p.Kind == "phys" && (p.Phys == 0 || p.Size == 0) {
		errs = append(errs,
			fmt.Errorf("keys %q and %q: a pool of kind %q needs both", "pool.phys", "pool.size", p.Kind))
	}
	if p.Kind == "phys" && p.Path != "" {
		errs = append(errs,
			fmt.Errorf("key %q: a pool of kind %q has none, it is a range of addresses; for a device set "+
				"another pool.kind", "pool.path", p.Kind))
	}
	if p.Kind != "phys" && p.Phys != 0 {
		errs = append(errs, fmt.Errorf("key %q: a pool of kind %q has none", "pool.phys", p.Kind))
	}
	return errs
}
