package store

import (
	"encoding/json"
	"errors"
	"strings"
	"testing"

	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/identity"
	"github.com/opencontainers/image-spec/specs-go"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/daxfs/daxfs-snapshotter/pool"
)

func toJSON(t testing.TB, v any) []byte {
	t.Helper()
	raw, err := json.Marshal(v)
	if err != nil {
		t.Fatal(err)
	}
	return raw
}

func descriptor(mediaType string, b []byte) ocispec.Descriptor {
	return ocispec.Descriptor{MediaType: mediaType, Digest: digest.FromBytes(b), Size: int64(len(b))}
}

// ociImage makes the blobs of an OCI image with layers of these diff IDs; inIndex puts its manifest
// into an index, behind that of another platform.
func ociImage(t testing.TB, name string, ids []digest.Digest, inIndex bool) OCIImage {
	t.Helper()
	config := toJSON(t, ocispec.Image{RootFS: ocispec.RootFS{Type: "layers", DiffIDs: ids}})
	m := ocispec.Manifest{
		Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: ocispec.MediaTypeImageManifest,
		Config: descriptor(ocispec.MediaTypeImageConfig, config),
	}
	for _, id := range ids {
		m.Layers = append(m.Layers, descriptor(ocispec.MediaTypeImageLayerGzip, []byte("blob of "+id)))
	}
	manifest := toJSON(t, m)
	out := OCIImage{
		Namespace: "default", Name: name, Target: descriptor(ocispec.MediaTypeImageManifest, manifest),
		Blobs: [][]byte{manifest, config},
	}
	if inIndex {
		index := toJSON(t, ocispec.Index{
			Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: ocispec.MediaTypeImageIndex,
			Manifests: []ocispec.Descriptor{descriptor(ocispec.MediaTypeImageManifest, []byte("another")), out.Target},
		})
		out.Target, out.Blobs = descriptor(ocispec.MediaTypeImageIndex, index), append(out.Blobs, index)
	}
	return out
}

func diffIDs(names ...string) (ids []digest.Digest) {
	for _, n := range names {
		ids = append(ids, digest.FromString(n))
	}
	return ids
}

func someDocument(t testing.TB) *Document {
	ids := diffIDs("a", "b")
	return &Document{ChainID: identity.ChainID(ids), DiffIDs: ids, Images: []OCIImage{
		ociImage(t, "docker.io/library/web:1", ids, true), ociImage(t, "docker.io/library/app:1", ids, false),
	}}
}

func TestDocumentRoundTrip(t *testing.T) {
	d := someDocument(t)
	raw, err := d.Marshal()
	if err != nil {
		t.Fatal(err)
	}
	got, err := ParseDocument(raw)
	if err != nil {
		t.Fatal(err)
	}
	if got.ChainID != d.ChainID || len(got.Images) != 2 || got.Images[0].Name != "docker.io/library/app:1" {
		t.Errorf("read %+v", got)
	}
	d.Images[0], d.Images[1] = d.Images[1], d.Images[0]
	if again, err := d.Marshal(); err != nil || string(again) != string(raw) {
		t.Errorf("the bytes depend on the order of images: %v", err)
	}
	p, err := got.Images[1].Parts()
	if err != nil || p.Index == nil || len(p.Layers) != 2 ||
		p.Manifest.Desc.MediaType != ocispec.MediaTypeImageManifest {
		t.Errorf("parts %+v, %v", p, err)
	}
}

func TestDocumentRefuses(t *testing.T) {
	for name, change := range map[string]func(d *Document){
		"no layers":             func(d *Document) { d.DiffIDs = nil },
		"another chain ID":      func(d *Document) { d.ChainID = digest.FromString("x") },
		"diff ID":               func(d *Document) { d.DiffIDs[0] = "sha256:00" },
		"diff IDs of others":    func(d *Document) { d.Images[0] = ociImage(t, "web:1", diffIDs("a", "c"), false) },
		"image twice":           func(d *Document) { d.Images[1] = d.Images[0] },
		"namespace":             func(d *Document) { d.Images[0].Namespace = "../x" },
		"no namespace":          func(d *Document) { d.Images[0].Namespace = "" },
		"name":                  func(d *Document) { d.Images[0].Name = "Not a reference" },
		"long name":             func(d *Document) { d.Images[0].Name = strings.Repeat("a", 2000) },
		"target":                func(d *Document) { d.Images[0].Target.Digest = digest.FromString("x") },
		"target size":           func(d *Document) { d.Images[0].Target.Size++ },
		"target is an index":    func(d *Document) { d.Images[1].Target.MediaType = ocispec.MediaTypeImageIndex },
		"target is a manifest":  func(d *Document) { d.Images[0].Target.MediaType = ocispec.MediaTypeImageManifest },
		"target is a layer":     func(d *Document) { d.Images[0].Target.MediaType = ocispec.MediaTypeImageLayer },
		"changed manifest":      func(d *Document) { d.Images[0].Blobs[0][5] ^= 1 },
		"changed configuration": func(d *Document) { d.Images[0].Blobs[1][5] ^= 1 },
		"changed index":         func(d *Document) { d.Images[0].Blobs[2][5] ^= 1 },
		"no configuration":      func(d *Document) { d.Images[1].Blobs = d.Images[1].Blobs[:1] },
		"one blob more":         func(d *Document) { d.Images[1].Blobs = append(d.Images[1].Blobs, []byte("x")) },
		"index leads to itself": func(d *Document) { d.Images[0].Blobs = d.Images[0].Blobs[2:] },
		"many images":           func(d *Document) { d.Images = make([]OCIImage, maxDocumentImages+1) },
	} {
		d := someDocument(t)
		change(d)
		if _, err := d.Marshal(); !errors.Is(err, pool.ErrInvalid) {
			t.Errorf("%s: marshal: %v, expected ErrInvalid", name, err)
		}
		if got, err := ParseDocument(toJSON(t, d)); !errors.Is(err, pool.ErrCorrupt) {
			t.Errorf("%s: %+v, %v; expected ErrCorrupt", name, got, err)
		}
	}
	for _, raw := range []string{
		"", "null", "[]", "{}", `{"diffIDs":{}}`, "\xff",
		strings.Repeat(" ", pool.MaxDocument+1),
	} {
		if got, err := ParseDocument([]byte(raw)); !errors.Is(err, pool.ErrCorrupt) {
			t.Errorf("%.20q: %+v, %v; expected ErrCorrupt", raw, got, err)
		}
	}
}

// FuzzDocument parses arbitrary bytes without a panic; accepted documents are valid and marshal again.
func FuzzDocument(f *testing.F) {
	raw, err := someDocument(f).Marshal()
	if err != nil {
		f.Fatal(err)
	}
	f.Add(raw)
	f.Add([]byte(`{"chainID":"","diffIDs":[]}`))
	f.Fuzz(func(t *testing.T, raw []byte) {
		d, err := ParseDocument(raw)
		if err != nil {
			if !errors.Is(err, pool.ErrCorrupt) {
				t.Fatalf("untyped error %v", err)
			}
			return
		}
		if d.ChainID != identity.ChainID(d.DiffIDs) {
			t.Fatalf("accepted chain ID %q of %q", d.ChainID, d.DiffIDs)
		}
		again, err := d.Marshal()
		if err != nil {
			t.Fatal(err)
		}
		if _, err := ParseDocument(again); err != nil {
			t.Fatal(err)
		}
	})
}
