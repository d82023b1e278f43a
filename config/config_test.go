package config_test

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"
	"time"

	"github.com/pelletier/go-toml/v2"

	"github.com/daxfs/daxfs-snapshotter/config"
	"github.com/daxfs/daxfs-snapshotter/mount/drivers"
	"github.com/daxfs/daxfs-snapshotter/pool/region"
)

func TestSampleIsDefault(t *testing.T) {
	c, err := config.Parse(config.Sample)
	if err != nil {
		t.Fatal(err)
	}
	if want := config.Default(); !reflect.DeepEqual(c, want) {
		t.Fatalf("the sample says\n%+v\nthe default is\n%+v", c, want)
	}
}

// TestSampleIsComplete finds keys that the sample or the document lacks, and defaults in the document
// that are not those of the sample.
func TestSampleIsComplete(t *testing.T) {
	var sample map[string]any
	if err := toml.Unmarshal(config.Sample, &sample); err != nil {
		t.Fatal(err)
	}
	document, err := os.ReadFile("../docs/config.md")
	if err != nil {
		t.Fatal(err)
	}
	var check func(prefix string, typ reflect.Type, have map[string]any)
	check = func(prefix string, typ reflect.Type, have map[string]any) {
		for f := range typ.Fields() {
			key := f.Tag.Get("toml")
			v, ok := have[key]
			if !ok {
				t.Errorf("the sample lacks %s%s", prefix, key)
				continue
			}
			if f.Type.Kind() == reflect.Struct {
				check(prefix+key+".", f.Type, v.(map[string]any))
			} else if want := documented(prefix+key, v); !strings.Contains(string(document), want) {
				t.Errorf("docs/config.md lacks %q", want)
			}
		}
	}
	check("", reflect.TypeFor[config.Config](), sample)
}

// documented returns how docs/config.md begins to describe a key with a default.
func documented(key string, def any) string {
	value := fmt.Sprintf("`%v`", def)
	switch def := def.(type) {
	case string:
		if def == "" {
			value = "empty"
		}
	case []any:
		list := make([]string, len(def))
		for i, v := range def {
			list[i] = fmt.Sprintf("%q", v)
		}
		value = "`[" + strings.Join(list, ", ") + "]`"
	case map[string]any:
		value = "`{}`"
	}
	if key == "pool.path" {
		value = "by kind"
	}
	return "`" + key + "` (" + value
}

// The unit has what docs/config.md promises, and nothing that would give it a mount namespace.
func TestUnit(t *testing.T) {
	raw, err := os.ReadFile("../docs/systemd/daxfs-snapshotter.service")
	if err != nil {
		t.Fatal(err)
	}
	unit := string(raw)
	for _, want := range []string{"KillMode=process", "Before=containerd.service"} {
		if !strings.Contains(unit, "\n"+want+"\n") {
			t.Errorf("the unit lacks %s", want)
		}
	}
	for line := range strings.Lines(unit) {
		for _, option := range []string{
			"Private", "Protect", "ReadOnlyPaths", "ReadWritePaths", "InaccessiblePaths", "Bind", "TemporaryFileSystem",
			"RootDirectory", "RootImage", "MountFlags", "MountAPIVFS", "DynamicUser",
		} {
			if strings.HasPrefix(line, option) {
				t.Errorf("the unit gets a mount namespace by %s", line)
			}
		}
	}
}

func TestParse(t *testing.T) {
	c, err := config.Parse([]byte(`
root = "/data/daxfs"
[pool]
kind = "tmpfs"
size = "3GiB"
readers = "leases"
leases = ["/srv/a.lease", "flock:/srv/b.lease", "0x100000000+8192"]
[layers]
max_size = 1000000
[partial]
requests = 8
layer_timeout = "90s"
exclude = ["registry.example.com:5000"]
[mount]
overlay_options = ["volatile"]
`))
	if err != nil {
		t.Fatal(err)
	}
	want := config.Default()
	want.Root = "/data/daxfs"
	want.Pool.Kind, want.Pool.Size = "tmpfs", 3<<30
	want.Pool.Readers = "leases"
	want.Pool.Leases = []string{"/srv/a.lease", "flock:/srv/b.lease", "0x100000000+8192"}
	want.Layers.MaxSize = 1000000
	want.Partial.Requests, want.Partial.LayerTimeout = 8, config.Duration(90*time.Second)
	want.Partial.Exclude = []string{"registry.example.com:5000"}
	want.Mount.OverlayOptions = []string{"volatile"}
	if !reflect.DeepEqual(c, want) {
		t.Fatalf("got\n%+v\nexpected\n%+v", c, want)
	}
}

func TestRefused(t *testing.T) {
	for _, tc := range []struct{ text, want string }{
		{`rooot = "/x"`, `line 1: unknown key "rooot"`},
		{"[pool]\nkindd = \"file\"\nsice = 1", `unknown key "pool.kindd"`},
		{"[pool]\nkindd = \"file\"\nsice = 1", `line 3: unknown key "pool.sice"`},
		{"[nothing]\nx = 1", `unknown key "nothing`},
		{`root = 3`, `line 1`},
		{`root = "relative"`, `key "root": "relative" is not an absolute path`},
		{`root = "/a:b"`, `key "root"`},
		{`address = "/` + strings.Repeat("x", 107) + `"`, `key "address"`},
		{"[log]\nlevel = \"loud\"", `key "log.level": "loud" is not one of`},
		{"[log]\nformat = \"xml\"", `key "log.format"`},
		{"[pool]\nkind = \"ram\"", `key "pool.kind": "ram" is not one of`},
		{"[pool]\nkind = \"pmem\"", `key "pool.path": is empty, a pool of kind "pmem" needs it`},
		{"[pool]\nkind = \"phys\"\nsize = \"1GiB\"", `"pool.phys"`},
		{"[pool]\nphys = 4096", `key "pool.phys"`},
		{"[pool]\nkind = \"phys\"\nphys = 4294967296\nsize = \"1GiB\"\npath = \"/dev/mem\"", `"pool.path"`},
		{"[pool]\nsize = \"many\"", `size "many"`},
		{"[pool]\nsize = -1", `key "pool.size"`},
		{"[pool]\nscrub = -1", `key "pool.scrub": -1 is negative`},
		{"[pool]\npath = \"pool\"", `key "pool.path"`},
		{"[mount]\ndriver = \"erofs-tape\"", `key "mount.driver"`},
		{"[mount]\nfuse_helper = \"daxfs\"", `key "mount.fuse_helper"`},
		{"[layers]\ndurability = \"hope\"", `key "layers.durability"`},
		{"[layers]\nworkers = 0", `key "layers.workers"`},
		{"[layers]\nsettle = \"3s\"", `line 2: key "layers.settle" was removed`},
		{"[pool]\nwindows = \"maybe\"", `key "pool.windows": "maybe" is not one of`},
		{"[pool]\ndax = \"maybe\"", `key "pool.dax": "maybe" is not one of`},
		{"[layers]\nmax_size = 0", `key "layers.max_size"`},
		{"[layers]\nmax_entries = 0", `key "layers.max_entries"`},
		{"[shared]\npools = [\"pmem0\"]", `key "shared.pools": "pmem0" is neither`},
		{"[shared]\npools = [\"/a\", \"/a\"]", `key "shared.pools": "/a" stands there twice`},
		{"[shared]\nleases = { \"/a\" = \"/b\" }", `key "shared.leases": "/a" is not in shared.pools`},
		{"[shared]\npools = [\"/a\"]\nleases = { \"/a\" = \"b\" }", `key "shared.leases": "b" is neither`},
		{
			"[shared]\npools = [\"/a\", \"/b\"]\nleases = { \"/a\" = \"/c\", \"/b\" = \"/c\" }",
			`key "shared.leases": "/c" is that of two pools`,
		},
		{"[shared]\nattach = [\"k8s.io\"]", `key "shared.attach": needs shared.pools`},
		{"[metrics]\npprof = true", `key "metrics.pprof"`},
		{"[metrics\n", `line 1`},
		{"[pool]\nreaders = \"leases\"", `keys "pool.readers" and "pool.leases"`},
		{"[pool]\nleases = [\"/a\"]", `keys "pool.readers" and "pool.leases"`},
		{"[pool]\nreaders = \"leases\"\nleases = [\"a\"]", `key "pool.leases": "a" is neither`},
		{"[pool]\nreaders = \"leases\"\nleases = [\"flock:4096+4096\"]", `key "pool.leases": "flock:4096+4096" is`},
		{"[registries]\nhosts_dirs = [\"/a\", \"b\"]", `key "registries.hosts_dirs": "b" is not an absolute path`},
		{"[partial]\nexclude = [\"example.com/app\"]", `key "partial.exclude": "example.com/app" is not a registry`},
		{"[partial]\nexclude = [\"\"]", `key "partial.exclude": "" is not a registry`},
		{"[partial]\nrequests = 0", `key "partial.requests": 0 is not in 1 to 8`},
		{"[partial]\nrequests = 9", `key "partial.requests": 9 is not in 1 to 8`},
		{"[partial]\nanswer_timeout = \"0s\"", `key "partial.answer_timeout": is not positive`},
		{"[partial]\nlayer_timeout = \"-1m\"", `key "partial.layer_timeout": is not positive`},
		{"[partial]\nlayer_timeout = \"soon\"", `duration "soon"`},
	} {
		_, err := config.Parse([]byte(tc.text))
		if err == nil {
			t.Errorf("%q was accepted, expected an error with %q", tc.text, tc.want)
		} else if !strings.Contains(err.Error(), tc.want) {
			t.Errorf("%q: error %q, expected one with %q", tc.text, err, tc.want)
		}
	}
}

func TestLoad(t *testing.T) {
	dir := t.TempDir()
	file := filepath.Join(dir, "config.toml")
	if _, err := config.Load(file); !errors.Is(err, os.ErrNotExist) {
		t.Fatalf("a named file that is missing: %v", err)
	}
	if err := os.WriteFile(file, []byte("x = 1\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := config.Load(file); err == nil || !strings.Contains(err.Error(), file) {
		t.Fatalf("error %v, expected one that names %q", err, file)
	}
	if err := os.WriteFile(file, config.Sample, 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := config.Load(file); err != nil {
		t.Fatal(err)
	}
}

// A configuration can be handed to another process as JSON.
func TestJSON(t *testing.T) {
	raw, err := json.Marshal(config.Default())
	if err != nil {
		t.Fatal(err)
	}
	var c config.Config
	if err := json.Unmarshal(raw, &c); err != nil {
		t.Fatal(err)
	}
	if want := config.Default(); !reflect.DeepEqual(&c, want) {
		t.Errorf("through JSON the default becomes\n%+v\nexpected\n%+v", &c, want)
	}
}

func FuzzParse(f *testing.F) {
	f.Add(config.Sample)
	f.Add([]byte("[pool]\nsize = \"3GiB\""))
	f.Fuzz(func(t *testing.T, text []byte) {
		c, err := config.Parse(text)
		if err == nil {
			if err := c.Validate(); err != nil {
				t.Fatalf("accepted, but %v", err)
			}
		}
	})
}

// The configuration lists kinds of region and drivers without importing them; the lists must be complete.
func TestKnowsKindsAndDrivers(t *testing.T) {
	for _, kind := range region.Kinds() {
		c := config.Default()
		c.Pool.Kind, c.Pool.Path = kind, "/dev/something"
		if kind == region.KindPhys {
			c.Pool.Path, c.Pool.Phys, c.Pool.Size = "", 1<<32, 1<<30
		}
		if err := c.Validate(); err != nil {
			t.Errorf("kind %q: %v", kind, err)
		}
	}
	for _, d := range drivers.All() {
		c := config.Default()
		c.Mount.Driver = d.Name()
		if err := c.Validate(); err != nil {
			t.Errorf("driver %q: %v", d.Name(), err)
		}
	}
}
