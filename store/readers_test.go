package store

import (
	"bytes"
	"context"
	"errors"
	"io"
	"os"
	"path/filepath"
	"slices"
	"testing"

	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/identity"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/daxfs/daxfs-snapshotter/converter/source"
	"github.com/daxfs/daxfs-snapshotter/pool"
	"github.com/daxfs/daxfs-snapshotter/pool/lease"
)

// streamed stores layers and returns their image with its diff IDs.
func (k *kit) streamed(name string, tars ...[]byte) (Image, []digest.Digest) {
	k.t.Helper()
	img := Image{Holder: "pin/" + name, Name: name}
	var ids []digest.Digest
	for _, b := range tars {
		st, err := k.AddBlob(k.t.Context(), blobOf(b))
		k.must(err)
		img.Layers = append(img.Layers, Layer{Key: st.Key})
		ids = append(ids, st.DiffID)
	}
	img.Key = ImageKey(img.layerKeys())
	k.must(k.rebuildOne(k.t.Context(), img))
	return img, ids
}

// documents returns the documents that a reader finds, by chain ID.
func (k *kit) documents() map[digest.Digest]*Document {
	k.t.Helper()
	c, err := pool.ReadCatalogue(k.region)
	k.must(err)
	out := map[digest.Digest]*Document{}
	for _, m := range c.Images {
		raw, err := pool.ReadDocument(k.region, m)
		k.must(err)
		d, err := ParseDocument(raw)
		k.must(err)
		out[d.ChainID] = d
	}
	return out
}

// TestPublish publishes an image with its prefixes, while containerd's names come and go.
func TestPublish(t *testing.T) {
	k := newKit(t, func(c *Config) { c.Readers = &Readers{Mode: ReadersKeep} })
	tars := [][]byte{
		makeTar(file{"a", random(1, 5000)}), makeTar(file{"b", random(2, 6000)}),
		makeTar(file{"c", random(3, 7000)}),
	}
	_, ids := k.streamed("web", tars...)
	oci := ociImage(t, "docker.io/library/web:1", ids, true)
	k.must(k.Publish(t.Context(), []OCIImage{oci, ociImage(t, "docker.io/library/other:1", diffIDs("x"), false)}))
	docs := k.documents()
	if len(docs) != 3 {
		t.Fatalf("%d documents, expected one for each prefix", len(docs))
	}
	for n := 1; n <= 3; n++ {
		d := docs[identity.ChainID(ids[:n])]
		if d == nil || !slices.Equal(d.DiffIDs, ids[:n]) || len(d.Images) != n/3 {
			t.Errorf("prefix of %d layers: %+v", n, d)
		}
	}
	// Without a change the generation stays.
	gen := k.pool.Generation()
	k.must(k.Publish(t.Context(), []OCIImage{oci}))
	k.must(k.Publish(t.Context(), nil)) // containerd does not answer
	if now := k.pool.Generation(); now != gen {
		t.Errorf("generation %d, expected %d", now, gen)
	}
	top := func() int { return len(k.documents()[identity.ChainID(ids)].Images) }
	if top() != 1 {
		t.Error("the name was lost while containerd did not answer")
	}
	k.must(k.Publish(t.Context(), []OCIImage{}))
	if top() != 0 {
		t.Error("the name was not removed")
	}
	// With keep, only a command removes images; that also holds for an owner without a configuration.
	k.must(k.Unpin("web"))
	k.sweep()
	k.cfg.Readers = nil
	k.restart(nil)
	k.sweep()
	if n := len(k.documents()); n != 3 {
		t.Fatalf("%d images after a sweep, expected that they are kept", n)
	}
	k.must(k.Sweep(ByCommand(t.Context()), nil, false))
	if n := len(k.documents()); n != 0 {
		t.Errorf("%d images after a command, expected none", n)
	}
}

// TestNameMoves moves a name between two images: in no generation does a reader find it in both.
func TestNameMoves(t *testing.T) {
	k := newKit(t, func(c *Config) { c.Readers = &Readers{Mode: ReadersKeep} })
	_, ids1 := k.streamed("one", makeTar(file{"a", random(1, 5000)}))
	_, ids2 := k.streamed("two", makeTar(file{"b", random(2, 6000)}))
	one, two := ociImage(t, "docker.io/library/web:1", ids1, false), ociImage(t, "docker.io/library/web:1", ids2, false)
	done, ended := make(chan struct{}), make(chan struct{})
	looks := 0
	go func() {
		defer close(ended)
		for {
			select {
			case <-done:
				return
			default:
			}
			names := 0
			c, err := pool.ReadCatalogue(k.region)
			if err != nil {
				continue // it is being written
			}
			for _, m := range c.Images {
				raw, err := pool.ReadDocument(k.region, m)
				if err != nil {
					names = 0 // replaced meanwhile
					break
				}
				d, err := ParseDocument(raw)
				if err != nil {
					t.Error(err)
					return
				}
				names += len(d.Images)
			}
			looks++
			if names > 1 {
				t.Errorf("%d images have the name", names)
				return
			}
		}
	}()
	for range 30 {
		k.must(k.Publish(t.Context(), []OCIImage{one}))
		k.must(k.Publish(t.Context(), []OCIImage{two}))
	}
	close(done)
	<-ended
	if looks == 0 {
		t.Error("nobody has looked")
	}
}

// TestLeaseInOwnPool refuses lease regions inside the pool, which would overwrite each other.
func TestLeaseInOwnPool(t *testing.T) {
	k := newKit(t, nil)
	spec := k.region.Info().Path + "@2097152+8192"
	k.must(k.Close())
	k.cfg.Readers = &Readers{Mode: ReadersLeases, Leases: []string{spec}}
	if s, err := Open(t.Context(), k.cfg); !errors.Is(err, pool.ErrInvalid) {
		t.Errorf("%v, %v; expected ErrInvalid", s, err)
	}
	k.cfg.Readers = &Readers{Mode: ReadersNone}
	var err error
	k.Store, err = Open(t.Context(), k.cfg)
	k.must(err)
}

// TestSweepLeased removes an image that a reader uses: only this reader keeps it, even after the owner
// restarts, and it disappears once it is released.
func TestSweepLeased(t *testing.T) {
	region := filepath.Join(t.TempDir(), "a.lease")
	if err := os.WriteFile(region, make([]byte, lease.MinSize), 0o600); err != nil {
		t.Fatal(err)
	}
	k := newKit(t, func(c *Config) { c.Readers = &Readers{Mode: ReadersLeases, Leases: []string{region}} })
	img, ids := k.streamed("web", makeTar(file{"a", random(1, 5000)}), makeTar(file{"b", random(2, 6000)}))
	k.must(k.Publish(t.Context(), nil))
	for _, short := range []bool{false, true} {
		k.must(k.Sweep(t.Context(), nil, short))
		if n := len(k.documents()); n != 2 {
			t.Fatalf("%d images, expected that the prefix stays beside the image, short of memory: %t", n, short)
		}
	}
	l, err := lease.Open(region, lease.Reader{Name: "guest", Machine: [16]byte{1}})
	k.must(err)
	defer l.Close()
	m, err := k.pool.Image(img.Key)
	k.must(err)
	if _, err := l.Claim(k.pool.ID(), m); err != nil {
		t.Fatal(err)
	}
	k.must(k.Unpin("web"))
	k.sweep()
	waits := func() {
		t.Helper()
		if n := len(k.documents()); n != 0 || !k.pool.Unlisted(img.Key) {
			t.Fatalf("%d images are listed, expected none", n)
		}
		users, err := k.LeaseUsers()
		if err != nil || len(users) != 1 || users[0].Reader != "guest" ||
			!slices.Equal(users[0].Images, []string{img.Key}) {
			t.Errorf("used by %+v, %v", users, err)
		}
	}
	waits()
	k.restart(nil)
	k.sweep()
	waits()
	k.must(k.Publish(t.Context(), nil)) // announces only listed images
	waits()
	// Somebody wants it again, so all readers find it again.
	k.streamed("web", makeTar(file{"a", random(1, 5000)}), makeTar(file{"b", random(2, 6000)}))
	if k.pool.Unlisted(img.Key) || k.documents()[identity.ChainID(ids)] == nil {
		t.Error("the image is not listed again")
	}
	k.must(k.Unpin("web"))
	k.sweep()
	waits()
	k.must(l.Release(k.pool.ID(), m))
	k.sweep()
	if len(k.pool.Images()) != 0 {
		t.Errorf("%d images are left", len(k.pool.Images()))
	}
	if _, err := k.Release("guest", false); err != nil {
		t.Error(err)
	}
}

// TestPutTellsReaders: readers see name and manifest of an image put by hand while it is held.
func TestPutTellsReaders(t *testing.T) {
	k := newKit(t, func(c *Config) { c.Readers = &Readers{Mode: ReadersKeep} })
	tar := makeTar(file{"a", random(1, 5000)})
	id := digest.FromBytes(tar)
	oci := ociImage(t, "example.org/web:1", []digest.Digest{id}, false)
	src := &source.Image{
		Name: "example.org/web:1", Manifest: oci.Blobs[0], ManifestType: oci.Target.MediaType, Config: oci.Blobs[1],
		Layers: []source.Layer{blobLayer(tar)},
	}
	put := func(name string) {
		t.Helper()
		_, err := k.Put(t.Context(), src, name)
		k.must(err)
	}
	// told returns the names that readers find, as NAMESPACE NAME.
	told := func(found []OCIImage) (names []string) {
		t.Helper()
		k.must(k.Publish(t.Context(), found))
		for _, o := range k.documents()[id].Images {
			if o.Target.Digest != oci.Target.Digest {
				t.Errorf("%s is %s, expected %s", o.Name, o.Target.Digest, oci.Target.Digest)
			}
			names = append(names, o.Namespace+" "+o.Name)
		}
		return names
	}
	expect := func(when string, got []string, want ...string) {
		t.Helper()
		if !slices.Equal(got, want) {
			t.Errorf("%s: %q, expected %q", when, got, want)
		}
	}
	put("example.org/web:1")
	expect("put", told(nil), "daxfs.put example.org/web:1")
	expect("in containerd, too", told([]OCIImage{oci}), "daxfs.put example.org/web:1", "default example.org/web:1")
	put("web") // a name of the user's own
	put("Not a reference")
	expect("several pins", told(nil), "daxfs.put example.org/web:1", "daxfs.put web", "default example.org/web:1")
	k.restart(nil)
	expect("another process", told([]OCIImage{}), "daxfs.put example.org/web:1", "daxfs.put web")
	k.must(k.Unpin("web"))
	expect("unpinned", told(nil), "daxfs.put example.org/web:1")
	// The name moves to an image of another tree without a manifest.
	bare := &source.Image{Layers: []source.Layer{blobLayer(makeTar(file{"b", random(2, 100)}))}}
	_, err := k.Put(t.Context(), bare, "example.org/web:1")
	k.must(err)
	expect("the reference of its own is left", told(nil), "daxfs.put example.org/web:1")
	k.must(k.Unpin("Not a reference"))
	expect("nothing holds it", told(nil))
}

// blobLayer is a layer of a source.
func blobLayer(tar []byte) source.Layer {
	open := func(context.Context) (io.ReadCloser, error) { return io.NopCloser(bytes.NewReader(tar)), nil }
	return source.Layer{DiffID: digest.FromBytes(tar), Desc: descriptor(ocispec.MediaTypeImageLayer, tar), Open: open}
}
