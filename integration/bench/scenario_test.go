package main

import (
	"bytes"
	"crypto/sha256"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/daxfs/daxfs-snapshotter/integration/testimage"
)

func TestMain(m *testing.M) {
	exitIfReader()
	os.Exit(m.Run())
}

// The scenarios match their titles.
func TestScenarios(t *testing.T) {
	base := baseLayer()
	if n := len(base) - 1 - baseDirs; n != baseFiles {
		t.Fatalf("%d files in the base, expected %d", n, baseFiles)
	}
	size := 0
	for _, e := range base {
		size += len(e.Body)
	}
	if size>>20 < 120 || size>>20 > 135 {
		t.Errorf("the base has %d MiB, expected about 127", size>>20)
	}
	seen := map[string]bool{}
	for _, sc := range scenarios() {
		set := sc.build(base)
		sums, distinct, apart := hashes{}, map[[sha256.Size]byte]int64{}, 0.0
		for _, layers := range set.images {
			own := map[[sha256.Size]byte]int64{}
			sums.merge(layers, own)
			sums.merge(layers, distinct)
			apart += total(own)
		}
		known := map[*layer]bool{}
		for _, layers := range set.images {
			for _, l := range layers {
				known[l] = true
			}
		}
		for _, layers := range set.further {
			for _, l := range layers {
				if !known[l] {
					t.Errorf("%s: a further image has a layer of its own", sc.name)
				}
			}
		}
		// Each image has between 8 and 20 MiB of its own.
		n := float64(len(set.images))
		if own := (total(distinct) - apart/n) / (n - 1); own < 8 || own > 20 {
			t.Errorf("%s: %.0f MiB are distinct of %.0f MiB in %.0f images", sc.name, total(distinct), apart, n)
		}
		if seen[sc.name] {
			t.Errorf("%s is there twice", sc.name)
		}
		seen[sc.name] = true
	}
}

// The bases of scenario B differ as layers but have equal files; those of C differ in their times.
func TestBases(t *testing.T) {
	base := []testimage.Entry{testimage.Dir("usr", 0o755)}
	for i := range baseFiles {
		base = append(base, testimage.File(baseDir(i%17)+"/f", 0o644, []byte{byte(i)}))
	}
	for _, c := range []struct {
		build func([]testimage.Entry) imageSet
		equal bool // files, with their times
	}{{equalLayers, true}, {touchedLayers, false}} {
		set := c.build(base)
		var layers [2]bytes.Buffer
		var files [2][]testimage.Entry
		for i := range 2 {
			entries := set.images[i][0].entries
			if err := testimage.Tar(&layers[i], entries); err != nil {
				t.Fatal(err)
			}
			files[i] = entries[len(entries)-baseFiles:]
		}
		if bytes.Equal(layers[0].Bytes(), layers[1].Bytes()) {
			t.Error("two bases are one layer")
		}
		for i, e := range files[0] {
			if o := files[1][i]; !bytes.Equal(e.Body, o.Body) || e.ModTime.Equal(o.ModTime) != c.equal {
				t.Fatalf("file %q: times %v and %v", e.Name, e.ModTime, o.ModTime)
			}
		}
	}
}

// A reader finds changed, missing and additional files.
func TestReadTree(t *testing.T) {
	if os.Getuid() != 0 {
		t.Skip("needs root: it makes a control group")
	}
	group, err := newMemoryGroup()
	if err != nil {
		t.Skip(err)
	}
	defer group.Close()
	dir := t.TempDir()
	for name, text := range map[string]string{"a": "one", "b": "two"} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	one, two := sha256.Sum256([]byte("one")), sha256.Sum256([]byte("two"))
	for _, c := range []struct {
		want contents
		err  string
	}{
		{contents{"a": one, "b": two}, ""},
		{contents{"a": two, "b": two}, `file "a" has digest`},
		{contents{"a": one}, `file "b" has digest`},
		{contents{"a": one, "b": two, "c": two}, `1 files are missing, file "c" first`},
	} {
		err := group.read(t.Context(), dir, c.want)
		if c.err == "" && err != nil || c.err != "" && (err == nil || !strings.Contains(err.Error(), c.err)) {
			t.Errorf("read: %v, expected %q", err, c.err)
		}
	}
	if _, err := group.cached(); err != nil {
		t.Error(err)
	}
}
