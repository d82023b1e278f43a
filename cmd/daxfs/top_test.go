package main

import (
	"bytes"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/daxfs/daxfs-snapshotter/daemon/api"
	"github.com/daxfs/daxfs-snapshotter/pool"
	"github.com/daxfs/daxfs-snapshotter/store"
)

// TestTopCountsPages: a file in two images counts for both, as shared, and its page frames count once.
func TestTopCountsPages(t *testing.T) {
	one, two := t.TempDir(), t.TempDir()
	must(t, os.Mkdir(filepath.Join(one, "sub"), 0o755))
	must(t, os.WriteFile(filepath.Join(one, "sub/both"), make([]byte, 8192), 0o644))
	must(t, os.Link(filepath.Join(one, "sub/both"), filepath.Join(two, "other")))
	must(t, os.Link(filepath.Join(one, "sub/both"), filepath.Join(one, "again")))
	must(t, os.WriteFile(filepath.Join(one, "alone"), make([]byte, 5000), 0o644))
	must(t, os.WriteFile(filepath.Join(one, "empty"), nil, 0o644))
	must(t, os.Symlink("/etc", filepath.Join(one, "link")))
	image := func(key, dir string) api.Image {
		return api.Image{
			Info: store.Info{Image: pool.Image{Key: key}, Names: []string{"name of " + key}}, Dir: dir,
			Containers: []string{"c"},
		}
	}
	list, err := residentOf([]api.Image{
		image("two", two), image("one", one), image("away", ""),
		image("gone", filepath.Join(two, "no")),
	})
	must(t, err)
	if len(list) != 3 || list[0].Image != "one" || list[0].Resident != 4*4096 || list[0].Shared != 2*4096 ||
		list[1].Image != "two" || list[1].Resident != 2*4096 || list[1].Shared != 2*4096 || list[2].Resident != 0 {
		t.Errorf("%+v", list)
	}
	var out bytes.Buffer
	must(t, showTop(&out, list))
	if !strings.Contains(out.String(), "16KiB") || !strings.Contains(out.String(), "name of one") ||
		strings.Contains(out.String(), "\x1b") {
		t.Errorf("%s", &out)
	}
}

// TestTopFindsProcesses: a process that runs from an overlay maps the image, until the container has
// changed the file. A process that runs from the image itself maps it, too.
func TestTopFindsProcesses(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("mounts overlays, which needs root")
	}
	dir := t.TempDir()
	image, upper := filepath.Join(dir, "image"), filepath.Join(dir, "upper")
	work, merged := filepath.Join(dir, "work"), filepath.Join(dir, "merged")
	for _, d := range []string{image, upper, work, merged} {
		must(t, os.Mkdir(d, 0o755))
	}
	cat, err := exec.LookPath("cat")
	must(t, err)
	body, err := os.ReadFile(cat)
	must(t, err)
	must(t, os.WriteFile(filepath.Join(image, "program"), body, 0o755))
	must(t, os.WriteFile(filepath.Join(image, "changed"), body, 0o755))
	options := "lowerdir=" + image + ",upperdir=" + upper + ",workdir=" + work
	must(t, unix.Mount("overlay", merged, "overlay", 0, options))
	t.Cleanup(func() { must(t, unix.Unmount(merged, 0)) }) // after the processes have ended
	must(t, os.Chmod(filepath.Join(merged, "changed"), 0o700))

	// start runs a program that waits for its input to end.
	start := func(path string) int {
		t.Helper()
		cmd := exec.Command(path)
		in, err := cmd.StdinPipe()
		must(t, err)
		out, err := cmd.StdoutPipe()
		must(t, err)
		must(t, cmd.Start())
		t.Cleanup(func() {
			in.Close()
			must(t, cmd.Wait())
		})
		_, err = io.WriteString(in, "x")
		must(t, err)
		_, err = io.ReadFull(out, make([]byte, 1)) // it runs
		must(t, err)
		return cmd.Process.Pid
	}
	over, direct := start(filepath.Join(merged, "program")), start(filepath.Join(image, "program"))
	start(filepath.Join(merged, "changed"))
	list, err := residentOf([]api.Image{{Dir: image}})
	must(t, err)
	var pids []int
	for _, p := range list[0].Processes {
		if p.Name != "program" || p.Mapped <= 0 {
			t.Errorf("process %+v", p)
		}
		pids = append(pids, p.PID)
	}
	want := []int{over, direct}
	slices.Sort(want)
	slices.Sort(pids)
	if !slices.Equal(pids, want) {
		t.Errorf("processes %v map the image, expected %v", pids, want)
	}
	var out bytes.Buffer
	must(t, showTop(&out, list))
	if !strings.Contains(out.String(), "2: program ×2") {
		t.Errorf("%s", &out)
	}
}
