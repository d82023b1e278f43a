package main

import (
	"bytes"
	"encoding/json"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/daxfs/daxfs-snapshotter/daemon/api"
	"github.com/daxfs/daxfs-snapshotter/mount"
	"github.com/daxfs/daxfs-snapshotter/pool"
	"github.com/daxfs/daxfs-snapshotter/store"
	"github.com/daxfs/daxfs-snapshotter/store/shared"
)

// daxfsOut runs a command that must end with a status, and returns what it writes.
func daxfsOut(t *testing.T, want int, args ...string) (stdout, stderr string) {
	t.Helper()
	var out, errs bytes.Buffer
	if got := run(t.Context(), append([]string{"daxfs"}, args...), strings.NewReader(""), &out, &errs); got != want {
		t.Fatalf("%q: status %d, expected %d: %s", args, got, want, &errs)
	}
	return out.String(), errs.String()
}

// TestLookAtImages: images, du and diff show the images of a pool and what they share.
func TestLookAtImages(t *testing.T) {
	p := filepath.Join(t.TempDir(), "pool")
	mustPool(t, "init", "--size", "64m", p)
	base := strings.Repeat("shared ", 20000)
	pages := int64(len(base)+4095) / 4096 * 4096
	mustPool(t, "put", "--name", "one", p, rootfs(t, map[string]string{"base": base, "a": "a", "later": base}))
	mustPool(t, "put", "--name", "two", p, rootfs(t, map[string]string{"other": base, "b": "b"}))
	none := []string{"--control", filepath.Join(t.TempDir(), "none"), "--pool", p}
	with := func(args ...string) []string { return append(args, none...) }

	var list []api.Image
	out, _ := daxfsOut(t, statusOK, with("images", "--json")...)
	if err := json.Unmarshal([]byte(out), &list); err != nil || len(list) != 2 || list[0].Brought < pages+4096 ||
		list[1].Brought >= pages || list[1].Brought < 4096 || list[1].Usage.Shared != pages {
		t.Errorf("images: %s, %v", out, err)
	}
	if out, _ = daxfsOut(t, statusOK, with("images", "two")...); !strings.Contains(out, "pin/two") ||
		strings.Contains(out, "pin/one") {
		t.Errorf("images two: %s", out)
	}
	var space imageSpace
	out, _ = daxfsOut(t, statusOK, with("du", "--json", "one")...)
	if err := json.Unmarshal([]byte(out), &space); err != nil || space.Bytes != pages+4096 || space.Shared != pages ||
		space.Files != 2 ||
		len(space.Directories) != 1 {
		t.Errorf("du: %s, %v", out, err)
	}
	var diff imageDiff
	out, _ = daxfsOut(t, statusOK, with("diff", "--json", "one", "two")...)
	if err := json.Unmarshal([]byte(out), &diff); err != nil || diff.Shared != (diffSum{1, pages}) ||
		diff.Lone != (diffSum{1, 4096}) ||
		diff.Other != (diffSum{1, 4096}) || len(diff.Files) != 3 {
		t.Errorf("diff: %s, %v", out, err)
	}
	out, _ = daxfsOut(t, statusOK, with("diff", "one", "two")...)
	want := "- 4KiB /a\n+ 4KiB /b\n= 140KiB /base (/other)\n"
	if !strings.Contains(out, strings.Replace(want, "140KiB", human(pages), 1)) {
		t.Errorf("diff: %s; expected %s", out, want)
	}
	if out, _ = daxfsOut(t, statusOK, with("diff", "--only", "none", "one", "two")...); strings.Count(out, "\n") != 1 {
		t.Errorf("diff --only none: %s", out)
	}
	if out, errs := daxfsOut(t, statusOK, with("status")...); !strings.Contains(out, "2 of") || errs != "" {
		t.Errorf("status: %s%s", out, errs)
	}
	for _, args := range [][]string{{"du", "three"}, {"du", ""}, {"diff", "one", "three"}, {"images", "three"}} {
		if _, errs := daxfsOut(t, statusFailed, with(args...)...); !strings.Contains(errs, "not found") {
			t.Errorf("%q: %s", args, errs)
		}
	}
	daxfsOut(t, statusUsage, with("diff", "--only", "both", "one", "two")...)
	daxfsOut(t, statusUsage, with("du", "--depth", "-1", "one")...)
	if _, errs := daxfsOut(t, statusFailed, "explain", "x", "--control",
		none[1]); !strings.Contains(errs, "daemon at") {
		t.Errorf("explain without a daemon: %s", errs)
	}

	// A pin holds an image that another pin no longer holds.
	mustPool(t, "pin", p, "one", "uno")
	mustPool(t, "unpin", p, "one")
	mustPool(t, "gc", p)
	if out := mustPool(t, "ls", p); !strings.Contains(out, "uno") {
		t.Errorf("after pin and unpin: %s", out)
	}
	mustPool(t, "unpin", p, "uno")
	if out := mustPool(t, "gc", p); !strings.Contains(out, "removed 1 images") {
		t.Errorf("gc after unpin: %s", out)
	}
	if status, _, errs := runPool(t, "unpin", p, "uno"); status != statusFailed ||
		!strings.Contains(errs, "no image is pinned") {
		t.Errorf("unpin again: %d %s", status, errs)
	}
}

// TestContainerNames: a container is found by its name or an unambiguous beginning of it.
func TestContainerNames(t *testing.T) {
	list := []api.Container{
		{Namespace: "default", Name: "web"},
		{Namespace: "default", Name: "web-2", Why: "full"},
		{Namespace: "k8s.io", Name: "web"},
		{Namespace: "k8s.io", Name: "job"},
	}
	for name, want := range map[string]string{
		"job": "k8s.io/job", "j": "k8s.io/job", "k8s.io/web": "k8s.io/web", "web-": "default/web-2",
		"default/web": "default/web",
	} {
		if c, err := matchContainer(list, name); err != nil || c.Namespace+"/"+c.Name != want {
			t.Errorf("%q is %+v, %v; expected %s", name, c, err, want)
		}
	}
	for name, want := range map[string]string{
		"web": "2 have that name", "we": "3 have", "": "not found",
		"none": "not found",
	} {
		if c, err := matchContainer(list, name); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%q is %+v, %v; expected %q", name, c, err, want)
		}
	}
}

// TestStatusText: the status shows errors.
func TestStatusText(t *testing.T) {
	var out bytes.Buffer
	s := api.Status{
		Version: "v1", Health: "metadata: gone\nfor good", Free: 4096, Room: store.Room{Pool: 1 << 30, Disk: 4096},
		Started: time.Now(),
		Pool:    api.Pool{Kind: "tmpfs", Path: "/dev/shm/x", Usage: pool.Usage{Size: 2 << 30}}, Taken: 8192,
		Drivers: []mount.Explanation{
			{Driver: "erofs-dax", Why: "no block device"},
			{Driver: "erofs-loop", Picked: true, Sharing: "page cache"},
			{Driver: "fuse"},
		},
		Fallbacks: map[string]int64{"full": 3, "error": 0}, Containers: 5, Unshared: 3, Damaged: 2,
		Readers: api.Readers{Mode: store.ReadersLeases, Error: "lease region \"/x\": gone", List: []store.LeaseUser{
			{Region: "/run/free.lease"},
			{
				Reader: "guest\x1b[31m", Region: "/run/guest.lease", Torn: 2,
				Earlier: []string{"image/0123456789abcdef"},
				Images:  []string{"image/a", "image/b", "image/c", "image/d"},
			},
		}},
		Shared: []shared.Status{
			{
				Name: "/dev/pmem0", Generation: 7, Images: 3, Claimed: 2, Mounted: 1, Driver: "erofs-dax", Leased: true,
				Lease: "/dev/pmem1",
			},
			{Name: "/dev/pmem2", Error: "no pool\nheader"},
			{Name: "/srv/pool", Lost: "no container starts from 2 images"},
		},
	}
	if err := showStatus(&out, s); err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{
		"metadata: gone", "4KiB: the disk below the pool has no more; the pool itself has 1GiB", "8KiB of memory",
		"erofs-loop: page cache", "not erofs-dax: no block device", "error 0, full 3", "5, 3 of them share less",
		"2 contents have changed",
		"2 lease regions", "nobody (/run/free.lease)",
		`"guest\x1b[31m" (/run/guest.lease) uses 4 images (image/a, image/b, image/c, …)`,
		"used before its last boot 1 image (0123456789ab)", "2 entries that cannot be read",
		`is freed: lease region "/x": gone`,
		"/dev/pmem0: generation 7, 3 images, 2 claimed, 1 mounted with erofs-dax, lease in /dev/pmem1",
		"/dev/pmem2, 0 images claimed, cannot be used: no pool", "no lease: its owner has to keep all images",
		"/srv/pool: no container starts from 2 images",
	} {
		if !strings.Contains(out.String(), want) {
			t.Errorf("status lacks %q:\n%s", want, &out)
		}
	}
	if strings.Contains(out.String(), "\x1b") {
		t.Errorf("status writes what a terminal acts upon:\n%q", &out)
	}
	if strings.Contains(out.String(), "not fuse") {
		t.Errorf("status blames a driver that was not needed:\n%s", &out)
	}
	out.Reset()
	c := api.Container{Namespace: "default", Name: "c", Directories: 2, Why: "pool is full"}
	if err := showContainer(&out, c); err != nil || !strings.Contains(out.String(), "2 plain directories") ||
		!strings.Contains(out.String(), "pool is full") {
		t.Errorf("explain: %s, %v", &out, err)
	}
}

// TestHelpAndVersion: the commands help and version work like the flags.
func TestHelpAndVersion(t *testing.T) {
	for _, c := range [][2][]string{
		{{"help"}, {"--help"}},
		{{"help", "convert"}, {"convert", "--help"}},
		{{"help", "pool", "put"}, {"pool", "put", "--help"}},
		{{"version"}, {"--version"}},
	} {
		word, _ := daxfsOut(t, statusOK, c[0]...)
		flag, _ := daxfsOut(t, statusOK, c[1]...)
		if word == "" || word != flag {
			t.Errorf("%q writes\n%s, %q writes\n%s", c[0], word, c[1], flag)
		}
	}
	if _, errs := daxfsOut(t, statusUsage, "help", "nothing"); !strings.Contains(errs, `unknown command "nothing"`) {
		t.Errorf("help of nothing: %s", errs)
	}
}
