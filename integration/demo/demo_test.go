package main

import (
	"bytes"
	"context"
	"errors"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/layout"
	"github.com/google/go-containerregistry/pkg/v1/validate"
	"github.com/moby/sys/mountinfo"
	"golang.org/x/sys/unix"

	"github.com/daxfs/daxfs-snapshotter/integration/pagemap"
	"github.com/daxfs/daxfs-snapshotter/integration/stack"
	"github.com/daxfs/daxfs-snapshotter/internal/slow"
)

func TestMain(m *testing.M) { os.Exit(stack.Main(m)) }

// The demo's claims are true, with both kinds of pool.
func TestDemo(t *testing.T) {
	for _, kind := range []string{"file", "tmpfs"} {
		t.Run(kind, func(t *testing.T) {
			var out bytes.Buffer
			o := options{pool: kind, containers: 2, out: &out}
			s := stack.New(t, stack.Options{Mode: stack.Streaming, Config: o.config()})
			d := &demo{Stack: s.Stack, options: o, ctx: t.Context()}
			f, err := d.run()
			t.Logf("%s", out.String())
			if err != nil {
				t.Fatal(err)
			}
			libc := -1
			for i, l := range f.libraries {
				if strings.HasPrefix(filepath.Base(l.file), "libc.so") {
					libc = i
				}
				if l.same != l.common {
					t.Errorf("%s: %d of %d pages are the same in all containers of an image", l.file, l.same, l.common)
				}
				if l.acrossSame != l.acrossCommon {
					t.Errorf("%s: %d of %d pages are the same in both images", l.file, l.acrossSame, l.acrossCommon)
				}
			}
			if libc < 0 || f.libraries[libc].common[0] < 50 {
				t.Errorf("the C library is not among the compared files, or has only a few pages: %+v", f.libraries)
			}
			if len(f.devices) != 2 || f.devices[0] != f.devices[1] {
				t.Errorf("the images are on the file systems %v, expected one for both", f.devices)
			}
			for file, at := range f.pool.files {
				if len(at) != 2 || at[0] != at[1] {
					t.Errorf("%s is in the pool at %#x, expected the same address twice", file, at)
				}
			}
			if f.pool.images != 2 || len(f.pool.files) == 0 {
				t.Errorf("pool: %+v", f.pool)
			}
			if saved := f.pool.apart - f.pool.together; saved < f.pool.apart/4 {
				t.Errorf("%d of %d bytes are saved, though most files of the images are equal", saved, f.pool.apart)
			}
			if f.daxfs.distinct == 0 || f.daxfs.distinct >= f.daxfs.mapped {
				t.Errorf("%d bytes of files are mapped, on %d bytes of memory", f.daxfs.mapped, f.daxfs.distinct)
			}
			// With a tmpfs the pool itself is memory.
			if kind == "file" && f.daxfs.cached >= f.overlay.cached && f.overlay.cached >= 0 {
				t.Errorf("daxfs has %d bytes of page cache, overlayfs %d", f.daxfs.cached, f.overlay.cached)
			}
			if kind == "file" && f.daxfs.disk >= f.overlay.disk {
				t.Errorf("daxfs takes %d bytes of disk, overlayfs %d", f.daxfs.disk, f.overlay.disk)
			}
			for _, want := range []string{
				"1. The pool is mounted once", "2. The same program text",
				"3. Files with the same contents", "4. Memory and disk",
			} {
				if !strings.Contains(out.String(), want) {
					t.Errorf("nothing was printed about %q", want)
				}
			}
		})
	}
}

// stopper cancels when a word is printed.
type stopper struct {
	io.Writer
	word string
	stop func()
}

func (s stopper) Write(b []byte) (int, error) {
	if bytes.Contains(b, []byte(s.word)) {
		s.stop()
	}
	return s.Writer.Write(b)
}

// An interrupt at any point ends everything that was started: closing the stack fails if anything stays.
func TestInterrupted(t *testing.T) {
	for _, word := range []string{"image pull", "The same containers on"} {
		t.Run(word, func(t *testing.T) {
			ctx, cancel := context.WithCancel(t.Context())
			defer cancel()
			o := options{pool: "file", containers: 1, out: stopper{io.Discard, word, cancel}}
			s := stack.New(t, stack.Options{Mode: stack.Streaming})
			d := &demo{Stack: s.Stack, options: o, ctx: ctx}
			if _, err := d.run(); !errors.Is(err, context.Canceled) {
				t.Errorf("the run ended with %v, expected that it was cancelled", err)
			}
		})
	}
}

// ^C, sent by a terminal to the program and all its processes, ends the demo with status 130 and
// leaves nothing in the kernel, and only the programs in the cache.
func TestControlC(t *testing.T) {
	shared, err := stack.CacheDir()
	if err != nil {
		t.Fatal(err)
	}
	if os.Getuid() != 0 || testing.Short() {
		t.Skip("needs root: it mounts filesystems and runs containers; and is not short")
	}
	cache, err := os.MkdirTemp(shared, "demo-test-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(cache) })
	if err := os.Symlink(filepath.Join(shared, "bin"), filepath.Join(cache, "bin")); err != nil {
		t.Fatal(err)
	}
	program := filepath.Join(t.TempDir(), "demo")
	if out, err := exec.Command("go", "build", "-o", program, ".").CombinedOutput(); err != nil {
		t.Fatalf("build the demo: %v\n%s", err, out)
	}
	before := kernelState(t)

	cmd := exec.Command(program, "-containers", "1")
	cmd.Env = append(slices.DeleteFunc(os.Environ(),
		func(e string) bool { return strings.HasPrefix(e, "DAXFS_TEST_") }), "DAXFS_TEST_CACHE="+cache)
	cmd.SysProcAttr = &unix.SysProcAttr{Setpgid: true}
	read, write := io.Pipe()
	var seen bytes.Buffer
	interrupted := false
	cmd.Stdout, cmd.Stderr = write, write
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		buffer := make([]byte, 4096)
		for {
			n, err := read.Read(buffer)
			seen.Write(buffer[:n])
			if !interrupted && bytes.Contains(seen.Bytes(), []byte("ctr run")) {
				interrupted = true
				unix.Kill(-cmd.Process.Pid, unix.SIGINT)
			}
			if err != nil {
				return
			}
		}
	}()
	waitErr := cmd.Wait()
	write.Close()
	<-done
	t.Logf("%s", seen.String())
	if !interrupted {
		t.Fatalf("the demo ended before it ran containers: %v", waitErr)
	}
	if code := cmd.ProcessState.ExitCode(); code != 130 {
		t.Errorf("exit status %d, expected 130", code)
	}
	// Loop devices disappear after their last user.
	var after []string
	for range 1200 {
		if after = kernelState(t); slices.Equal(after, before) {
			break
		}
		time.Sleep(50 * time.Millisecond)
	}
	if !slices.Equal(after, before) {
		t.Errorf("mounts and devices before: %q, after: %q", before, after)
	}
	left, err := os.ReadDir(filepath.Join(cache, "run"))
	if err != nil || len(left) != 0 {
		t.Errorf("left in the cache: %v %v", left, err)
	}
}

// kernelState lists mounts of this namespace, and loop devices of daxfs.
func kernelState(t *testing.T) (list []string) {
	t.Helper()
	mounts, err := mountinfo.GetMounts(nil)
	if err != nil {
		t.Fatal(err)
	}
	for _, m := range mounts {
		list = append(list, m.Mountpoint)
	}
	files, err := filepath.Glob("/sys/block/*/loop/backing_file")
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range files {
		if b, err := os.ReadFile(f); err == nil && strings.Contains(string(b), "demo-test-") {
			list = append(list, string(b))
		}
	}
	return list
}

func TestCompareLibraries(t *testing.T) {
	at := func(image int, frames ...uint64) *process {
		text := map[uint64]uint64{}
		for i, f := range frames {
			text[uint64(i)*pageSize] = f
		}
		return &process{Process: &pagemap.Process{Text: map[string]map[uint64]uint64{"/lib/x.so": text}}, image: image}
	}
	for name, c := range map[string]struct {
		ps   []*process
		want library
	}{
		"shared in each image": {
			[]*process{at(0, 10, 11), at(0, 10, 11), at(1, 20, 21), at(1, 20, 21)},
			library{common: [2]int{2, 2}, same: [2]int{2, 2}, acrossCommon: 2},
		},
		"shared by all": {
			[]*process{at(0, 10, 11), at(0, 10, 11), at(1, 10, 11), at(1, 10, 11)},
			library{common: [2]int{2, 2}, same: [2]int{2, 2}, acrossCommon: 2, acrossSame: 2},
		},
		"a copy in one container": {
			[]*process{at(0, 10, 11), at(0, 10, 99), at(1, 20), at(1, 20)},
			library{common: [2]int{2, 1}, same: [2]int{1, 1}, acrossCommon: 1},
		},
		"numbers hidden by the kernel": {
			[]*process{at(0, 0), at(0, 0), at(1, 0), at(1, 0)},
			library{common: [2]int{1, 1}, acrossCommon: 1},
		},
	} {
		got := libraries(c.ps)
		if len(got) != 1 {
			t.Fatalf("%s: %d libraries", name, len(got))
		}
		g := got[0]
		if g.common != c.want.common || g.same != c.want.same || g.acrossCommon != c.want.acrossCommon ||
			g.acrossSame != c.want.acrossSame {
			t.Errorf("%s: got %+v, want %+v", name, g, c.want)
		}
	}
}

func TestOptions(t *testing.T) {
	for _, o := range []options{{pool: "pmem", containers: 1}, {pool: "file"}, {pool: "file", containers: 101}} {
		if err := o.check(); err == nil || !strings.Contains(err.Error(), "expected") {
			t.Errorf("%+v: %v", o, err)
		}
	}
}

// The images that README.md puts into a pool can be made.
func TestImages(t *testing.T) {
	slow.Skip(t, "makes and compresses two images")
	dir := t.TempDir()
	if err := writeImages(dir); err != nil {
		t.Fatal(err)
	}
	digests := map[v1.Hash]bool{}
	for _, name := range []string{"web.tar", "jobs.tar"} {
		fsys := t.TempDir()
		if out, err := exec.Command("tar", "-xf", filepath.Join(dir, name), "-C", fsys).CombinedOutput(); err != nil {
			t.Fatalf("%v\n%s", err, out)
		}
		l, err := layout.FromPath(fsys)
		if err != nil {
			t.Fatal(err)
		}
		index, err := l.ImageIndex()
		if err != nil {
			t.Fatal(err)
		}
		if err := validate.Index(index, validate.Fast); err != nil {
			t.Errorf("%s: %v", name, err)
		}
		m, err := index.IndexManifest()
		if err != nil || len(m.Manifests) != 1 {
			t.Fatalf("%s: %+v, %v; expected one image", name, m, err)
		}
		digests[m.Manifests[0].Digest] = true
	}
	if len(digests) != 2 {
		t.Errorf("both archives hold the image %v", digests)
	}
}
