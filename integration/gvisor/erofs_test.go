package gvisor

import (
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"golang.org/x/sys/unix"

	"github.com/daxfs/daxfs-snapshotter/integration/listing"
	"github.com/daxfs/daxfs-snapshotter/integration/stack"
	"github.com/daxfs/daxfs-snapshotter/integration/testimage"
)

func TestMain(m *testing.M) { os.Exit(stack.Main(m, stack.BuildGVisor)) }

// device matches device numbers, which gVisor's reader does not return.
var device = regexp.MustCompile(` device=\d+,\d+`)

// gVisor's reader and the kernel show the same contents of an image file.
func TestErofs(t *testing.T) {
	s := stack.New(t, stack.Options{})
	for name, build := range map[string]func() (v1.Image, error){
		"tiny":    testimage.Tiny,
		"special": testimage.Special,
		"layers":  func() (v1.Image, error) { return testimage.Layers(40) },
		"small":   func() (v1.Image, error) { return testimage.Small(2000, 1) },
		"python":  func() (v1.Image, error) { return testimage.Python("one") },
	} {
		t.Run(name, func(t *testing.T) {
			img, err := build()
			if err != nil {
				t.Fatal(err)
			}
			ref := s.Push(name, img)
			file := filepath.Join(s.Dir, name+".daxfs")
			if _, err := s.Try("daxfs", "convert", "-q", "--no-xattrs", "--plain-http", "-o", file,
				"docker://"+ref); err != nil {
				t.Fatal(err)
			}
			kernel := mounted(t, file)
			for i := range kernel {
				kernel[i] = device.ReplaceAllString(kernel[i], "")
			}
			walked, err := s.Try("gvisor-walk", file)
			if err != nil {
				t.Fatal(err)
			}
			if err := listing.Diff(kernel, strings.Split(strings.TrimSpace(walked), "\n")); err != nil {
				t.Errorf("what gVisor reads is not what the kernel shows: %v", err)
			}
			if len(kernel) < 100 {
				t.Errorf("the image has only %d names", len(kernel))
			}
		})
	}
}

// The reason for --no-xattrs: gVisor reads an image only up to the first inode with an extended attribute.
func TestXattrs(t *testing.T) {
	s := stack.New(t, stack.Options{})
	img, err := testimage.Special()
	if err != nil {
		t.Fatal(err)
	}
	file := filepath.Join(s.Dir, "image")
	source := "docker://" + s.Push("special", img)
	if _, err := s.Try("daxfs", "convert", "-q", "--plain-http", "-o", file, source); err != nil {
		t.Fatal(err)
	}
	if out, err := s.Try("gvisor-walk", file); err == nil || !strings.Contains(err.Error(), "operation not supported") {
		t.Errorf("gVisor read %d names, and then: %v; expected that it refuses extended attributes",
			strings.Count(out, "\n"), err)
	}
}

// mounted lists an image mounted by the kernel.
func mounted(t *testing.T, file string) []string {
	t.Helper()
	dir := t.TempDir()
	if out, err := exec.Command("mount", "-t", "erofs", "-o", "ro,loop", file, dir).CombinedOutput(); err != nil {
		t.Fatalf("mount: %v\n%s", err, out)
	}
	defer func() {
		if err := unix.Unmount(dir, 0); err != nil {
			t.Error(err)
		}
	}()
	lines, err := listing.Tree(dir, listing.Options{NoXattrs: true})
	if err != nil {
		t.Fatal(err)
	}
	return lines
}
