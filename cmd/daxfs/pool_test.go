package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/daxfs/daxfs-snapshotter/internal/ocitest"
	"github.com/daxfs/daxfs-snapshotter/internal/treetest"
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
	mustPool(t, "put", "--name", "one", p, rootfs(t, map[string]string{"base": base, "a": "a"}))
	mustPool(t, "put", "--name", "two", p, rootfs(t, map[string]string{"base": base, "b": "b"}))

	state := showPool(t, p)
	pages := int64(len(base)+4095) / 4096 * 4096
	if len(state.Images) != 2 || state.Saved != pages || state.SlotsUsed != 2 || state.Slots < 100 ||
		state.Windows || state.DAX ||
		state.Index == nil || state.Index.Extents != pages+2*4096 || state.Index.Layers != 2 ||
		state.Index.Waiting != 0 {
		t.Errorf("show: %+v, index %+v; expected %d bytes saved", state, state.Index, pages)
	}
	for _, m := range state.Images {
		if m.Usage == nil || m.Usage.Shared != pages || m.Usage.Files != 2 || len(m.Holders) != 1 {
			t.Errorf("image %q: %+v, held by %q", m.Key, m.Usage, m.Holders)
		}
	}
	for _, want := range []string{"NAMES", "one", "two"} {
		if out := mustPool(t, "ls", p); !strings.Contains(out, want) {
			t.Errorf("ls lacks %q:\n%s", want, out)
		}
	}
	for _, name := range []string{"one", state.Images[0].Key, strings.TrimPrefix(state.Images[0].Key, "image/")[:12]} {
		if out := mustPool(t, "show", p, name); !strings.Contains(out, "Shared") || !strings.Contains(out, "pin/one") {
			t.Errorf("show %s:\n%s", name, out)
		}
	}
	if out := mustPool(t, "check", p); out != "the pool is consistent\n" {
		t.Errorf("check: %q", out)
	}
	if out := mustPool(t, "rm", p, "one"); !strings.Contains(out, "removed 1 images and 1 layers") {
		t.Errorf("rm: %q", out)
	}
	if out := mustPool(t, "gc", "--json", p); !strings.Contains(out, `"freed": 0`) {
		t.Errorf("gc of a pool where all is held: %s", out)
	}
	mustPool(t, "rm", p, "two")
	if state := showPool(t, p); len(state.Images) != 0 || state.Index.Extents+state.Index.Waiting != 0 ||
		state.Index.Layers != 0 {
		t.Errorf("after removing all: %+v, index %+v", state, state.Index)
	}
}

func showPool(t *testing.T, p string) (state poolState) {
	t.Helper()
	if err := json.Unmarshal([]byte(mustPool(t, "show", "--json", p)), &state); err != nil {
		t.Fatal(err)
	}
	return state
}

// TestPoolPutSources puts output of convert, and OCI images, which have names of their own.
func TestPoolPutSources(t *testing.T) {
	dir := t.TempDir()
	p, image := filepath.Join(dir, "pool"), filepath.Join(dir, "image")
	mustPool(t, "init", "--size", "64m", p)
	tree := rootfs(t, map[string]string{"f": "text", "g": "more"})
	var out, errs bytes.Buffer
	if status := run(t.Context(), []string{"daxfs", "convert", "--json", "-o", image, tree}, nil, &out,
		&errs); status != statusOK {
		t.Fatalf("convert: %s", &errs)
	}
	var made summary
	if err := json.Unmarshal(out.Bytes(), &made); err != nil {
		t.Fatal(err)
	}
	var put poolImage
	if err := json.Unmarshal([]byte(mustPool(t, "put", "--json", "--name", "file", p, "daxfs:"+image)),
		&put); err != nil {
		t.Fatal(err)
	}
	if put.UUID != made.UUID {
		t.Errorf("the tree has UUID %s in a pool and %s in a file", put.UUID, made.UUID)
	}
	layout := ocitest.NewLayout(t, filepath.Join(dir, "layout"))
	layout.Tag("v1", layout.Manifest(ocitest.LinuxAMD64, ocitest.Layer{Tar: treetest.Tar(treetest.Reg("f", "text"))}))
	text := mustPool(t, "put", p, "oci:"+layout.Dir+":v1")
	state := showPool(t, p)
	key := state.Images[1].Key
	if !strings.HasPrefix(text, key+": ") || !slices.Equal(state.Images[1].Holders, []string{"pin/" + key}) {
		t.Errorf("put of an OCI image: %q, %+v", text, state.Images[1])
	}
	if again := mustPool(t, "put", p, "oci:"+layout.Dir+":v1"); !strings.Contains(again, "0B of them new") ||
		len(showPool(t, p).Images) != 2 {
		t.Errorf("put again: %q", again)
	}
	// An image with two names stays until both are gone.
	mustPool(t, "put", "--name", "two", p, "oci:"+layout.Dir+":v1")
	if out := mustPool(t, "rm", p, "two"); !strings.Contains(out, "removed 0 images") ||
		strings.Contains(mustPool(t, "ls", p), "two") {
		t.Errorf("rm of one of two names: %q", out)
	}
	if out := mustPool(t, "rm", p, key, "file"); !strings.Contains(out, "removed 2 images") {
		t.Errorf("rm: %q", out)
	}
}

func TestPoolCheckFindsDamage(t *testing.T) {
	p := filepath.Join(t.TempDir(), "pool")
	mustPool(t, "init", "--size", "64m", p)
	text := strings.Repeat("0123456789abcdef", 1000)
	mustPool(t, "put", "--name", "one", p, rootfs(t, map[string]string{"f": text}))
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
	if status != statusFindings || !strings.Contains(stdout, "pool.sum") || stderr != "" {
		t.Errorf("check of damaged contents: status %d, %s%s", status, stdout, stderr)
	}
	var got poolChecked
	status, stdout, stderr = runPool(t, "check", "--contents", "--json", p)
	if err := json.Unmarshal([]byte(stdout), &got); err != nil {
		t.Fatal(err)
	}
	if status != statusFindings || got.OK || len(got.Findings) != 1 || got.Findings[0].Rule != "pool.sum" ||
		got.Findings[0].Known ||
		!strings.Contains(got.Lost, "pull the image again") || !strings.Contains(stderr, "cannot be made again") {
		t.Errorf("check --contents: status %d, %s%s", status, stdout, stderr)
	}
	// Nobody gets the image until it is put again.
	if state := showPool(t, p); len(state.Images) != 0 {
		t.Errorf("the catalogue lists %+v", state.Images)
	}
	mustPool(t, "put", "--name", "one", p, rootfs(t, map[string]string{"f": text}))
	if state := showPool(t, p); len(state.Images) != 1 {
		t.Errorf("put again: the catalogue lists %+v", state.Images)
	}
	mustPool(t, "gc", p)
	for _, args := range [][]string{{"check", p}, {"check", "--contents", p}} {
		if out := mustPool(t, args...); out != "the pool is consistent\n" {
			t.Errorf("%q: %q", args, out)
		}
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
		{
			statusFailed, "exists",
			[]string{"init", "--index", p + ".index", "--size", "64m", filepath.Join(dir, "fresh")},
		},
		{statusFailed, "holds data", []string{"init", foreign}},
		{statusFailed, "a pool", []string{"init", "--index", filepath.Join(dir, "other"), p}},
		{statusFailed, "smallest pool", []string{"init", "--size", "1m", filepath.Join(dir, "small")}},
		{statusUsage, "--size", []string{"init", "--size", "much", filepath.Join(dir, "much")}},
		{statusUsage, "--size is needed", []string{"init", filepath.Join(dir, "sizeless")}},
		{statusFailed, "belongs to something else", []string{"check", foreign}},
		{statusFailed, "no such file", []string{"ls", filepath.Join(dir, "none")}},
		{statusUsage, "--name is needed", []string{"put", p, tree}},
		{statusUsage, "unknown kind", []string{"put", p, "floppy:a"}},
		{statusFailed, "not found", []string{"rm", p, "nothing"}},
		{statusFailed, "not found", []string{"show", p, "nothing"}},
		{statusUsage, "expected POOL IMAGE", []string{"rm", p}},
		{statusUsage, "expected yes, no or auto", []string{"init", "--windows", "some", filepath.Join(dir, "fresh")}},
		{statusUsage, "needs --index", []string{"check", "0x100000000+64"}},
		{statusUsage, "only the daemon", []string{"init", "--kind", "dmabuf", "--index", "x", "/dev/dma_heap/system"}},
	} {
		status, stdout, stderr := runPool(t, test.args...)
		if status != test.status || !strings.Contains(stderr, test.want) || stdout != "" {
			t.Errorf("%q: status %d, %s%s; expected %d and %q", test.args, status, stdout, stderr,
				test.status, test.want)
		}
	}
	for _, left := range []string{"small", "much", "sizeless", "other", "fresh"} {
		if fileExists(filepath.Join(dir, left)) {
			t.Errorf("a command that failed has left %q", left)
		}
	}
	mustPool(t, "init", "--force", foreign)
}

// TestPoolOwned reads a pool with an owner: ls and show take no lock and write nothing.
func TestPoolOwned(t *testing.T) {
	path := filepath.Join(t.TempDir(), "pool")
	mustPool(t, "init", "--size", "64m", path)
	mustPool(t, "put", "--name", "one", path, rootfs(t, map[string]string{"f": "x", "g": "both"}))
	mustPool(t, "put", "--name", "two", path, rootfs(t, map[string]string{"h": "both"}))
	before := stamps(t, path, path+".index")
	free := showPool(t, path)
	mustPool(t, "ls", path)
	if after := stamps(t, path, path+".index"); after != before {
		t.Errorf("pool and index were %s, and after reading are %s", before, after)
	}
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
	before = stamps(t, path, path+".index")
	status, stdout, stderr := runPool(t, "ls", path)
	if status != statusOK || !strings.Contains(stdout, "00000") || !strings.Contains(stderr, "in use by process") {
		t.Errorf("ls: status %d, %s%s", status, stdout, stderr)
	}
	var state poolState
	if _, stdout, _ := runPool(t, "show", "--json", path); json.Unmarshal([]byte(stdout), &state) != nil ||
		len(state.Images) != 2 {
		t.Fatalf("show: %s", stdout)
	}
	if after := stamps(t, path, path+".index"); after != before {
		t.Errorf("pool and index were %s, and after reading are %s", before, after)
	}
	// Readers and the owner see the same sharing.
	u := p.Usage()
	if state.Index != nil || state.Saved != 4096 || state.Unshared != u.Unshared || state.Contents != u.ImageExtents {
		t.Errorf("show: %+v, the owner knows %+v", state, u)
	}
	if h := free.Index; h == nil || h.Extents != u.Extents || h.Files != u.ExtentCount || h.Layers != u.Layers ||
		h.Metadata != u.Tree ||
		h.Free != u.Free+u.MetaFree {
		t.Errorf("show of a pool without an owner: %+v, the owner knows %+v", h, u)
	}
	status, _, stderr = runPool(t, "rm", path, "one")
	if status != statusFailed || !strings.Contains(stderr, "in use by process") {
		t.Errorf("rm: status %d, %s", status, stderr)
	}
}

// stamps returns the modification times of files.
func stamps(t *testing.T, paths ...string) string {
	t.Helper()
	var all []string
	for _, path := range paths {
		fi, err := os.Stat(path)
		if err != nil {
			t.Fatal(err)
		}
		all = append(all, fi.ModTime().Format(time.StampNano))
	}
	return strings.Join(all, " ")
}

// TestPoolKeepsWhatItHas: a command that cannot do everything it was told does nothing, and reports an error.
func TestPoolKeepsWhatItHas(t *testing.T) {
	dir := t.TempDir()
	p := filepath.Join(dir, "pool")
	mustPool(t, "init", "--size", "64m", p)
	mustPool(t, "put", "--name", "one", p, rootfs(t, map[string]string{"name": "one"}))
	mustPool(t, "put", "--name", "two", p, rootfs(t, map[string]string{"name": "two"}))
	for _, c := range []struct {
		args   []string
		status int
		want   string
	}{
		{[]string{"rm", p, "one", "three"}, statusFailed, `image "three": not found`},
		{[]string{"init", "--size", "64m", p}, statusFailed, "holds a pool"},
		{[]string{"init", filepath.Join(dir, "new")}, statusUsage, "--size is needed"},
		{[]string{
			"init", "--kind", "hugetlbfs", "--size", "64m", "--index", filepath.Join(dir, "i"),
			filepath.Join(dir, "new"),
		}, statusFailed, "is not on hugetlbfs"},
		{
			[]string{"init", "--kind", "nonsense", "--size", "64m", filepath.Join(dir, "new")},
			statusUsage,
			`--kind "nonsense", expected one of file, tmpfs`,
		},
	} {
		if status, _, stderr := runPool(t, c.args...); status != c.status || !strings.Contains(stderr, c.want) {
			t.Errorf("pool %q: status %d, %q, expected %d and %q", c.args, status, stderr, c.status, c.want)
		}
	}
	// A name moves to the image put under it.
	mustPool(t, "put", "--name", "one", p, rootfs(t, map[string]string{"name": "another"}))
	if out := mustPool(t, "gc", p); !strings.Contains(out, "removed 1 images and 1 layers") {
		t.Errorf("gc: %q", out)
	}
	out := mustPool(t, "ls", p)
	if !strings.Contains(out, " one\n") || !strings.Contains(out, " two\n") || strings.Count(out, "\n") != 3 {
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

// TestPoolMove: a moved pool is unchanged, also on another file system; a failed move leaves it in place.
func TestPoolMove(t *testing.T) {
	dir, shm := t.TempDir(), "/dev/shm"
	p := filepath.Join(dir, "pool")
	mustPool(t, "init", "--size", "64m", p)
	mustPool(t, "put", "--name", "one", p, rootfs(t, map[string]string{"f": strings.Repeat("contents ", 5000)}))
	before := showPool(t, p)
	there := filepath.Join(dir, "there")
	for _, c := range []struct{ args, want string }{
		{p + " " + p, "exists"},
		{p + " " + filepath.Join(dir, "no/where"), "no such file"},
		{p + " " + filepath.Join(shm, "pool-that-moved"), `kind "tmpfs"`},
		{filepath.Join(dir, "none") + " " + there, "no such file"},
	} {
		if status, _, errs := runPool(t, append([]string{"move"},
			strings.Fields(c.args)...)...); status != statusFailed || !strings.Contains(errs, c.want) {
			t.Errorf("move %s: status %d, %s; expected %q", c.args, status, errs, c.want)
		}
	}
	r, err := region.Open(region.Config{Kind: region.KindFile, Path: p})
	if err != nil {
		t.Fatal(err)
	}
	owner, err := pool.Open(r, p+".index", pool.Options{})
	if err != nil {
		t.Fatal(err)
	}
	if status, _, errs := runPool(t, "move", p, there); status != statusFailed || !strings.Contains(errs, "in use") {
		t.Errorf("move of a pool with an owner: status %d, %s", status, errs)
	}
	if err := errors.Join(owner.Close(), r.Close()); err != nil {
		t.Fatal(err)
	}
	mustPool(t, "move", p, there)
	// Move to another file system, as if rename had returned EXDEV.
	m := move{from: there, to: filepath.Join(dir, "copy"), index: there + ".index"}
	if err := m.copy(t.Context()); err != nil {
		t.Fatal(err)
	}
	for _, old := range []string{p, p + ".index", there, there + ".index"} {
		if fileExists(old) {
			t.Errorf("%q is still there", old)
		}
	}
	var is unix.Stat_t
	if err := unix.Stat(m.to, &is); err != nil || is.Blocks*512 > is.Size/2 {
		t.Errorf("the copy takes %d bytes of %d, %v", is.Blocks*512, is.Size, err)
	}
	mustPool(t, "check", m.to)
	after := showPool(t, m.to)
	if after.ID != before.ID || len(after.Images) != 1 || after.Images[0].Key != before.Images[0].Key ||
		after.Index == nil {
		t.Errorf("after: %+v; before: %+v", after, before)
	}
	// An interrupted copy leaves all files in place.
	ctx, stop := context.WithCancel(t.Context())
	stop()
	if err := (move{from: m.to, to: p, index: m.to + ".index"}).copy(ctx); err == nil || fileExists(p) ||
		fileExists(p+".index") || !fileExists(m.to) {
		t.Errorf("a copy that was interrupted: %v", err)
	}
}
