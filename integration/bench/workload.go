package main

import (
	"archive/tar"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/tarball"
	"github.com/google/go-containerregistry/pkg/v1/types"
	"github.com/klauspost/compress/gzip"
	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/identity"
	"golang.org/x/sys/unix"
)

// workload is one image and its programs.
type workload struct {
	name  string
	trees []string // below the cache, bottom first
	small []string // a program that ends at once
	app   []string // loads the modules of a typical service
	wait  []string // the same, then waits
	gzip  packed
	esgz  packed // the same layers as eStargz; without a reference unless requested
}

// packed is an image in one packing of its layers.
type packed struct {
	image v1.Image
	ref   string // in the registry
	chain string // chain ID of the top
	size  int64  // bytes of the compressed layers
}

func workloads() []*workload {
	python := []string{"/usr/bin/python3", "-B", "/app/main.py"}
	node := []string{"/usr/bin/node", "/app/main.js"}
	return []*workload{
		{
			name: "python", trees: []string{"base", "python", "pyapp"},
			small: []string{"/usr/bin/python3", "-c", "print(1)"}, app: python, wait: append(python, "wait"),
		},
		{
			name: "node", trees: []string{"base", "node", "nodeapp"},
			small: []string{"/usr/bin/node", "-e", "1"}, app: node, wait: append(node, "wait"),
		},
	}
}

// open makes the image from the trees in the cache. It packs their layers the first time.
func (w *workload) open(cache string) (err error) {
	var layers []mutate.Addendum
	for _, t := range w.trees {
		file, err := packTree(filepath.Join(cache, t))
		if err != nil {
			return fmt.Errorf("tree %q (was integration/bench/prepare run?): %w", t, err)
		}
		layer, err := tarball.LayerFromFile(file, tarball.WithMediaType(types.OCILayer))
		if err != nil {
			return err
		}
		layers = append(layers, mutate.Addendum{Layer: layer})
	}
	w.gzip, err = pack(layers)
	return err
}

func pack(layers []mutate.Addendum) (packed, error) {
	var p packed
	var diffIDs []digest.Digest
	for _, l := range layers {
		id, err := l.Layer.DiffID()
		if err != nil {
			return p, err
		}
		size, err := l.Layer.Size()
		if err != nil {
			return p, err
		}
		diffIDs, p.size = append(diffIDs, digest.Digest(id.String())), p.size+size
	}
	base := mutate.ConfigMediaType(mutate.MediaType(empty.Image, types.OCIManifestSchema1), types.OCIConfigJSON)
	img, err := mutate.Append(base, layers...)
	if err != nil {
		return p, err
	}
	cfg, err := img.ConfigFile()
	if err != nil {
		return p, err
	}
	cfg = cfg.DeepCopy()
	cfg.OS, cfg.Architecture = "linux", "amd64"
	cfg.Config.Env = []string{"PATH=/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin"}
	p.image, err = mutate.ConfigFile(img, cfg)
	p.chain = identity.ChainID(diffIDs).String()
	return p, err
}

// packTree writes the tree dir/fs, plain or an overlayfs upper directory, to dir/layer.tar.gz unless it exists.
func packTree(dir string) (string, error) {
	packed := filepath.Join(dir, "layer.tar.gz")
	if _, err := os.Stat(packed); err == nil {
		return packed, nil
	}
	if _, err := os.Stat(filepath.Join(dir, "done")); err != nil {
		return "", err
	}
	f, err := os.CreateTemp(dir, "new-")
	if err != nil {
		return "", err
	}
	defer os.Remove(f.Name())
	defer f.Close()
	z, err := gzip.NewWriterLevel(f, 6)
	if err != nil {
		return "", err
	}
	if err := tarTree(z, filepath.Join(dir, "fs")); err != nil {
		return "", err
	}
	if err := errors.Join(z.Close(), f.Sync(), os.Rename(f.Name(), packed)); err != nil {
		return "", err
	}
	return packed, nil
}

// tarTree writes a directory as one OCI layer.
func tarTree(w io.Writer, root string) error {
	tw := tar.NewWriter(w)
	names := map[[2]uint64]string{} // first name of each file with several
	err := filepath.WalkDir(root, func(p string, d fs.DirEntry, err error) error {
		if err != nil || p == root {
			return err
		}
		name, err := filepath.Rel(root, p)
		if err != nil {
			return err
		}
		return tarEntry(tw, p, name, names)
	})
	return errors.Join(err, tw.Close())
}

func tarEntry(tw *tar.Writer, p, name string, names map[[2]uint64]string) error {
	info, err := os.Lstat(p)
	if err != nil {
		return err
	}
	st := info.Sys().(*syscall.Stat_t)
	if info.Mode().Type() == fs.ModeSocket {
		return nil
	}
	if info.Mode().Type() == fs.ModeDevice|fs.ModeCharDevice && st.Rdev == 0 {
		return tw.WriteHeader(&tar.Header{
			Typeflag: tar.TypeReg,
			Name:     path.Join(path.Dir(name), ".wh."+path.Base(name)), ModTime: info.ModTime(),
		})
	}
	target := ""
	if info.Mode().Type() == fs.ModeSymlink {
		if target, err = os.Readlink(p); err != nil {
			return err
		}
	}
	h, err := tar.FileInfoHeader(info, target)
	if err != nil {
		return err
	}
	h.Name, h.Format = name, tar.FormatPAX
	h.Uname, h.Gname, h.AccessTime, h.ChangeTime = "", "", time.Time{}, time.Time{}
	if info.IsDir() {
		h.Name += "/"
	}
	if caps := xattr(p, "security.capability"); caps != "" {
		h.PAXRecords = map[string]string{"SCHILY.xattr.security.capability": caps}
	}
	id := [2]uint64{uint64(st.Dev), st.Ino}
	if st.Nlink > 1 && info.Mode().IsRegular() {
		if first, ok := names[id]; ok {
			h.Typeflag, h.Linkname, h.Size = tar.TypeLink, first, 0
			return tw.WriteHeader(h)
		}
		names[id] = name
	}
	if err := tw.WriteHeader(h); err != nil {
		return err
	}
	if info.IsDir() && strings.HasPrefix(xattr(p, "trusted.overlay.opaque"), "y") {
		return tw.WriteHeader(&tar.Header{Typeflag: tar.TypeReg, Name: name + "/.wh..wh..opq", ModTime: info.ModTime()})
	}
	if !info.Mode().IsRegular() {
		return nil
	}
	f, err := os.Open(p)
	if err != nil {
		return err
	}
	defer f.Close()
	_, err = io.Copy(tw, f)
	return err
}

// xattr returns the value of an extended attribute, or "".
func xattr(p, name string) string {
	buf := make([]byte, 256)
	n, err := unix.Lgetxattr(p, name, buf)
	if err != nil {
		return ""
	}
	return string(buf[:n])
}
