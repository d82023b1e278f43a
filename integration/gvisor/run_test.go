package gvisor

import (
	"fmt"
	"maps"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/daxfs/daxfs-snapshotter/integration/pagemap"
	"github.com/daxfs/daxfs-snapshotter/integration/stack"
	"github.com/daxfs/daxfs-snapshotter/integration/testimage"
)

// runsc are ctr's flags for a gVisor container.
var runsc = []string{
	"--runtime", "io.containerd.runsc.v1",
	"--annotation", "io.kubernetes.cri.container-type=sandbox", // otherwise the shim waits for one
}

// rootfs returns ctr's flags for a gVisor container whose root is an image file.
func rootfs(file string) []string {
	return append([]string{
		"--annotation", "dev.gvisor.spec.rootfs.source=" + file,
		"--annotation", "dev.gvisor.spec.rootfs.type=erofs",
		"--annotation", "dev.gvisor.spec.rootfs.overlay=memory",
	}, runsc...)
}

// bed is a stack with an image whose program maps an interpreter and waits.
type bed struct {
	*stack.T
	t    *testing.T
	ref  string
	file string // the image as a file, without extended attributes
}

func newBed(t *testing.T) *bed {
	t.Helper()
	s := stack.New(t, stack.Options{Mode: stack.Streaming})
	img, _, err := testimage.Twins()
	if err != nil {
		t.Fatal(err)
	}
	b := &bed{T: s, t: t, ref: s.Push("web", img), file: filepath.Join(s.Dir, "web.daxfs")}
	s.Pull(b.ref, "daxfs")
	if _, err := s.Try("daxfs", "convert", "-q", "--no-xattrs", "--plain-http", "-o", b.file,
		"docker://"+b.ref); err != nil {
		t.Fatal(err)
	}
	return b
}

// start runs the image's program, and waits until it has loaded everything.
func (b *bed) start(id, program string, flags ...string) {
	b.t.Helper()
	args := append([]string{"run", "--detach", "--snapshotter", "daxfs"}, flags...)
	b.Ctr(append(args, b.ref, id, program, "/app/main.py")...)
	var err error
	for range 600 {
		var out string
		if out, err = b.Exec(id, "cat", "/"+testimage.TwinReady); err == nil && out == "web" {
			return
		}
		time.Sleep(100 * time.Millisecond)
	}
	b.t.Fatalf("container %q is not ready: %v", id, err)
}

// text maps the offsets in a file's program text to page frames, in the processes started since
// before. name is a prefix of the file's name.
func (b *bed) text(name string, before map[int]bool) map[uint64]uint64 {
	b.t.Helper()
	frames := map[uint64]uint64{}
	for pid := range processes(b.t) {
		if before[pid] {
			continue
		}
		p, err := pagemap.Read(pid)
		if err != nil {
			continue // it has ended
		}
		for file, text := range p.Text {
			if !strings.HasPrefix(path.Base(file), name) {
				continue
			}
			for offset, frame := range text {
				frames[offset] = frame
			}
		}
	}
	return frames
}

func processes(t *testing.T) map[int]bool {
	t.Helper()
	entries, err := os.ReadDir("/proc")
	if err != nil {
		t.Fatal(err)
	}
	list := map[int]bool{}
	for _, e := range entries {
		if pid, err := strconv.Atoi(e.Name()); err == nil {
			list[pid] = true
		}
	}
	return list
}

// gVisor and runc containers on one snapshot share the physical pages of the program text, and so do
// gVisor containers on one image file. The snapshot and the file have separate pages.
func TestRun(t *testing.T) {
	b := newBed(t)
	frames := map[string]map[uint64]uint64{}
	for _, c := range []struct {
		id    string
		flags []string
		maps  string // the file from which the text is mapped; for an image file, always that file
	}{
		{"runc-1", nil, "python3"},
		{"runc-2", nil, "python3"},
		{"runsc-1", runsc, "python3"},
		{"runsc-2", runsc, "python3"},
		{"file-1", rootfs(b.file), filepath.Base(b.file)},
		{"file-2", rootfs(b.file), filepath.Base(b.file)},
	} {
		before := processes(t)
		b.start(c.id, "/usr/bin/python3", c.flags...)
		frames[c.id] = b.text(c.maps, before)
		if n := len(frames[c.id]); n < 100 {
			t.Errorf("%s has only %d pages of text in memory", c.id, n)
		}
	}
	if out, err := b.Exec("runsc-1", "dmesg"); err != nil || !strings.Contains(out, "gVisor") {
		t.Errorf("the container does not run on gVisor's kernel: %q, %v", out, err)
	}
	for _, c := range [][2]string{
		{"runc-1", "runc-2"},
		{"runsc-1", "runsc-2"},
		{"runc-1", "runsc-1"},
		{"file-1", "file-2"},
	} {
		common, same := compare(frames[c[0]], frames[c[1]])
		t.Logf("%s and %s: %d pages of text in both, %d of them are one physical page", c[0], c[1], common, same)
		if common < 100 || same != common {
			t.Errorf("%s and %s: %d of %d pages are the same, expected all of many", c[0], c[1], same, common)
		}
	}
	for _, frame := range frames["runsc-1"] {
		if slices.Contains(slices.Collect(maps.Values(frames["file-1"])), frame) {
			t.Errorf("page frame %#x is both of a snapshot and of an image file", frame)
		}
	}
	b.writes()
}

// compare counts the pages that both have in memory, and those that are one physical page.
func compare(a, b map[uint64]uint64) (common, same int) {
	for offset, frame := range a {
		if other, ok := b[offset]; ok {
			common++
			if other == frame && frame != 0 {
				same++
			}
		}
	}
	return common, same
}

// writes proves that a container's writes are private.
func (b *bed) writes() {
	b.t.Helper()
	for _, id := range []string{"runsc-1", "file-1"} {
		if _, err := b.Exec(id, "sh", "-c", "echo changed > /app/main.py && rm /app/data.bin"); err != nil {
			b.t.Errorf("writing in %q: %v", id, err)
		}
	}
	for _, id := range []string{"runc-1", "runsc-2", "file-2"} {
		out, err := b.Exec(id, "sh", "-c", "head -c 6 /app/main.py && test -e /app/data.bin")
		if err != nil || out != "import" {
			b.t.Errorf("after another container wrote, %q sees %q, %v", id, out, err)
		}
	}
}

// A flag mounts a data image into containers of either runtime.
func TestData(t *testing.T) {
	b := newBed(t)
	models := filepath.Join(b.Dir, "models")
	if err := os.MkdirAll(filepath.Join(models, "llama"), 0o755); err != nil {
		t.Fatal(err)
	}
	weights := testimage.Noise(3, 5<<20)
	if err := os.WriteFile(filepath.Join(models, "llama/weights"), weights, 0o644); err != nil {
		t.Fatal(err)
	}
	file := filepath.Join(b.Dir, "models.daxfs")
	if _, err := b.Try("daxfs", "convert", "-q", "--no-xattrs", "-o", file, "rootfs:"+models); err != nil {
		t.Fatal(err)
	}
	for name, flags := range map[string][]string{"runc": nil, "runsc": runsc} {
		id := "data-" + name
		args := append([]string{"run", "--detach", "--snapshotter", "daxfs"}, flags...)
		args = append(args, "--mount", fmt.Sprintf("type=erofs,src=%s,dst=/models,options=ro", file))
		args = append(args, b.ref, id, "sleep", "1000000")
		b.Ctr(args...)
		out, err := b.Exec(id, "sh", "-c", "wc -c < /models/llama/weights; touch /models/x 2>/dev/null || echo refused")
		if err != nil || strings.Join(strings.Fields(out), " ") != fmt.Sprintf("%d refused", len(weights)) {
			t.Errorf("%s: the container printed %q, %v", name, out, err)
		}
	}
}

// Programs in a mounted image file are in memory once for all gVisor containers, but once for each
// runc container: every kernel mount has its own page cache.
func TestDataMemory(t *testing.T) {
	b := newBed(t)
	for name, c := range map[string]struct {
		flags  []string
		maps   string
		shared bool
	}{
		"runc": {nil, "python3", false}, "runsc": {runsc, filepath.Base(b.file), true},
	} {
		var frames [2]map[uint64]uint64
		for i := range frames {
			before := processes(t)
			mount := fmt.Sprintf("type=erofs,src=%s,dst=/models,options=ro", b.file)
			b.start(fmt.Sprint(name, "-", i), "/models/usr/bin/python3",
				append([]string{"--mount", mount}, c.flags...)...)
			frames[i] = b.text(c.maps, before)
		}
		common, same := compare(frames[0], frames[1])
		t.Logf("%s: %d pages of text in both, %d of them are one physical page", name, common, same)
		if common < 100 || c.shared && same != common || !c.shared && same != 0 {
			t.Errorf("%s: %d of %d pages are the same, expected all: %v", name, same, common, c.shared)
		}
	}
}
