package testimage

import (
	"testing"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/validate"

	"github.com/daxfs/daxfs-snapshotter/internal/slow"
)

// Layers are valid by the library's own check, and reproducible.
func TestReproducible(t *testing.T) {
	for name, build := range map[string]func() (v1.Image, error){
		"tiny":    Tiny,
		"special": Special,
		"layers":  func() (v1.Image, error) { return Layers(64) },
		"small":   func() (v1.Image, error) { return Small(500, 1) },
		"python":  func() (v1.Image, error) { return Python("a") },
		"formats": Formats,
		"docker":  Docker,
	} {
		t.Run(name, func(t *testing.T) {
			if name == "python" {
				slow.Skip(t, "compresses the layers of Python four times")
			}
			if _, err := Busybox(); err != nil {
				t.Skip(err)
			}
			if _, err := PythonLayer(); err != nil && name == "python" {
				t.Skip(err)
			}
			a, err := build()
			if err != nil {
				t.Fatal(err)
			}
			layers, err := a.Layers()
			if err != nil {
				t.Fatal(err)
			}
			for i, l := range layers {
				if _, ok := l.(*blobLayer); ok {
					continue // the library knows gzip only
				}
				if err := validate.Layer(l); err != nil {
					t.Errorf("layer %d: %v", i, err)
				}
			}
			b, err := build()
			if err != nil {
				t.Fatal(err)
			}
			da, err := a.Digest()
			if err != nil {
				t.Fatal(err)
			}
			if db, err := b.Digest(); err != nil || da != db {
				t.Errorf("two builds: %v and %v (%v)", da, db, err)
			}
		})
	}
}
