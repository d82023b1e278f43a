package converter_test

import (
	"bytes"
	"encoding/binary"
	"encoding/json"
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/klauspost/compress/zstd"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/daxfs/daxfs-snapshotter/converter"
	"github.com/daxfs/daxfs-snapshotter/internal/ocitest"
	. "github.com/daxfs/daxfs-snapshotter/internal/treetest"
)

// The images of these tests are modelled on bug reports for other tools.

const (
	ociManifest    = ocispec.MediaTypeImageManifest
	dockerManifest = "application/vnd.docker.distribution.manifest.v2+json"
	dockerConfig   = "application/vnd.docker.container.image.v1+json"
	dockerLayer    = "application/vnd.docker.image.rootfs.diff.tar"
	ociLayer       = ocispec.MediaTypeImageLayer
)

// doc is a JSON document that a test modifies.
type doc = map[string]any

// layerCase is a blob, its tar, and the claimed media type.
type layerCase struct {
	blob, tar []byte
	mediaType string
	diffID    string // replaces the correct one
}

// imageCase is an odd image.
type imageCase struct {
	layers                   []layerCase
	manifestType, configType string // OCI types if empty
	config, manifest, entry  func(doc)
}

// add adds the image to a layout and returns its entry for an index.
func (c imageCase) add(t *testing.T, l *ocitest.Layout) doc {
	t.Helper()
	manifestType, configType := c.manifestType, c.configType
	if manifestType == "" {
		manifestType = ociManifest
	}
	if configType == "" {
		configType = ocispec.MediaTypeImageConfig
	}
	describe := func(d ocispec.Descriptor) doc {
		return doc{"mediaType": d.MediaType, "digest": d.Digest, "size": d.Size}
	}
	apply := func(d doc, f func(doc)) doc {
		if f != nil {
			f(d)
		}
		return d
	}
	ids, layers := []string{}, []doc{}
	for _, y := range c.layers {
		id := y.diffID
		if id == "" {
			id = digest.FromBytes(y.tar).String()
		}
		ids, layers = append(ids, id), append(layers, describe(l.Blob(y.mediaType, y.blob)))
	}
	config := doc{"architecture": "amd64", "os": "linux", "rootfs": doc{"type": "layers", "diff_ids": ids}}
	manifest := doc{
		"schemaVersion": 2, "mediaType": manifestType, "layers": layers,
		"config": describe(l.JSON(configType, apply(config, c.config))),
	}
	return apply(describe(l.JSON(manifestType, apply(manifest, c.manifest))), c.entry)
}

// without removes fields.
func without(fields ...string) func(doc) {
	return func(d doc) {
		for _, f := range fields {
			delete(d, f)
		}
	}
}

// with sets a field.
func with(field string, v any) func(doc) { return func(d doc) { d[field] = v } }

// written writes index.json with the entries.
func written(t *testing.T, l *ocitest.Layout, entries ...doc) string {
	t.Helper()
	b, err := json.Marshal(doc{"schemaVersion": 2, "manifests": entries})
	if err == nil {
		err = os.WriteFile(filepath.Join(l.Dir, "index.json"), b, 0o644)
	}
	if err != nil {
		t.Fatal(err)
	}
	return l.Dir
}

// wants converts a source and compares the names in the image, or the error.
func wants(t *testing.T, name, source, want string) {
	t.Helper()
	image, _, err := convert(t, source, converter.Options{})
	if message, isError := strings.CutPrefix(want, "error: "); isError {
		if err == nil || !strings.Contains(err.Error(), message) {
			t.Errorf("%s: error %v, expected one that says %q", name, err, message)
		}
		return
	}
	if err != nil {
		t.Errorf("%s: %v, expected the files %q", name, err, want)
		return
	}
	tree, err := readTree(image)
	if err != nil {
		t.Fatal(err)
	}
	var names []string
	for _, e := range tree {
		if e.Path != "." {
			names = append(names, e.Path)
		}
	}
	slices.Sort(names)
	if got := strings.Join(names, " "); got != want {
		t.Errorf("%s: files %q, expected %q", name, got, want)
	}
}

// TestLayersOfOthers: layers with a wrong media type or a rare compression.
func TestLayersOfOthers(t *testing.T) {
	a, b := Tar(Reg("a", "1")), Tar(Reg("b", "2"))
	gz, zs := ocitest.Pack(t, a, ocitest.Gzip), ocitest.Pack(t, a, ocitest.Zstd)
	named := slices.Concat(gz[:3], []byte{gz[3] | 8}, gz[4:10], []byte("layer.tar\x00"), gz[10:])
	skip := binary.LittleEndian.AppendUint32(binary.LittleEndian.AppendUint32(nil, 0x184D2A50), 7)
	skip = append(skip, "padding"...)
	twoFrames := slices.Concat(ocitest.Pack(t, a[:600], ocitest.Zstd), skip, ocitest.Pack(t, a[600:], ocitest.Zstd))
	twoMembers := slices.Concat(ocitest.Pack(t, a[:700], ocitest.Gzip), ocitest.Pack(t, a[700:], ocitest.Gzip))
	one := func(blob []byte, mediaType string) imageCase {
		return imageCase{layers: []layerCase{{blob, a, mediaType, ""}}}
	}
	with := func(blobs ...layerCase) imageCase { return imageCase{layers: blobs} }
	la, lb := layerCase{gz, a, ociLayer + "+gzip", ""}, layerCase{b, b, ociLayer, ""}
	empty := layerCase{ocitest.Pack(t, make([]byte, 1024), ocitest.Gzip), make([]byte, 1024), ociLayer + "+gzip", ""}
	nothing := layerCase{ocitest.Pack(t, nil, ocitest.Gzip), nil, ociLayer + "+gzip", ""}
	long := Tar(Reg("a", strings.Repeat("0123456789abcdef", 1<<18)))
	far := func(size int) imageCase { return with(layerCase{window(t, long, size), long, ociLayer + "+zstd", ""}) }
	as := func(diffID string) layerCase { return layerCase{a, a, ociLayer, diffID} }
	for name, c := range map[string]struct {
		image imageCase
		want  string
	}{
		"gzip type, plain tar": {one(a, dockerLayer+".gzip"), "a"},
		"plain type, gzip":     {one(gz, ociLayer), "error: looks like gzip"},
		"gzip type, zstd":      {one(zs, ociLayer+"+gzip"), "a"},
		"zstd type, gzip":      {one(gz, ociLayer+"+zstd"), "a"},
		"docker's zstd type":   {one(zs, dockerLayer+".zstd"), "a"},
		"no type":              {one(zs, ""), "a"},
		"foreign, and there":   {one(gz, "application/vnd.docker.image.rootfs.foreign.diff.tar.gzip"), "a"},
		"nondistributable, and there": {
			one(gz, "application/vnd.oci.image.layer.nondistributable.v1.tar+gzip"),
			"a",
		},
		"gzip with zeros":               {one(append(bytes.Clone(gz), make([]byte, 17)...), ociLayer+"+gzip"), "a"},
		"gzip with garbage":             {one(append(bytes.Clone(gz), "garbage!"...), ociLayer+"+gzip"), "a"},
		"gzip, two members":             {one(twoMembers, ociLayer+"+gzip"), "a"},
		"gzip, an empty member":         {one(append(bytes.Clone(gz), nothing.blob...), ociLayer+"+gzip"), "a"},
		"gzip, cut":                     {one(gz[:len(gz)-8], ociLayer+"+gzip"), "error: EOF"},
		"gzip with a name":              {one(named, ociLayer+"+gzip"), "a"},
		"zstd, a frame to skip first":   {one(slices.Concat(skip, zs), ociLayer+"+zstd"), "a"},
		"zstd, a frame to skip last":    {one(slices.Concat(zs, skip), ociLayer+"+zstd"), "a"},
		"zstd, two frames":              {one(twoFrames, ociLayer+"+zstd"), "a"},
		"zstd, cut":                     {one(zs[:len(zs)-4], ociLayer+"+zstd"), "error: zstd"},
		"zstd with garbage":             {one(append(bytes.Clone(zs), "garbage!"...), ociLayer+"+zstd"), "a"},
		"zstd with a window of 64 MiB":  {far(64 << 20), "a"},
		"zstd with a window of 256 MiB": {far(256 << 20), "error: window"},
		"xz":                            {one([]byte("\xfd7zXZ\x00...."), dockerLayer), "error: xz"},
		"bzip2":                         {one([]byte("BZh91AY&SY.."), ""), "error: bzip2"},
		"no layers":                     {imageCase{}, ""},
		"no layers, no rootfs":          {imageCase{config: without("rootfs")}, ""},
		"a layer, no rootfs": {
			imageCase{layers: []layerCase{la}, config: without("rootfs")},
			"error: diff ID",
		},
		"a layer three times":    {with(la, la, lb, la), "a b"},
		"docker's empty layer":   {with(empty, la, empty), "a"},
		"gzip of nothing":        {with(nothing, la), "a"},
		"a blob of nothing":      {with(layerCase{nil, nil, ociLayer, ""}, la), "error: size 0"},
		"diff IDs of each other": {with(as(digest.FromBytes(b).String()), lb), "error: diff ID mismatch"},
		"a diff ID in capitals":  {with(as(strings.ToUpper(digest.FromBytes(a).String()))), "error: diff ID"},
		"a diff ID of SHA-512":   {with(as(digest.SHA512.FromBytes(a).String())), "a"},
		"2 diff IDs for a layer": {
			imageCase{layers: []layerCase{la}, config: diffIDs(la, la)},
			"error: 2 diff IDs",
		},
		"artifactType, subject, and so on": {imageCase{layers: []layerCase{la}, manifest: referrer}, "a"},
		"history with empty layers":        {imageCase{layers: []layerCase{la}, config: history}, "a"},
	} {
		l := ocitest.NewLayout(t, t.TempDir())
		wants(t, name, "oci:"+written(t, l, c.image.add(t, l)), c.want)
	}
}

// diffIDs sets the diff IDs of a configuration.
func diffIDs(layers ...layerCase) func(doc) {
	var ids []digest.Digest
	for _, y := range layers {
		ids = append(ids, digest.FromBytes(y.tar))
	}
	return with("rootfs", doc{"type": "layers", "diff_ids": ids})
}

func referrer(m doc) {
	m["artifactType"], m["annotations"] = "application/vnd.example", doc{"x": "y"}
	m["subject"] = doc{"mediaType": ociManifest, "digest": digest.FromString("subject"), "size": 7}
}

func history(c doc) {
	c["history"] = []doc{{"empty_layer": true}, {"created_by": "x"}, {"empty_layer": true}}
}

// window compresses b with zstd and the given window size.
func window(t *testing.T, b []byte, size int) []byte {
	t.Helper()
	var out bytes.Buffer
	w, err := zstd.NewWriter(&out, zstd.WithWindowSize(size))
	if err == nil {
		_, err = w.Write(b)
		err = errors.Join(err, w.Close())
	}
	if err != nil {
		t.Fatal(err)
	}
	return out.Bytes()
}

// TestManifestsOfOthers: incomplete documents, and documents of old tools.
func TestManifestsOfOthers(t *testing.T) {
	a := Tar(Reg("a", "1"))
	layers := []layerCase{{ocitest.Pack(t, a, ocitest.Gzip), a, dockerLayer + ".gzip", ""}}
	capitals := func(d doc) { d["digest"] = "sha256:" + strings.ToUpper(d["digest"].(digest.Digest).Encoded()) }
	for name, c := range map[string]struct {
		image imageCase
		want  string
	}{
		"octets": {
			imageCase{manifestType: dockerManifest, configType: "application/octet-stream"},
			"a",
		},
		"HTML":                    {imageCase{manifestType: dockerManifest, configType: "text/html"}, "a"},
		"JSON":                    {imageCase{manifestType: dockerManifest, configType: "application/json"}, "a"},
		"an empty type":           {imageCase{manifestType: dockerManifest, manifest: noConfigType}, "a"},
		"a manifest without type": {imageCase{manifest: without("mediaType")}, "a"},
		"one of docker": {
			imageCase{manifestType: dockerManifest, configType: dockerConfig, manifest: without("mediaType")}, "a",
		},
		"no schema version":     {imageCase{manifest: without("schemaVersion")}, "a"},
		"an entry without type": {imageCase{entry: without("mediaType")}, "a"},
		"an entry of size 0":    {imageCase{entry: with("size", 0)}, "a"},
		"a digest in capitals":  {imageCase{entry: capitals}, "error: digest"},
		"a helm chart": {
			imageCase{configType: "application/vnd.helm.config.v1+json"},
			"error: not a container",
		},
		"schema 1": {imageCase{manifest: with("fsLayers", []doc{})}, "error: schema 1"},
	} {
		c.image.layers = layers
		l := ocitest.NewLayout(t, t.TempDir())
		dir := written(t, l, c.image.add(t, l))
		wants(t, name, "oci:"+dir, c.want)
		file := filepath.Join(t.TempDir(), "layout.tar")
		l.Archive(file)
		wants(t, name+" in an archive", "oci-archive:"+file, c.want)
	}
}

func noConfigType(m doc) { m["config"].(doc)["mediaType"] = "" }

// TestLayoutsOfOthers: layouts that lack a file, or hold several images.
func TestLayoutsOfOthers(t *testing.T) {
	image := func(name string) imageCase {
		tar := Tar(Reg(name, name))
		return imageCase{layers: []layerCase{{tar, tar, ociLayer, ""}}}
	}
	l := ocitest.NewLayout(t, t.TempDir())
	a := image("a").add(t, l)
	dir := written(t, l, a)
	if err := os.Remove(dir + "/oci-layout"); err != nil {
		t.Fatal(err)
	}
	wants(t, "no oci-layout", "oci:"+dir, "a")
	if err := os.WriteFile(dir+"/oci-layout", []byte(`{"imageLayoutVersion":"9.9.9"}`), 0o644); err != nil {
		t.Fatal(err)
	}
	wants(t, "another version", "oci:"+dir, "a")
	index := func(mediaType string, entries ...doc) doc {
		d := l.JSON(mediaType, doc{"schemaVersion": 2, "mediaType": mediaType, "manifests": entries})
		return doc{"mediaType": mediaType, "digest": d.Digest, "size": d.Size}
	}
	const dockerIndex = "application/vnd.docker.distribution.manifest.list.v2+json"
	wants(t, "a manifest list", "oci:"+written(t, l, index(dockerIndex, a)), "a")
	b := image("b").add(t, l)
	a["platform"], b["platform"] = doc{"os": "linux", "architecture": "s390x"},
		doc{"os": "linux", "architecture": "amd64"}
	gone := doc{"mediaType": ociManifest, "digest": digest.FromString("gone"), "size": 7}
	wants(t, "others missing", "oci:"+written(t, l, index(ocispec.MediaTypeImageIndex, gone, a, b)), "b")
	windows := doc{"mediaType": ociManifest, "digest": a["digest"], "size": a["size"]}
	windows["platform"] = doc{"os": "windows", "architecture": "amd64", "os.version": "10.0.17763.1"}
	wants(t, "windows first", "oci:"+written(t, l, index(ocispec.MediaTypeImageIndex, windows, b)), "b")
	if err := os.Remove(dir + "/index.json"); err != nil {
		t.Fatal(err)
	}
	wants(t, "no index.json", "oci:"+dir, "error: index.json")
}
