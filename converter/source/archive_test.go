package source

import (
	"bytes"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/daxfs/daxfs-snapshotter/internal/ocitest"
	. "github.com/daxfs/daxfs-snapshotter/internal/treetest"
)

type (
	files = []File
	strs  = []string
	saved = []dockerEntry
)

// configOf returns the configuration of an image with these layers, which are tars.
func configOf(t *testing.T, p ocispec.Platform, layers ...[]byte) string {
	t.Helper()
	c := ocispec.Image{Platform: p, RootFS: ocispec.RootFS{Type: "layers"}}
	for _, l := range layers {
		c.RootFS.DiffIDs = append(c.RootFS.DiffIDs, digest.FromBytes(l))
	}
	return jsonOf(t, c)
}

// findIn writes an archive and finds an image in it.
func findIn(t *testing.T, kind string, archive []byte, ref, p string) (*Image, error) {
	t.Helper()
	file := filepath.Join(t.TempDir(), "archive")
	if err := os.WriteFile(file, archive, 0o644); err != nil {
		t.Fatal(err)
	}
	src := mustParse(t, kind+":"+file+ref, Config{})
	return find(t, src, p)
}

// TestArchiveLinks: links of layers, as written by docker save and other tools.
func TestArchiveLinks(t *testing.T) {
	a, b := Tar(Reg("a", "1")), Tar(Reg("b", "2"))
	config := Reg("c.json", configOf(t, ocitest.LinuxAMD64, a, b))
	one, two := Reg("1.tar", string(a)), Reg("2.tar", string(b))
	for name, c := range map[string]struct {
		layers  strs
		entries files
		bad     bool
	}{
		"files":               {strs{"1.tar", "2.tar"}, files{one, two}, false},
		"./ before the names": {[]string{"./1.tar", "2.tar"}, files{one, Reg("./2.tar", string(b))}, false},
		"absolute names":      {strs{"1.tar", "/2.tar"}, files{Reg("/1.tar", string(a)), two}, false},
		"a link beside": {
			strs{"1.tar", "x/layer.tar"},
			files{one, Sym("x/layer.tar", "../y/layer.tar"), Reg("y/layer.tar", string(b))},
			false,
		},
		"a link to the root": {
			strs{"1.tar", "x/layer.tar"},
			files{one, two, Sym("x/layer.tar", "../2.tar")},
			false,
		},
		"a link that forgot ../": {
			strs{"1.tar", "x/layer.tar"},
			files{one, two, Sym("x/layer.tar", "2.tar")},
			false,
		},
		"a link that forgot ../../": {
			strs{"1.tar", "x/y/layer.tar"},
			files{one, two, Sym("x/y/layer.tar", "../2.tar"), Reg("2.tar", string(b))},
			false,
		},
		"a link with a long way up": {
			strs{"1.tar", "x/layer.tar"},
			files{one, two, Sym("x/layer.tar", "../../../2.tar")},
			false,
		},
		"an absolute link": {
			strs{"1.tar", "x/layer.tar"},
			files{one, two, Sym("x/layer.tar", "/2.tar")},
			false,
		},
		"beside before the root": {
			strs{"1.tar", "x/layer.tar"},
			files{one, Reg("2.tar", "no"), Sym("x/layer.tar", "2.tar"), Reg("x/2.tar", string(b))},
			false,
		},
		"links to links": {
			strs{"1.tar", "x/l"},
			files{one, Sym("x/l", "../y/l"), Sym("y/l", "z/l"), Sym("z/l", "m"), Reg("m", string(b))},
			false,
		},
		"a link to a directory": {
			strs{"1.tar", "x/layer.tar"},
			files{one, Sym("x", "y"), Reg("y/layer.tar", string(b))},
			false,
		},
		"a deeper one": {
			strs{"1.tar", "d/x/e/layer.tar"},
			files{one, Sym("d/x", "../y"), Sym("y", "z"), Reg("z/e/layer.tar", string(b))},
			false,
		},
		"a hard link": {
			strs{"1.tar", "2.tar"},
			files{one, Reg("x/y", string(b)), Hard("2.tar", "x/y")},
			false,
		},
		"a hard link of ./": {
			strs{"1.tar", "2.tar"},
			files{one, Reg("./x/y", string(b)), Hard("./2.tar", "./x/y")},
			false,
		},
		"an absolute hard link": {
			strs{"1.tar", "2.tar"},
			files{one, Reg("/x/y", string(b)), Hard("/2.tar", "/x/y")},
			false,
		},
		"the link before its target": {
			strs{"1.tar", "2.tar"},
			files{Sym("2.tar", "x"), one, Reg("x", string(b))},
			false,
		},
		"a member twice":   {strs{"1.tar", "2.tar"}, files{Reg("2.tar", "old"), one, two}, false},
		"a link to itself": {strs{"1.tar", "2.tar"}, files{one, Sym("2.tar", "2.tar")}, true},
		"a circle": {
			strs{"1.tar", "x/a"},
			files{one, Sym("x/a", "b"), Sym("x/b", "a"), Sym("a", "x/b"), Sym("b", "x/a")},
			true,
		},
		"a link to nothing":                  {strs{"1.tar", "2.tar"}, files{one, Sym("2.tar", "3.tar")}, true},
		"no name":                            {strs{"", "2.tar"}, files{one, two}, true},
		"a name that is a directory":         {strs{"1.tar", "d"}, files{one, Dir("d"), two}, true},
		"a file in the place of a directory": {strs{"1.tar", "1.tar/2.tar"}, files{one, two}, true},
		"a very long name": {
			strs{"1.tar", strings.Repeat("x/", 1<<20)},
			files{one, Sym("x", "x")},
			true,
		},
	} {
		manifest := Reg("manifest.json", jsonOf(t, []dockerEntry{{Config: "c.json", Layers: c.layers}}))
		img, err := findIn(t, "docker-archive", Tar(append(c.entries, config, manifest)...), "", "")
		switch {
		case c.bad && !errors.Is(err, errNoMember):
			t.Errorf("%s: found %+v (%v), expected %v", name, img, err, errNoMember)
		case !c.bad && (err != nil || len(img.Layers) != 2):
			t.Errorf("%s: found %+v (%v), expected two layers", name, img, err)
		}
	}
}

// TestArchiveNames: an OCI archive whose members have absolute names, or ./ before them.
func TestArchiveNames(t *testing.T) {
	l := ocitest.NewLayout(t, t.TempDir())
	m := l.Manifest(platform("amd64", ""), oneFile("a"))
	l.Tag("v1", m)
	paths, err := filepath.Glob(l.Dir + "/blobs/sha256/*")
	if err != nil {
		t.Fatal(err)
	}
	paths = append(paths, l.Dir+"/index.json")
	for _, prefix := range []string{"", "./", "/", "//", "/./", "../"} {
		var entries []File
		for _, f := range paths {
			b, err := os.ReadFile(f)
			if err != nil {
				t.Fatal(err)
			}
			entries = append(entries, Reg(prefix+strings.TrimPrefix(f, l.Dir+"/"), string(b)))
		}
		img, err := findIn(t, "oci-archive", Tar(entries...), ":v1", "")
		if err != nil || img.Digest != m.Digest {
			t.Errorf("%q: found %+v (%v), expected %s", prefix, img, err, m.Digest)
		}
	}
}

// TestDockerArchiveChoice: selection among several images by reference, index and platform.
func TestDockerArchiveChoice(t *testing.T) {
	a, b, c := Tar(Reg("a", "1")), Tar(Reg("b", "2")), Tar(Reg("c", "3"))
	arm := platform("arm64", "")
	entries := files{
		Reg("a", string(a)), Reg("b", string(b)), Reg("c", string(c)), Reg("cc", configOf(t, arm, c)),
		Reg("ca", configOf(t, ocitest.LinuxAMD64, a)), Reg("cb", configOf(t, ocitest.LinuxAMD64, b)),
	}
	entry := func(name string, tags ...string) dockerEntry {
		return dockerEntry{Config: "c" + name, Layers: []string{name}, RepoTags: tags}
	}
	for name, list := range map[string]struct {
		list []dockerEntry
		want map[string]string // by "REF PLATFORM": the layer, or part of an error
	}{
		"one": {saved{entry("a")}, map[string]string{
			" ": "a", ":@0 ": "a", ":@1 ": `no "@1", there is: @0`, ":x ": `no "x", there is: @0`,
		}},
		"two without tags": {saved{entry("a"), entry("b")}, map[string]string{
			" ": "2 images: @0, @1", ":@0 ": "a", ":@1 ": "b", ":@2 ": "there is: @0, @1", ":@-1 ": "there is",
			":@ ": "there is", ":@x ": "there is",
		}},
		"two of which one has a tag": {saved{entry("a"), entry("b", "x:1")}, map[string]string{
			" ": `2 images: @0, @1 "x:1"`, ":@0 ": "a", ":x:1 ": "b", ":docker.io/library/x:1 ": "b",
		}},
		"two tags of one image": {saved{entry("a", "x:1"), entry("a", "x:2")}, map[string]string{
			" ": "a", ":x:1 ": "a", ":x:2 ": "a", ":@1 ": "a", ":UPPER ": `no "UPPER"`,
		}},
		"two platforms of one tag": {saved{entry("c", "x:1"), entry("a", "x:1")}, map[string]string{
			" linux/amd64": "a", ":x:1 linux/arm64": "c", ":x:1 linux/amd64": "a",
			":x:1 linux/s390x": "the index has linux/amd64, linux/arm64",
			":@0 ":             "c", ":@0 linux/amd64": "the image is for linux/arm64",
		}},
		"two images of one tag": {saved{entry("a", "x:1"), entry("b", "x:1")}, map[string]string{
			":x:1 ": `several images for linux/amd64`, " ": `("@1")`, ":@1 ": "b",
		}},
		"two orders of layers": {
			saved{entry("a"), {Config: "ca", Layers: strs{"b"}}},
			map[string]string{" ": "2 images", ":@0 ": "a"},
		},
		"none": {nil, map[string]string{" ": "0 images", ":@0 ": "nothing"}},
	} {
		archive := Tar(append(entries, Reg("manifest.json", jsonOf(t, list.list)))...)
		for ask, want := range list.want {
			ref, p, _ := strings.Cut(ask, " ")
			img, err := findIn(t, "docker-archive", archive, ref, p)
			if len(want) == 1 {
				tar := map[string][]byte{"a": a, "b": b, "c": c}[want]
				if err != nil || img.Layers[0].DiffID != digest.FromBytes(tar) {
					t.Errorf("%s, %q: found %+v (%v), expected %s", name, ask, img, err, want)
				}
			} else if err == nil || !strings.Contains(err.Error(), want) {
				t.Errorf("%s, %q: found %+v (%v), expected an error that says %q", name, ask, img, err, want)
			}
		}
	}
}

// TestDockerArchiveRefuses: the error says which part of the archive is wrong.
func TestDockerArchiveRefuses(t *testing.T) {
	a := Tar(Reg("a", "1"))
	layer, config := Reg("a", string(a)), Reg("c", configOf(t, ocitest.LinuxAMD64, a))
	badID := strings.Replace(configOf(t, ocitest.LinuxAMD64, a), "sha256:", "sha256:/", 1)
	blob := "blobs/sha256/" + digest.FromBytes(a).Encoded()
	sound := dockerEntry{Config: "c", Layers: strs{"a"}}
	for name, c := range map[string]struct {
		entries  files
		manifest any
		is       error // nil: only the message
		says     string
	}{
		"no manifest": {files{layer}, nil, errNoMember, `not a docker archive: "manifest.json" is not in the archive`},
		"manifest that is no list": {
			files{layer},
			map[string]int{"a": 1},
			errDamaged,
			"manifest.json: damaged: json: cannot unmarshal object",
		},
		"large configuration": {
			files{layer, Reg("c", strings.Repeat(" ", maxDocument+1))},
			saved{sound},
			nil,
			`config: "c": 8388609 bytes, expected at most 8388608`,
		},
		"no configuration": {files{layer}, saved{sound}, errNoMember, `config: "c" is not in the archive`},
		"configuration that is no JSON": {
			files{layer, Reg("c", "{]")},
			saved{sound},
			errDamaged,
			"config " + digest.FromString("{]").String() + ": damaged",
		},
		"diff ID that is no digest": {
			files{layer, Reg("c", badID)}, saved{sound}, errDamaged, `diff ID "sha256:/`,
		},
		"other number of layers": {
			files{layer, config},
			saved{{Config: "c", Layers: strs{"a", "a"}}},
			errDamaged,
			"1 diff IDs for 2 layers",
		},
		"no layer": {
			files{config},
			saved{sound},
			errNoMember,
			"layer 0 (" + digest.FromBytes(a).String() + `): "a" is not in the archive`,
		},
		"blob whose name is no digest": {
			files{config, Reg("blobs/sha256/x", string(a))},
			saved{{Config: "c", Layers: strs{"blobs/sha256/x"}}},
			nil,
			`layer 0: "blobs/sha256/x": invalid checksum digest`,
		},
		"the second of several": {
			files{layer, config, Reg("bad", "{]")},
			saved{{Config: "c", Layers: strs{"a"}, RepoTags: strs{"x"}}, {Config: "bad", RepoTags: strs{"x"}}},
			errDamaged, "image @1: config sha256:",
		},
	} {
		if c.manifest != nil {
			c.entries = append(c.entries, Reg("manifest.json", jsonOf(t, c.manifest)))
		}
		img, err := findIn(t, "docker-archive", Tar(c.entries...), "", "")
		if err == nil || c.is != nil && !errors.Is(err, c.is) || !strings.Contains(err.Error(), c.says) {
			t.Errorf("%s: found %+v, error %v; expected %v that says %q", name, img, err, c.is, c.says)
		}
	}
	// The name of a blob is its digest, with which it is verified.
	manifest := Reg("manifest.json", jsonOf(t, saved{{Config: "c", Layers: strs{blob}}}))
	img, err := findIn(t, "docker-archive", Tar(config, Reg(blob, string(a)), manifest), "", "")
	if err != nil || img.Layers[0].Desc.Digest != digest.FromBytes(a) {
		t.Errorf("found %+v (%v), expected a layer with the digest of its name", img, err)
	}
}

// TestPathsWithColons: the shortest existing path is used.
func TestPathsWithColons(t *testing.T) {
	t.Chdir(t.TempDir())
	l := ocitest.NewLayout(t, "a:b:c")
	l.Tag("v1", l.Manifest(platform("amd64", ""), oneFile("a")))
	l.Archive("file:v1")
	ocitest.DockerArchive(t, "x:y.tar", "example:v1", oneFile("a"))
	short := ocitest.NewLayout(t, "layout")
	m := short.Manifest(platform("amd64", ""), oneFile("short"))
	short.Tag("v1", m)
	ocitest.NewLayout(t, "layout:v1")
	for _, s := range []string{
		"oci:a:b:c", "oci:a:b:c:v1", "oci-archive:file:v1", "oci-archive:file:v1:v1", "docker-archive:x:y.tar",
		"docker-archive:x:y.tar:example:v1", "docker-archive:x:y.tar:@0", "oci:layout:v1",
		"oci:a:b:c@" + string(l.Index().Digest),
	} {
		img, err := find(t, mustParse(t, s, Config{}), "")
		if strings.Contains(s, "@sha256") {
			if !errors.Is(err, ErrNotFound) {
				t.Errorf("%s: error %v, expected %v", s, err, ErrNotFound)
			}
			continue
		}
		if err != nil || s == "oci:layout:v1" && img.Digest != m.Digest {
			t.Errorf("%s: found %+v (%v)", s, img, err)
		}
	}
	_, err := find(t, mustParse(t, "oci:none:b:c", Config{}), "")
	if err == nil || !strings.Contains(err.Error(), "stat none/index.json") {
		t.Errorf("error %v, expected one about the path before the first colon", err)
	}
}

// TestOtherArchives: the error names the unsupported format.
func TestOtherArchives(t *testing.T) {
	for want, head := range map[string]string{
		"bzip2": "BZh91AY&SY", "xz": "\xfd7zXZ\x00\x00\x04", "lzma": "\x5d\x00\x00\x80\x00", "lz4": "\x04\x22\x4d\x18",
		"lzip": "LZIP\x01", "compress": "\x1f\x9d\x90", "zip": "PK\x03\x04", "7z": "7z\xbc\xaf\x27\x1c",
		"lzop":   "\x89LZO\x00",
		"Snappy": "\xff\x06\x00\x00sNaPpY", "zlib": "\x78\x9c",
	} {
		file := []byte(head + strings.Repeat("x", 2000))
		for _, kind := range []string{"oci-archive", "docker-archive"} {
			_, err := findIn(t, kind, file, "", "")
			if err == nil || !strings.Contains(err.Error(), "is compressed with "+want+", expected") {
				t.Errorf("%s: error %v, expected it to name %s", kind, err, want)
			}
		}
	}
}

// TestPaddedArchives: gzip accepts zeros behind its data, and so does an archive.
func TestPaddedArchives(t *testing.T) {
	a := Tar(Reg("a", "1"))
	archive := Tar(Reg("a", string(a)), Reg("c", configOf(t, ocitest.LinuxAMD64, a)),
		Reg("manifest.json", jsonOf(t, saved{{Config: "c", Layers: strs{"a"}}})))
	gz := ocitest.Pack(t, archive, ocitest.Gzip)
	for name, c := range map[string]struct {
		file []byte
		ok   bool
	}{
		"plain":          {archive, true},
		"gzip":           {gz, true},
		"with zeros":     {append(bytes.Clone(gz), make([]byte, 512)...), true},
		"with garbage":   {append(bytes.Clone(gz), "garbage"...), false},
		"cut":            {gz[:len(gz)-9], false},
		"cut at the end": {archive[:len(archive)-1024], true}, // without the end marker, which tar accepts
		"zeros behind":   {append(bytes.Clone(archive), make([]byte, 10240)...), true},
		"twice":          {append(bytes.Clone(archive), archive...), true},
	} {
		if img, err := findIn(t, "docker-archive", c.file, "", ""); (err == nil) != c.ok {
			t.Errorf("%s: found %+v (%v)", name, img, err)
		}
	}
}
