package daemon

import (
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/errdefs"
	"github.com/sirupsen/logrus"

	"github.com/daxfs/daxfs-snapshotter/config"
	"github.com/daxfs/daxfs-snapshotter/pool/lease"
)

// Settings that would make every container fail make the start fail, with a clear error.
func TestRefusedSettings(t *testing.T) {
	f := flavours[0]
	f.need(t)
	noProgram := filepath.Join(t.TempDir(), "helper")
	if err := os.WriteFile(noProgram, nil, 0o644); err != nil {
		t.Fatal(err)
	}
	for name, tc := range map[string]struct {
		change func(*config.Config)
		want   string // empty: it starts
	}{
		"as it is":        {func(*config.Config) {}, ""},
		"a good option":   {func(c *config.Config) { c.Mount.OverlayOptions = []string{"volatile"} }, ""},
		"missing helper":  {func(c *config.Config) { c.Mount.FUSEHelper = "/nowhere/daxfs" }, `"mount.fuse_helper"`},
		"no program":      {func(c *config.Config) { c.Mount.FUSEHelper = noProgram }, "is no program"},
		"misspelt option": {func(c *config.Config) { c.Mount.OverlayOptions = []string{"volatil"} }, `"volatil"`},
		"bad value":       {func(c *config.Config) { c.Mount.OverlayOptions = []string{"xino=maybe"} }, `"xino=maybe"`},
	} {
		t.Run(name, func(t *testing.T) {
			c := f.config(t.TempDir())
			tc.change(c)
			d, err := Open(t.Context(), c)
			switch {
			case tc.want == "" && err != nil:
				t.Error(err)
			case tc.want != "" && (err == nil || !strings.Contains(err.Error(), tc.want)):
				t.Errorf("error %v, expected %s", err, tc.want)
			}
			if err == nil {
				if err := d.Close(); err != nil {
					t.Error(err)
				}
			}
			if left, _ := filepath.Glob(filepath.Join(c.Root, "snapshots/*")); len(left) > 0 {
				t.Errorf("left over: %q", left)
			}
		})
	}
}

// The document has every metric, and no other.
func TestMetricsAreDocumented(t *testing.T) {
	dir := t.TempDir()
	cl, m := inside(t, flavours[0], func(c *config.Config) { // some metrics are about readers, or pools of others
		region := filepath.Join(dir, "a.lease")
		must(t, os.WriteFile(region, make([]byte, lease.MinSize), 0o600))
		c.Pool.Readers, c.Pool.Leases = "leases", []string{region}
		c.Shared.Pools = []string{filepath.Join(dir, "pool")}
	})
	ctx := namespaces.WithNamespace(t.Context(), "default")
	top, err := m.pull(ctx, true, []file{{"a", random(1, 5000)}}) // and some about images
	m.must(err)
	_, err = m.sn.Prepare(ctx, "default/100/c", top)
	m.must(err)
	families, err := cl.metrics.registry.Gather()
	if err != nil {
		t.Fatal(err)
	}
	text, err := os.ReadFile("../docs/config.md")
	if err != nil {
		t.Fatal(err)
	}
	_, section, found := strings.Cut(string(text), "### Metrics\n")
	section, _, ended := strings.Cut(section, "\n#")
	if !found || !ended {
		t.Fatal("docs/config.md has no section Metrics")
	}
	documented := map[string]bool{}
	for _, m := range regexp.MustCompile("`(daxfs_[a-z_]+)").FindAllStringSubmatch(section, -1) {
		documented[m[1]] = true
	}
	for _, f := range families {
		name := f.GetName()
		if !strings.HasPrefix(name, "daxfs_") {
			continue
		}
		if !documented[name] {
			t.Errorf("docs/config.md lacks %s", name)
		}
		delete(documented, name)
	}
	for name := range documented {
		t.Errorf("the daemon has no %s, which docs/config.md names", name)
	}
}

// Publicly readable metrics cause a warning.
func TestMetricsEverywhere(t *testing.T) {
	heard := hearLog(t)
	cl, _ := inside(t, flavours[0], func(*config.Config) {})
	for address, want := range map[string]int{"127.0.0.1:0": 0, ":0": 1, "0.0.0.0:0": 1} {
		heard.take("")
		stop, err := cl.metrics.serve(t.Context(), config.Metrics{Address: address})
		if err != nil {
			t.Fatal(err)
		}
		stop()
		var warned int
		for _, e := range heard.takeAll() {
			if e.Level == logrus.WarnLevel && strings.Contains(e.Message, "all interfaces") {
				warned++
			}
		}
		if warned != want {
			t.Errorf("%s: %d warnings, expected %d", address, warned, want)
		}
	}
}

// An error's kind appears once in its text.
func TestErrorTexts(t *testing.T) {
	_, m := inside(t, flavours[0], func(*config.Config) {})
	ctx := namespaces.WithNamespace(t.Context(), "default")
	top, err := m.pull(ctx, true, []file{{"a", random(1, 5000)}})
	m.must(err)
	_, err = m.sn.Prepare(ctx, "default/100/c", top)
	m.must(err)
	_, missing := m.sn.Prepare(ctx, "default/101/c", "default/99/nothing")
	_, twice := m.sn.Prepare(ctx, "default/100/c", top)
	for text, err := range map[string]error{
		"not found": missing, "already exists": twice, "failed precondition": m.sn.Remove(ctx, top),
	} {
		if err == nil || strings.Count(err.Error(), text) != 1 {
			t.Errorf("%v; expected %q in it, once", err, text)
		}
	}
	if !errdefs.IsNotFound(missing) || !errdefs.IsAlreadyExists(twice) {
		t.Errorf("kinds were lost: %v, %v", missing, twice)
	}
}
