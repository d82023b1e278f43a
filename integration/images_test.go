package integration

import (
	"crypto/sha256"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"testing"

	v1 "github.com/google/go-containerregistry/pkg/v1"

	"github.com/daxfs/daxfs-snapshotter/integration/stack"
	"github.com/daxfs/daxfs-snapshotter/integration/testimage"
)

// images are the images of the tests, smallest first.
var images = []struct {
	name  string
	build func() (v1.Image, error)
}{
	{"tiny", testimage.Tiny},
	{"special", testimage.Special},
	{"formats", testimage.Formats},
	{"docker", testimage.Docker},
	{"layers", func() (v1.Image, error) { return testimage.Layers(70) }},
	{"small", func() (v1.Image, error) { return testimage.Small(8000, 1) }},
	{"python", func() (v1.Image, error) { return testimage.Python("one") }},
}

// push builds the image of that name and uploads it.
func push(t testing.TB, s *stack.T, name string) (ref string) {
	t.Helper()
	for _, i := range images {
		if i.name != name {
			continue
		}
		img, err := i.build()
		if err != nil {
			t.Fatal(err)
		}
		return s.Push(name, img)
	}
	t.Fatalf("no image %q", name)
	return ""
}

// modes runs a test walking and streaming.
func modes(t *testing.T, test func(*testing.T, stack.Mode)) {
	for _, m := range []stack.Mode{stack.Walking, stack.Streaming} {
		t.Run(string(m), func(t *testing.T) { test(t, m) })
	}
}

// sumOf returns the SHA-256 of an entry's contents in hex.
func sumOf(entries []testimage.Entry, name string) string {
	for _, e := range entries {
		if e.Name == name {
			return fmt.Sprintf("%x", sha256.Sum256(e.Body))
		}
	}
	return "no entry " + name
}

// removeIfThere removes a file that may not exist.
func removeIfThere(t testing.TB, path string) {
	t.Helper()
	if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
		t.Error(err)
	}
}
