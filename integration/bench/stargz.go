package main

import (
	"context"
	"debug/buildinfo"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"

	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/tarball"
	"github.com/google/go-containerregistry/pkg/v1/types"

	"github.com/daxfs/daxfs-snapshotter/integration/stack"
)

// stargzConfig makes containerd use stargz-snapshotter, with the labels that it needs to load layers itself.
const stargzConfig = `
[proxy_plugins.stargz]
  type = "snapshot"
  address = "` + stack.PeerSocket + `"
  [proxy_plugins.stargz.exports]
    enable_remote_snapshot_annotations = "true"
[[plugins."io.containerd.transfer.v1.local".unpack_config]]
  platform = "linux"
  snapshotter = "stargz"
  differ = "walking"
`

// tocAnnotation names the digest that verifies a layer for stargz-snapshotter.
const tocAnnotation = "containerd.io/snapshot/stargz/toc.digest"

// stargzProgram returns the program that integration/bench/prepare built from stargz/.
func stargzProgram(cache string) string { return filepath.Join(cache, "stargz") }

// stargzVersion returns the version of the library in the program.
func stargzVersion(cache string) string {
	info, err := buildinfo.ReadFile(stargzProgram(cache))
	if err != nil {
		return "not built"
	}
	for _, d := range info.Deps {
		if d.Path == "github.com/containerd/stargz-snapshotter" {
			return d.Version
		}
	}
	return "unknown"
}

// openStargz makes the image from the layers of open, which it converts to eStargz the first time.
func (w *workload) openStargz(ctx context.Context, cache string) (err error) {
	var layers []mutate.Addendum
	for _, t := range w.trees {
		file := filepath.Join(cache, t, "layer.esgz")
		toc, err := os.ReadFile(file + ".toc")
		if errors.Is(err, fs.ErrNotExist) {
			toc, err = exec.CommandContext(ctx, stargzProgram(cache), "convert",
				filepath.Join(cache, t, "layer.tar.gz"), file).Output()
			if err == nil {
				err = os.WriteFile(file+".toc", toc, 0o644)
			}
		}
		if err != nil {
			return fmt.Errorf("eStargz of tree %q: %w", t, err)
		}
		layer, err := tarball.LayerFromFile(file, tarball.WithMediaType(types.OCILayer))
		if err != nil {
			return err
		}
		layers = append(layers, mutate.Addendum{
			Layer: layer, Annotations: map[string]string{tocAnnotation: strings.TrimSpace(string(toc))},
		})
	}
	w.esgz, err = pack(layers)
	return err
}
