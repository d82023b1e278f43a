// Package testimage makes OCI images for tests, without a network and always with the same bytes: a
// small one with busybox, one with everything that a file system can hold, one with many layers and
// whiteouts, one with thousands of small files, and one with Python from this machine.
//
// A layer is a list of entries. Image trees follow from the entries, so tests can also ask for the list.
package testimage

import (
	"archive/tar"
	"bytes"
	"fmt"
	"io"
	"path"
	"time"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/tarball"
	"github.com/google/go-containerregistry/pkg/v1/types"
)

// epoch is the default modification time of entries.
var epoch = time.Unix(1700000000, 0).UTC()

// Entry is one member of a layer. The zero type is a regular file.
type Entry struct {
	tar.Header
	Body []byte
}

// File is a regular file.
func File(name string, mode int64, body []byte) Entry {
	return Entry{Header: tar.Header{Typeflag: tar.TypeReg, Name: name, Mode: mode, Size: int64(len(body))}, Body: body}
}

// Dir is a directory.
func Dir(name string, mode int64) Entry {
	return Entry{Header: tar.Header{Typeflag: tar.TypeDir, Name: name + "/", Mode: mode}}
}

// Symlink is a symbolic link.
func Symlink(name, target string) Entry {
	return Entry{Header: tar.Header{Typeflag: tar.TypeSymlink, Name: name, Linkname: target, Mode: 0o777}}
}

// Link is a second name of the file target in this layer. Like archivers it repeats the file's mode,
// because containerd applies it again.
func Link(name, target string, mode int64) Entry {
	return Entry{Header: tar.Header{Typeflag: tar.TypeLink, Name: name, Linkname: target, Mode: mode}}
}

// Whiteout removes name of lower layers.
func Whiteout(name string) Entry {
	dir, base := path.Split(name)
	return File(dir+".wh."+base, 0o644, nil)
}

// Opaque hides the contents of a directory in lower layers.
func Opaque(dir string) Entry { return File(dir+"/.wh..wh..opq", 0o644, nil) }

// Owned sets the owner of an entry.
func (e Entry) Owned(uid, gid int) Entry { e.Uid, e.Gid = uid, gid; return e }

// Xattr adds an extended attribute.
func (e Entry) Xattr(name, value string) Entry {
	records := map[string]string{"SCHILY.xattr." + name: value}
	for k, v := range e.PAXRecords {
		records[k] = v
	}
	e.PAXRecords = records
	return e
}

// At sets the modification time.
func (e Entry) At(t time.Time) Entry { e.ModTime = t; return e }

// Tar writes entries as one layer, uncompressed.
func Tar(w io.Writer, entries []Entry) error {
	tw := tar.NewWriter(w)
	for _, e := range entries {
		h := e.Header
		if h.ModTime.IsZero() {
			h.ModTime = epoch
		}
		h.Format = tar.FormatPAX
		if err := tw.WriteHeader(&h); err != nil {
			return fmt.Errorf("entry %q: %w", h.Name, err)
		}
		if _, err := tw.Write(e.Body); err != nil {
			return fmt.Errorf("entry %q: %w", h.Name, err)
		}
	}
	return tw.Close()
}

// Image makes an image of layers, bottom first, compressed with gzip as in registries.
func Image(layers ...[]Entry) (v1.Image, error) {
	return imageOf(types.OCIManifestSchema1, types.OCIConfigJSON, types.OCILayer, layers)
}

// imageOf makes an image with these media types.
func imageOf(manifest, config, layer types.MediaType, layers [][]Entry) (v1.Image, error) {
	img := mutate.ConfigMediaType(mutate.MediaType(empty.Image, manifest), config)
	for _, entries := range layers {
		var raw bytes.Buffer
		if err := Tar(&raw, entries); err != nil {
			return nil, err
		}
		made, err := tarball.LayerFromOpener(func() (io.ReadCloser, error) {
			return io.NopCloser(bytes.NewReader(raw.Bytes())), nil
		}, tarball.WithMediaType(layer), tarball.WithCompressedCaching)
		if err != nil {
			return nil, fmt.Errorf("make a layer: %w", err)
		}
		if img, err = mutate.AppendLayers(img, made); err != nil {
			return nil, fmt.Errorf("add a layer: %w", err)
		}
	}
	cfg, err := img.ConfigFile()
	if err != nil {
		return nil, err
	}
	cfg = cfg.DeepCopy()
	cfg.Created = v1.Time{Time: epoch}
	cfg.OS, cfg.Architecture = "linux", architecture
	cfg.Config.Env = []string{"PATH=/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin"}
	cfg.Config.Cmd = []string{"/bin/sh"}
	return mutate.ConfigFile(img, cfg)
}
