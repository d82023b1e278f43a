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

	"github.com/daxfs/daxfs-snapshotter/integration/stack"
)

// mConvert is the time of a conversion; mConverted what came out.
const (
	mConvert   = "convert"
	mConverted = "convert MiB"
)

// tool makes something of an image. All read from a tmpfs, and write there unless they say otherwise.
type tool struct {
	name string
	// command runs in a directory with layout (the OCI image), plain (the same, uncompressed), flat.tar and tree. out is
	// where the result goes: a file, or a directory that exists for those that make one.
	command func(out string) []string
	dir     bool // out is a directory
	disk    bool // out is on disk
	sync    bool // the time until it is durable
}

func tools(daxfs, mkfs string) []tool {
	return []tool{
		{name: "daxfs convert, gzip layers", command: func(out string) []string { return []string{daxfs, "convert", "-o", out, "oci:layout"} }},
		{name: "daxfs convert, plain layers", command: func(out string) []string { return []string{daxfs, "convert", "-o", out, "oci:plain"} }},
		{name: "gzip -dc of the layers", command: func(out string) []string {
			return []string{"sh", "-c", "gzip -dc layer-*.gz >" + out}
		}},
		{name: "mkfs.erofs 1.8.6 --tar=f", command: func(out string) []string { return []string{mkfs, "--quiet", "--tar=f", out, "flat.tar"} }},
		{name: "mkfs.erofs 1.8.6 --tar=f --sort=none", command: func(out string) []string {
			return []string{mkfs, "--quiet", "--tar=f", "--sort=none", out, "flat.tar"}
		}},
		{name: "mkfs.erofs 1.8.6 of the tree", command: func(out string) []string { return []string{mkfs, "--quiet", out, "tree"} }},
		{name: "tar2sqfs lz4", command: func(out string) []string {
			return []string{"sh", "-c", "tar2sqfs -q -f -c lz4 " + out + " <flat.tar"}
		}},
		{name: "tar -x to tmpfs", dir: true, command: func(out string) []string { return []string{"tar", "-xf", "flat.tar", "-C", out} }},
		{name: "tar -x to disk", dir: true, disk: true, command: func(out string) []string { return []string{"tar", "-xf", "flat.tar", "-C", out} }},
		{name: "tar -x to disk, synced", dir: true, disk: true, sync: true, command: func(out string) []string {
			return []string{"tar", "-xf", "flat.tar", "-C", out}
		}},
		{name: "daxfs convert to disk, gzip layers", disk: true, command: func(out string) []string {
			return []string{daxfs, "convert", "-o", out, "oci:layout"}
		}},
		{name: "cp of the flat tar", command: func(out string) []string { return []string{"cp", "flat.tar", out} }},
	}
}

// convert compares the conversions of each workload, tool after tool in every round.
func (b *bench) convert(mkfs string) error {
	cache, err := stack.CacheDir()
	if err != nil {
		return err
	}
	disk, err := os.MkdirTemp(cache, "convert-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(disk)
	const dir = "/run/daxfs-bench" // a tmpfs of our own
	all := tools(filepath.Join(cache, "own", "daxfs"), filepath.Join(mkfs, "mkfs.erofs"))
	for _, w := range b.loads {
		if err := stage(w, dir); err != nil {
			return fmt.Errorf("prepare the conversions of %s: %w", w.name, err)
		}
		for round := range max(b.rounds, 5) {
			for _, t := range all {
				if err := b.ctx.Err(); err != nil {
					return err
				}
				if err := b.runTool(t, w, dir, disk, round); err != nil {
					fmt.Printf("conversion left out: %s: %v\n", t.name, err)
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
	b.samples = append(b.samples, sample{w.name, t.name, mConvert, round, time.Since(began).Seconds()})
	if st, err := os.Stat(out); err == nil && st.Mode().IsRegular() {
		b.samples = append(b.samples, sample{w.name, t.name, mConverted, round, float64(st.Size()) / (1 << 20)})
	}
	return nil
}

// stage lays out what the tools read.
func stage(w *workload, dir string) error {
	if err := errors.Join(os.RemoveAll(dir), os.MkdirAll(filepath.Join(dir, "tree"), 0o755)); err != nil {
		return err
	}
	layers, err := w.image.Layers()
	if err != nil {
		return err
	}
	plain := mutate.ConfigMediaType(mutate.MediaType(empty.Image, types.OCIManifestSchema1), types.OCIConfigJSON)
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
		if plain, err = mutate.AppendLayers(plain, static.NewLayer(raw, types.OCIUncompressedLayer)); err != nil {
			return err
		}
	}
	cfg, err := plain.ConfigFile()
	if err != nil {
		return err
	}
	cfg = cfg.DeepCopy()
	cfg.OS, cfg.Architecture = "linux", "amd64"
	if plain, err = mutate.ConfigFile(plain, cfg); err != nil {
		return err
	}
	for name, img := range map[string]v1.Image{"layout": w.image, "plain": plain} {
		p, err := layout.Write(filepath.Join(dir, name), empty.Index)
		if err != nil {
			return err
		}
		if err := p.AppendImage(img); err != nil {
			return err
		}
	}
	return flatten(w.image, filepath.Join(dir, "flat.tar"), filepath.Join(dir, "tree"))
}

func saveLayer(l v1.Layer, path string) error {
	rc, err := l.Compressed()
	if err != nil {
		return err
	}
	defer rc.Close()
	return writeFile(path, func(w io.Writer) error { _, err := io.Copy(w, rc); return err })
}

// flatten writes what a container sees as a tar and as a tree, with a program of neither side.
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

// conversions writes the table of all tools.
func (b *bench) conversions(w io.Writer) {
	for _, l := range b.loads {
		var names []string
		for _, x := range b.samples {
			if x.Workload == l.name && x.Metric == mConvert && (len(names) == 0 || names[len(names)-1] != x.Variant) && x.Round == 0 {
				names = append(names, x.Variant)
			}
		}
		if len(names) == 0 {
			continue
		}
		fmt.Fprintf(w, "\n### Conversion, %s\n\n| program | s, median [min..max] | MiB |\n| --- | --- | --- |\n", l.name)
		for _, n := range names {
			s, size := b.of(l.name, n, mConvert), b.of(l.name, n, mConverted)
			mib := ""
			if size.n > 0 {
				mib = fmt.Sprintf("%.0f", size.median)
			}
			fmt.Fprintf(w, "| %s | %.2f [%.2f..%.2f] | %s |\n", n, s.median, s.min, s.max, mib)
		}
	}
}
