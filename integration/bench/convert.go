package main

import (
	"archive/tar"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"time"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/layout"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/static"
	"github.com/google/go-containerregistry/pkg/v1/types"
	"golang.org/x/sys/unix"
)

// mConvert is the time of a conversion, mConverted the size of its result.
const (
	mConvert   = "convert"
	mConverted = "convert MiB"
)

// The references of the conversions.
const (
	untar   = "tar -x to tmpfs"
	mkfsTar = "mkfs.erofs --tar=f"
)

// tool converts an image. All tools read from a tmpfs, and write to it unless disk is set.
type tool struct {
	name string
	// command runs in a directory with layout (the OCI image), plain (the same, uncompressed), flat.tar
	// and tree. out is the path of the result: a new file, or an existing directory.
	command func(out string) []string
	dir     bool // out is a directory
	disk    bool // out is on disk
	sync    bool // measure until the result is durable
}

// converting returns the name of a workload's conversions among the samples.
func converting(w *workload) string { return "conversion of " + w.name }

func tools(daxfs, mkfs string) []tool {
	return []tool{
		{
			name:    "daxfs convert, gzip layers",
			command: func(out string) []string { return []string{daxfs, "convert", "-o", out, "oci:layout"} },
		},
		{
			name:    "daxfs convert, plain layers",
			command: func(out string) []string { return []string{daxfs, "convert", "-o", out, "oci:plain"} },
		},
		{name: "gzip -dc of the layers", command: func(out string) []string {
			return []string{"sh", "-c", "gzip -dc layer-*.gz >" + out}
		}},
		{
			name:    mkfsTar,
			command: func(out string) []string { return []string{mkfs, "--quiet", "--tar=f", out, "flat.tar"} },
		},
		{name: "mkfs.erofs --tar=f --sort=none", command: func(out string) []string {
			return []string{mkfs, "--quiet", "--tar=f", "--sort=none", out, "flat.tar"}
		}},
		{
			name:    "mkfs.erofs of the tree",
			command: func(out string) []string { return []string{mkfs, "--quiet", out, "tree"} },
		},
		{name: "tar2sqfs lz4", command: func(out string) []string {
			return []string{"sh", "-c", "tar2sqfs -q -f -c lz4 " + out + " <flat.tar"}
		}},
		{
			name: untar, dir: true,
			command: func(out string) []string { return []string{"tar", "-xf", "flat.tar", "-C", out} },
		},
		{
			name: "tar -x to disk", dir: true, disk: true,
			command: func(out string) []string { return []string{"tar", "-xf", "flat.tar", "-C", out} },
		},
		{name: "tar -x to disk, synced", dir: true, disk: true, sync: true, command: func(out string) []string {
			return []string{"tar", "-xf", "flat.tar", "-C", out}
		}},
		{name: "daxfs convert to disk, gzip layers", disk: true, command: func(out string) []string {
			return []string{daxfs, "convert", "-o", out, "oci:layout"}
		}},
		{name: "cp of the flat tar", command: func(out string) []string { return []string{"cp", "flat.tar", out} }},
	}
}

// scratch is on our own tmpfs.
const scratch = "/run/daxfs-bench"

// convert compares the conversions of each workload, all tools in every round. disk is an empty directory.
func (b *bench) convert(daxfs, mkfs, disk string) error {
	const dir = scratch
	defer os.RemoveAll(dir)
	all := tools(daxfs, mkfs)
	for _, w := range b.loads {
		if err := stage(w, dir); err != nil {
			return fmt.Errorf("prepare the conversions of %s: %w", w.name, err)
		}
		for round := range b.rounds {
			for _, t := range all {
				if err := b.ctx.Err(); err != nil {
					return err
				}
				if err := b.runTool(t, w, dir, disk, round); err != nil && b.ctx.Err() == nil {
					b.fail(err, "conversion of %s by %s", w.name, t.name)
				}
			}
		}
		if err := os.RemoveAll(dir); err != nil {
			return err
		}
	}
	return nil
}

func (b *bench) runTool(t tool, w *workload, dir, disk string, round int) error {
	out := filepath.Join(dir, "out")
	if t.disk {
		out = filepath.Join(disk, "out")
	}
	if t.dir {
		if err := os.Mkdir(out, 0o755); err != nil {
			return err
		}
	}
	defer os.RemoveAll(out)
	unix.Sync()
	argv := t.command(out)
	cmd := exec.CommandContext(b.ctx, argv[0], argv[1:]...)
	cmd.Dir = dir
	began := time.Now()
	if text, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("%w\n%s", err, text)
	}
	if t.sync {
		unix.Sync()
	}
	b.samples = append(b.samples, sample{converting(w), t.name, mConvert, round, time.Since(began).Seconds()})
	if st, err := os.Stat(out); err == nil && st.Mode().IsRegular() {
		b.samples = append(b.samples, sample{converting(w), t.name, mConverted, round, float64(st.Size()) / (1 << 20)})
	}
	return nil
}

// stage prepares the input of the tools.
func stage(w *workload, dir string) error {
	if err := errors.Join(os.RemoveAll(dir), os.MkdirAll(filepath.Join(dir, "tree"), 0o755)); err != nil {
		return err
	}
	layers, err := w.gzip.image.Layers()
	if err != nil {
		return err
	}
	var plain []mutate.Addendum
	for i, l := range layers {
		if err := saveLayer(l, filepath.Join(dir, fmt.Sprintf("layer-%d.gz", i))); err != nil {
			return err
		}
		rc, err := l.Uncompressed()
		if err != nil {
			return err
		}
		raw, err := io.ReadAll(rc)
		if err := errors.Join(err, rc.Close()); err != nil {
			return err
		}
		plain = append(plain, mutate.Addendum{Layer: static.NewLayer(raw, types.OCIUncompressedLayer)})
	}
	unpacked, err := pack(plain)
	if err != nil {
		return err
	}
	for name, img := range map[string]v1.Image{"layout": w.gzip.image, "plain": unpacked.image} {
		if err := writeLayout(filepath.Join(dir, name), img); err != nil {
			return err
		}
	}
	return flatten(w.gzip.image, filepath.Join(dir, "flat.tar"), filepath.Join(dir, "tree"))
}

func writeLayout(dir string, img v1.Image) error {
	p, err := layout.Write(dir, empty.Index)
	if err != nil {
		return err
	}
	return p.AppendImage(img)
}

func saveLayer(l v1.Layer, path string) error {
	rc, err := l.Compressed()
	if err != nil {
		return err
	}
	defer rc.Close()
	return writeFile(path, func(w io.Writer) error { _, err := io.Copy(w, rc); return err })
}

// flatten writes a container's view as a tar and as a tree, with a neutral program.
func flatten(img v1.Image, flat, tree string) error {
	rc := mutate.Extract(img)
	defer rc.Close()
	err := writeFile(flat, func(w io.Writer) error {
		tw := tar.NewWriter(w)
		tr := tar.NewReader(rc)
		for {
			h, err := tr.Next()
			if errors.Is(err, io.EOF) {
				return tw.Close()
			}
			if err != nil {
				return err
			}
			if err := tw.WriteHeader(h); err != nil {
				return err
			}
			if _, err := io.Copy(tw, tr); err != nil {
				return err
			}
		}
	})
	if err != nil {
		return err
	}
	out, err := exec.CommandContext(context.Background(), "tar", "-xf", flat, "-C", tree).CombinedOutput()
	if err != nil {
		return fmt.Errorf("tar -x: %w\n%s", err, out)
	}
	return nil
}
