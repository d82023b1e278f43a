package main

import (
	"archive/tar"
	"bytes"
	"encoding/xml"
	"errors"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/daxfs/daxfs-snapshotter/integration/stack"
)

func TestSpread(t *testing.T) {
	for _, c := range []struct {
		in   []float64
		want spread
	}{
		{[]float64{3}, spread{3, 3, 3, 1}},
		{[]float64{9, 1, 2}, spread{2, 1, 9, 3}},
		{[]float64{4, 1, 2, 9}, spread{3, 1, 9, 4}},
	} {
		if got := spreadOf(c.in); got != c.want {
			t.Errorf("spread of %v: %v, want %v", c.in, got, c.want)
		}
	}
}

// A missed goal is bold; a goal without measurements is not listed.
func TestReport(t *testing.T) {
	b := &bench{loads: []*workload{{name: "python", trees: []string{"a", "b"}}}}
	b.variants = variants("")
	for round, v := range []float64{4, 5, 6} {
		b.samples = append(b.samples,
			sample{"python", overlay, mReady, round, v}, sample{"python", file, mReady, round, v / 5},
			sample{"python", overlay, mNth, round, v}, sample{"python", file, mNth, round, v * 2},
			sample{"conversion of python", untar, mConvert, round, v / 10},
			sample{"conversion of python", "tar <x>", mConvert, round, v},
			sample{reading, readTmpfs, "find cold ms", round, v * 2}, sample{reading, "ext4", "find cold ms", round, v},
		)
	}
	b.samples = append(b.samples,
		sample{scenarioA, distinctContents, mRead, 0, 200}, sample{scenarioA, overlay, mRead, 0, 210},
		sample{scenarioA, file, mRead, 0, 252}, sample{scenarioA, file, mFurther, 0, 40},
		sample{scenarioB, overlay, mRead, 0, 100}, sample{scenarioB, file, mRead, 0, 30},
	)
	for range 2 {
		b.fail(errors.New("no\nspace"), "python with %s", stargz)
	}
	dir := t.TempDir()
	if err := b.report(dir, "a machine"); err != nil {
		t.Fatal(err)
	}
	raw, err := os.ReadFile(filepath.Join(dir, "results.md"))
	if err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{
		"| ready: daxfs / overlayfs | 0.20 | 0.20 |", "| nth: daxfs / overlayfs | 1.05 | **2.00** |",
		"| daxfs | 0.20 | 2.00 |", "5.00 [4.00..6.00]", "| tar <x> | 10.00 |  | 5.00 [4.00..6.00] |  |",
		"| tmpfs | 1.00 |", "| ext4 | 0.50 |", "| tmpfs | 2.00 |", "| ext4 | 5.0 [4.0..6.0] |",
		"| images A, page cache MiB: daxfs / overlayfs | 1.10 | **1.20** |",
		"| images A, page cache MiB: daxfs / distinct contents | 1.15 | **1.26** |",
		"| images B, page cache MiB: daxfs / overlayfs | 0.35 | 0.30 |",
		"| images A, further ready ms: daxfs | 50.00 | 40.00 |",
		"| images A: 10 images on one base layer | daxfs | 252.0 | 1.26 | 1.20 |  | 40.0 |  |",
		"* python with stargz, 2 time(s): no space", "a machine",
	} {
		if !strings.Contains(string(raw), want) {
			t.Errorf("the report lacks %q:\n%s", want, raw)
		}
	}
	if strings.Contains(string(raw), "| cache MiB") {
		t.Errorf("the report names what was not measured:\n%s", raw)
	}
	for _, name := range []string{"ready", "images", "convert", "read-cold"} {
		svg, err := os.ReadFile(filepath.Join(dir, name+".svg"))
		if err != nil {
			t.Fatal(err)
		}
		d := xml.NewDecoder(bytes.NewReader(svg))
		for {
			if _, err := d.Token(); errors.Is(err, io.EOF) {
				break
			} else if err != nil {
				t.Fatalf("the chart %s is no XML: %v\n%s", name, err, svg)
			}
		}
	}
	if _, err := os.Stat(filepath.Join(dir, "read-warm.svg")); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("a chart of what was not measured: %v", err)
	}
}

// An upper directory of overlayfs becomes a layer with whiteouts, opaque directories and hard links.
func TestTarTree(t *testing.T) {
	if os.Getuid() != 0 {
		t.Skip("needs root: whiteouts are device nodes")
	}
	root := t.TempDir()
	must := func(errs ...error) {
		t.Helper()
		if err := errors.Join(errs...); err != nil {
			t.Fatal(err)
		}
	}
	must(
		os.Mkdir(root+"/opaque", 0o755), unix.Setxattr(root+"/opaque", "trusted.overlay.opaque", []byte("y"), 0),
		unix.Mknod(root+"/gone", unix.S_IFCHR, 0), os.WriteFile(root+"/a", []byte("text"), 0o640),
		os.Link(root+"/a", root+"/b"), os.Symlink("a", root+"/c"), unix.Mkfifo(root+"/fifo", 0o600),
	)
	var raw bytes.Buffer
	must(tarTree(&raw, root))
	want := map[string]byte{
		"a": tar.TypeReg, "b": tar.TypeLink, "c": tar.TypeSymlink, "fifo": tar.TypeFifo,
		".wh.gone": tar.TypeReg, "opaque/": tar.TypeDir, "opaque/.wh..wh..opq": tar.TypeReg,
	}
	tr := tar.NewReader(&raw)
	for {
		h, err := tr.Next()
		if errors.Is(err, io.EOF) {
			break
		}
		must(err)
		if kind, ok := want[h.Name]; !ok || kind != h.Typeflag {
			t.Errorf("entry %q of type %q, want %q", h.Name, h.Typeflag, kind)
		}
		delete(want, h.Name)
	}
	if len(want) > 0 {
		t.Errorf("no entries for %v", want)
	}
}

func TestChoose(t *testing.T) {
	name := func(v *variant) string { return v.name }
	got, err := chooseNamed(variants(""), "daxfs,overlayfs", name)
	if err != nil || len(got) != 2 || got[0].options.Mode != stack.Streaming || got[1].options.Mode != stack.None {
		t.Errorf("chose %v, %v", got, err)
	}
	if _, err := chooseNamed(variants(""), "zfs", name); err == nil {
		t.Error("chose a variant that does not exist")
	}
}
