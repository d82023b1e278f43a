package main

import (
	"bytes"
	"encoding/json"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/daxfs/daxfs-snapshotter/pool"
	"github.com/daxfs/daxfs-snapshotter/pool/region"
)

// runPool runs "daxfs pool ARGS" in this process.
func runPool(t *testing.T, args ...string) (status int, stdout, stderr string) {
	t.Helper()
	var out, errs bytes.Buffer
	status = run(t.Context(), append([]string{"daxfs", "pool"}, args...), strings.NewReader(""), &out, &errs)
	return status, out.String(), errs.String()
}

// mustPool runs a command that must succeed and returns its standard output.
func mustPool(t *testing.T, args ...string) string {
	t.Helper()
	status, stdout, stderr := runPool(t, args...)
	if status != statusOK {
		t.Fatalf("pool %q: status %d: %s", args, status, stderr)
	}
	return stdout
}

// rootfs makes a directory with files of the given contents.
func rootfs(t *testing.T, files map[string]string) string {
	t.Helper()
	dir := t.TempDir()
	for name, text := range files {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	return "rootfs:" + dir
}

func TestPoolCommands(t *testing.T) {
	p := filepath.Join(t.TempDir(), "pool")
	mustPool(t, "init", "--size", "64m", p)
	base := strings.Repeat("shared ", 20000)
	mustPool(t, "put", "--key", "one", p, rootfs(t, map[string]string{"base": base, "a": "a"}))
	mustPool(t, "put", "--key", "two", p, rootfs(t, map[string]string{"base": base, "b": "b"}))

	var state poolState
	if err := json.Unmarshal([]byte(mustPool(t, "show", "--json", p)), &state); err != nil {
		t.Fatal(err)
	}
	pages := int64(len(base)+4095) / 4096 * 4096
	if len(state.Images) != 2 || state.Usage == nil || state.Saved != pages || state.Usage.Extents != pages+2*4096 || state.Usage.Layers != 0 {
		t.Errorf("show: %+v, usage %+v; expected %d bytes saved", state, state.Usage, pages)
	}
	for _, m := range state.Images {
		if m.Usage == nil || m.Usage.Shared != pages || m.Usage.Files != 2 {
			t.Errorf("image %q: %+v", m.Key, m.Usage)
		}
	}
	for _, want := range []string{"KEY", "one", "two"} {
		if out := mustPool(t, "ls", p); !strings.Contains(out, want) {
			t.Errorf("ls lacks %q:\n%s", want, out)
		}
	}
	if out := mustPool(t, "show", p, "one"); !strings.Contains(out, "Shared") || !strings.Contains(out, "one") {
		t.Errorf("show of an image:\n%s", out)
	}
	if out := mustPool(t, "check", p); out != "the pool is consistent\n" {
		t.Errorf("check: %q", out)
	}
	if out := mustPool(t, "rm", p, "one"); !strings.Contains(out, "removed 1 images") {
		t.Errorf("rm: %q", out)
	}
	if out := mustPool(t, "gc", "--json", p); !strings.Contains(out, `"freed": 0`) {
		t.Errorf("gc of a pool without layers: %s", out)
	}
	mustPool(t, "rm", p, "two")
	if err := json.Unmarshal([]byte(mustPool(t, "show", "--json", p)), &state); err != nil || state.Usage.Extents != 0 {
		t.Errorf("after removing all: %+v, %v", state.Usage, err)
	}
}

func TestPoolCheckFindsDamage(t *testing.T) {
	p := filepath.Join(t.TempDir(), "pool")
	mustPool(t, "init", "--size", "64m", p)
	text := strings.Repeat("0123456789abcdef", 1000)
	mustPool(t, "put", "--key", "one", p, rootfs(t, map[string]string{"f": text}))
	b, err := os.ReadFile(p)
	if err != nil {
		t.Fatal(err)
	}
	at := bytes.Index(b, []byte(text))
	if at < 0 {
		t.Fatal("the contents are not in the pool")
	}
	b[at+100] ^= 1
	if err := os.WriteFile(p, b, 0o600); err != nil {
		t.Fatal(err)
	}
	status, stdout, stderr := runPool(t, "check", "--json", p)
	if status != statusFailed || !strings.Contains(stdout, "pool.sum") || stderr != "" {
		t.Errorf("check of damaged contents: status %d, %s%s", status, stdout, stderr)
	}
}

func TestPoolErrors(t *testing.T) {
	dir := t.TempDir()
	p, foreign := filepath.Join(dir, "pool"), filepath.Join(dir, "foreign")
	mustPool(t, "init", "--size", "64m", p)
	if err := os.WriteFile(foreign, append([]byte("precious"), make([]byte, 16<<20)...), 0o600); err != nil {
		t.Fatal(err)
	}
	tree := rootfs(t, map[string]string{"f": "x"})
	for _, test := range []struct {
		status int
		want   string
		args   []string
	}{
		{statusFailed, "exists", []string{"init", "--index", p + ".index", "--size", "64m", filepath.Join(dir, "fresh")}},
		{statusFailed, "holds data", []string{"init", foreign}},
		{statusFailed, "a pool", []string{"init", "--index", filepath.Join(dir, "other"), p}},
		{statusFailed, "smallest pool", []string{"init", "--size", "1m", filepath.Join(dir, "small")}},
		{statusUsage, "--size", []string{"init", "--size", "much", filepath.Join(dir, "much")}},
		{statusUsage, "--size is needed", []string{"init", filepath.Join(dir, "sizeless")}},
		{statusFailed, "belongs to something else", []string{"check", foreign}},
		{statusFailed, "no such file", []string{"ls", filepath.Join(dir, "none")}},
		{statusUsage, "--key is needed", []string{"put", p, tree}},
		{statusUsage, "unknown kind", []string{"put", p, "floppy:a"}},
		{statusFailed, "not found", []string{"rm", p, "nothing"}},
		{statusFailed, "not found", []string{"show", p, "nothing"}},
		{statusUsage, "expected POOL KEY", []string{"rm", p}},
		{statusUsage, "needs --index", []string{"check", "0x100000000+64"}},
		{statusUsage, "only the daemon", []string{"init", "--kind", "dmabuf", "--index", "x", "/dev/dma_heap/system"}},
	} {
		status, stdout, stderr := runPool(t, test.args...)
		if status != test.status || !strings.Contains(stderr, test.want) || stdout != "" {
			t.Errorf("%q: status %d, %s%s; expected %d and %q", test.args, status, stdout, stderr, test.status, test.want)
		}
	}
	for _, left := range []string{"small", "much", "sizeless", "other", "fresh"} {
		if fileExists(filepath.Join(dir, left)) {
			t.Errorf("a command that failed has left %q", left)
		}
	}
	mustPool(t, "init", "--force", foreign)
}

// TestPoolOwned lists a pool that has an owner, and changes nothing in it.
func TestPoolOwned(t *testing.T) {
	path := filepath.Join(t.TempDir(), "pool")
	mustPool(t, "init", "--size", "64m", path)
	mustPool(t, "put", "--key", "one", path, rootfs(t, map[string]string{"f": "x", "g": "both"}))
	mustPool(t, "put", "--key", "two", path, rootfs(t, map[string]string{"h": "both"}))
	r, err := region.Open(region.Config{Kind: region.KindFile, Path: path})
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	p, err := pool.Open(r, path+".index", pool.Options{})
	if err != nil {
		t.Fatal(err)
	}
	defer p.Close()
	status, stdout, stderr := runPool(t, "ls", path)
	if status != statusOK || !strings.Contains(stdout, "one") || !strings.Contains(stderr, "in use by process") {
		t.Errorf("ls: status %d, %s%s", status, stdout, stderr)
	}
	var state poolState
	if _, stdout, _ := runPool(t, "show", "--json", path); json.Unmarshal([]byte(stdout), &state) != nil || len(state.Images) != 2 {
		t.Fatalf("show: %s", stdout)
	}
	// What the images share is the same for readers and for the owner.
	u := p.Usage()
	if state.Usage != nil || state.Saved != 4096 || state.Unshared != u.Unshared || state.Contents != u.ImageExtents {
		t.Errorf("show: %+v, the owner knows %+v", state, u)
	}
	for _, m := range state.Images {
		want, err := p.ImageUsage(m.Key)
		if err != nil || m.Usage == nil || *m.Usage != want {
			t.Errorf("image %q: %+v, the owner knows %+v, %v", m.Key, m.Usage, want, err)
		}
	}
	status, _, stderr = runPool(t, "rm", path, "one")
	if status != statusFailed || !strings.Contains(stderr, "in use by process") {
		t.Errorf("rm: status %d, %s", status, stderr)
	}
}

// TestPoolKeepsWhatItHas: a command that cannot do all of what it was asked for does none of it, and says so.
func TestPoolKeepsWhatItHas(t *testing.T) {
	dir := t.TempDir()
	p := filepath.Join(dir, "pool")
	mustPool(t, "init", "--size", "64m", p)
	one := rootfs(t, map[string]string{"name": "one"})
	mustPool(t, "put", "--key", "one", p, one)
	mustPool(t, "put", "--key", "two", p, rootfs(t, map[string]string{"name": "two"}))
	for _, c := range []struct {
		args   []string
		status int
		want   string
	}{
		{[]string{"put", "--key", "one", p, rootfs(t, map[string]string{"name": "other"})}, statusFailed, `image "one" is in the pool already, with other contents`},
		{[]string{"rm", p, "one", "three"}, statusFailed, `image "three": not found`},
		{[]string{"init", "--size", "64m", p}, statusFailed, "holds a pool"},
		{[]string{"init", filepath.Join(dir, "new")}, statusUsage, "--size is needed"},
		{[]string{"init", "--kind", "hugetlbfs", "--size", "64m", "--index", filepath.Join(dir, "i"), filepath.Join(dir, "new")}, statusFailed, "is not on hugetlbfs"},
		{[]string{"init", "--kind", "nonsense", "--size", "64m", filepath.Join(dir, "new")}, statusUsage, `--kind "nonsense", expected one of file, tmpfs`},
	} {
		if status, _, stderr := runPool(t, c.args...); status != c.status || !strings.Contains(stderr, c.want) {
			t.Errorf("pool %q: status %d, %q, expected %d and %q", c.args, status, stderr, c.status, c.want)
		}
	}
	mustPool(t, "put", "--key", "one", p, one) // the same again
	out := mustPool(t, "ls", p)
	if !strings.Contains(out, "\none ") || !strings.Contains(out, "\ntwo ") {
		t.Errorf("images that are left:\n%s", out)
	}
	if out := mustPool(t, "rm", p, "two", "two"); !strings.Contains(out, "removed 1 images") {
		t.Errorf("rm: %q", out)
	}
	names, err := filepath.Glob(filepath.Join(dir, "*"))
	if err != nil || len(names) != 2 {
		t.Errorf("files beside the pool and its index: %q, %v", names, err)
	}
}
