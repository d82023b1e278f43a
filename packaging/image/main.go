// Command image writes the container image of docs/kubernetes as an archive of an OCI image layout. The image holds
// nothing but the two static programs, for one platform or several.
//
//	image -output FILE.tar -created SECONDS -ref NAME ARCHITECTURE=DIRECTORY…
//
// DIRECTORY holds the programs for ARCHITECTURE. Equal programs make equal bytes.
package main

import (
	"archive/tar"
	"bytes"
	"errors"
	"flag"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"time"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/layout"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/tarball"
	"github.com/google/go-containerregistry/pkg/v1/types"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

func main() {
	output := flag.String("output", "", "archive to write")
	created := flag.Int64("created", 0, "when the image was made, in seconds since 1970")
	ref := flag.String("ref", "daxfs-snapshotter", "name of the image in the archive")
	flag.Parse()
	if *output == "" || flag.NArg() == 0 {
		fmt.Fprintln(os.Stderr, "usage: image -output FILE.tar [-created SECONDS] [-ref NAME] ARCHITECTURE=DIRECTORY…")
		os.Exit(2)
	}
	if err := write(*output, *ref, time.Unix(*created, 0).UTC(), flag.Args()); err != nil {
		fmt.Fprintln(os.Stderr, "image:", err)
		os.Exit(1)
	}
}

// write makes the archive of an index with an image for each "ARCHITECTURE=DIRECTORY".
func write(output, ref string, created time.Time, platforms []string) (err error) {
	index := mutate.IndexMediaType(empty.Index, types.OCIImageIndex)
	for _, p := range platforms {
		arch, dir, ok := strings.Cut(p, "=")
		if !ok {
			return fmt.Errorf("argument %q: expected ARCHITECTURE=DIRECTORY", p)
		}
		img, err := image(arch, dir, created)
		if err != nil {
			return err
		}
		index = mutate.AppendManifests(index, mutate.IndexAddendum{
			Add: img, Descriptor: v1.Descriptor{Platform: &v1.Platform{OS: "linux", Architecture: arch}},
		})
	}
	dir, err := os.MkdirTemp("", "daxfs-image-")
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(dir)) }()
	path, err := layout.Write(dir, empty.Index)
	if err != nil {
		return fmt.Errorf("write the image layout: %w", err)
	}
	names := layout.WithAnnotations(map[string]string{ocispec.AnnotationRefName: ref})
	if err := path.AppendIndex(index, names); err != nil {
		return fmt.Errorf("write the image layout: %w", err)
	}
	return archive(output, dir, created)
}

// image makes the image of the programs in dir.
func image(arch, dir string, created time.Time) (v1.Image, error) {
	text, err := programs(dir, created)
	if err != nil {
		return nil, err
	}
	layer, err := tarball.LayerFromOpener(func() (io.ReadCloser,
		error,
	) {
		return io.NopCloser(bytes.NewReader(text)), nil
	},
		tarball.WithMediaType(types.OCILayer))
	if err != nil {
		return nil, fmt.Errorf("make the layer for %s: %w", arch, err)
	}
	base := mutate.ConfigMediaType(mutate.MediaType(empty.Image, types.OCIManifestSchema1), types.OCIConfigJSON)
	img, err := mutate.Append(base, mutate.Addendum{
		Layer: layer, History: v1.History{Created: v1.Time{Time: created}, CreatedBy: "daxfs packaging/image"},
	})
	if err != nil {
		return nil, fmt.Errorf("make the image for %s: %w", arch, err)
	}
	return mutate.ConfigFile(img, withConfig(img, arch, created))
}

// withConfig is the configuration of an image, with what docs/kubernetes/Dockerfile sets.
func withConfig(img v1.Image, arch string, created time.Time) *v1.ConfigFile {
	config, err := img.ConfigFile()
	if err != nil {
		panic(err) // it was made above, from nothing that was read
	}
	config = config.DeepCopy()
	config.OS, config.Architecture, config.Created = "linux", arch, v1.Time{Time: created}
	config.Config.Entrypoint = []string{"/usr/local/bin/daxfs-snapshotter"}
	config.Config.Env = []string{"PATH=/usr/local/bin"}
	return config
}

// programs is the layer: the programs, and the directories on which Kubernetes mounts the volumes of docs/kubernetes.
func programs(dir string, created time.Time) ([]byte, error) {
	var text bytes.Buffer
	tw := tar.NewWriter(&text)
	for _, d := range []string{"tmp/", "usr/", "usr/local/", "usr/local/bin/"} {
		mode := int64(0o755)
		if d == "tmp/" {
			mode = 0o1777
		}
		if err := tw.WriteHeader(&tar.Header{
			Typeflag: tar.TypeDir, Name: d, Mode: mode,
			ModTime: created,
		}); err != nil {
			return nil, err
		}
	}
	for _, name := range []string{"daxfs", "daxfs-snapshotter"} {
		body, err := os.ReadFile(filepath.Join(dir, name))
		if err != nil {
			return nil, err
		}
		h := &tar.Header{
			Typeflag: tar.TypeReg, Name: "usr/local/bin/" + name, Mode: 0o755, Size: int64(len(body)),
			ModTime: created,
		}
		if err := tw.WriteHeader(h); err != nil {
			return nil, err
		}
		if _, err := tw.Write(body); err != nil {
			return nil, err
		}
	}
	return text.Bytes(), tw.Close()
}

// archive packs a directory. WalkDir goes in lexical order, so that equal directories make equal archives.
func archive(output, dir string, created time.Time) error {
	f, err := os.Create(output)
	if err != nil {
		return err
	}
	tw := tar.NewWriter(f)
	err = filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		body, err := os.ReadFile(path)
		if err != nil {
			return err
		}
		name, err := filepath.Rel(dir, path)
		if err != nil {
			return err
		}
		h := &tar.Header{Typeflag: tar.TypeReg, Name: name, Mode: 0o644, Size: int64(len(body)), ModTime: created}
		if err := tw.WriteHeader(h); err != nil {
			return err
		}
		_, err = tw.Write(body)
		return err
	})
	return errors.Join(err, tw.Close(), f.Close())
}
