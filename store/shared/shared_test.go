package shared_test

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/identity"
	"github.com/opencontainers/image-spec/specs-go"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/sys/unix"

	"github.com/daxfs/daxfs-snapshotter/daxfs"
	"github.com/daxfs/daxfs-snapshotter/internal/testns"
	"github.com/daxfs/daxfs-snapshotter/mount"
	"github.com/daxfs/daxfs-snapshotter/mount/drivers"
	"github.com/daxfs/daxfs-snapshotter/pool"
	"github.com/daxfs/daxfs-snapshotter/pool/lease"
	"github.com/daxfs/daxfs-snapshotter/pool/region"
	"github.com/daxfs/daxfs-snapshotter/store"
	"github.com/daxfs/daxfs-snapshotter/store/shared"
)

func TestMain(m *testing.M) {
	flag.Parse()
	if os.Getenv(childEnv) != "" {
		os.Exit(child())
	}
	os.Exit(testns.Main(m))
}

// owner is a pool with another owner.
type owner struct {
	*pool.Pool
	t    *testing.T
	mem  region.Region
	path string
}

func newOwner(t *testing.T) *owner {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("mounts file systems, which needs root")
	}
	o := &owner{t: t, path: filepath.Join(t.TempDir(), "pool")}
	o.create(false)
	t.Cleanup(o.close)
	return o
}

func (o *owner) create(force bool) {
	o.t.Helper()
	var err error
	o.mem, err = region.Open(region.Config{Kind: region.KindFile, Path: o.path, Size: 64 << 20, Create: true})
	must(o.t, err)
	o.Pool, err = pool.Create(o.mem, o.path+".index", pool.Options{Force: force})
	must(o.t, err)
}

// open opens the existing pool.
func (o *owner) open() {
	o.t.Helper()
	var err error
	o.mem, err = region.Open(region.Config{Kind: region.KindFile, Path: o.path, Size: 64 << 20})
	must(o.t, err)
	o.Pool, err = pool.Open(o.mem, o.path+".index", pool.Options{})
	must(o.t, err)
}

// renew replaces this pool by another one.
func (o *owner) renew() {
	o.t.Helper()
	o.close()
	must(o.t, os.Remove(o.path))
	must(o.t, os.Remove(o.path+".index"))
	o.create(true)
}

func (o *owner) close() { must(o.t, errors.Join(o.Pool.Close(), o.mem.Close())) }

// chainOf returns diff IDs, and their chain ID, for layers with these names.
func chainOf(names ...string) (diffIDs []digest.Digest, chain digest.Digest) {
	for _, name := range names {
		diffIDs = append(diffIDs, digest.FromString(name))
	}
	return diffIDs, identity.ChainID(append([]digest.Digest(nil), diffIDs...))
}

// add adds an image with one file, whose contents are the last of names.
func (o *owner) add(names ...string) digest.Digest {
	o.t.Helper()
	diffIDs, chain := chainOf(names...)
	raw, err := json.Marshal(store.Document{ChainID: chain, DiffIDs: diffIDs})
	must(o.t, err)
	o.addRaw(chain.String(), names[len(names)-1], raw)
	return chain
}

// addNamed adds an OCI image of one layer with the same name.
func (o *owner) addNamed(name string) digest.Digest {
	o.t.Helper()
	ids, chain := chainOf(name)
	blob := func(mediaType string, v any) (ocispec.Descriptor, []byte) {
		raw, err := json.Marshal(v)
		must(o.t, err)
		return ocispec.Descriptor{MediaType: mediaType, Digest: digest.FromBytes(raw), Size: int64(len(raw))}, raw
	}
	layer, _ := blob(ocispec.MediaTypeImageLayerGzip, name)
	config, configBytes := blob(ocispec.MediaTypeImageConfig,
		ocispec.Image{RootFS: ocispec.RootFS{Type: "layers", DiffIDs: ids}})
	target, manifest := blob(ocispec.MediaTypeImageManifest, ocispec.Manifest{
		Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: ocispec.MediaTypeImageManifest, Config: config,
		Layers: []ocispec.Descriptor{layer},
	})
	d := store.Document{ChainID: chain, DiffIDs: ids, Images: []store.OCIImage{
		{
			Namespace: "default", Name: "example.org/" + name + ":1", Target: target,
			Blobs: [][]byte{manifest, configBytes},
		},
	}}
	raw, err := d.Marshal()
	must(o.t, err)
	o.addRaw(chain.String(), name, raw)
	return chain
}

func (o *owner) addRaw(key, body string, document []byte) {
	o.t.Helper()
	ctx := context.Background()
	b := o.Begin()
	defer b.Discard()
	d, err := b.Put(ctx, int64(len(body)), bytes.NewReader([]byte(body)))
	must(o.t, err)
	root := &daxfs.Node{Mode: unix.S_IFDIR | 0o755, Entries: map[string]*daxfs.Node{
		"file": {Mode: unix.S_IFREG | 0o644, Data: d}, "link": {Mode: unix.S_IFLNK | 0o777, Target: "file"},
	}}
	_, err = o.AddImage(ctx, key, root, daxfs.Options{})
	must(o.t, err)
	must(o.t, o.SetDocument(ctx, key, document))
}

// reader is a machine that uses pools of others.
type reader struct {
	*shared.Pools
	t   *testing.T
	cfg shared.Config
}

func newReader(t *testing.T, pools ...string) *reader {
	t.Helper()
	r := &reader{t: t, cfg: shared.Config{Root: filepath.Join(t.TempDir(), "shared"), Drivers: drivers.All()}}
	for _, name := range pools {
		r.cfg.Pools = append(r.cfg.Pools, shared.Source{Name: name})
	}
	r.open()
	t.Cleanup(func() {
		must(t, r.Sweep(context.Background(), func(digest.Digest) bool { return false }))
		for _, s := range r.Status() {
			if s.Mounted > 0 || s.Claimed > 0 {
				t.Errorf("after all: %+v", s)
			}
		}
		must(t, r.Close())
	})
	return r
}

func (r *reader) open() {
	r.t.Helper()
	var err error
	r.Pools, err = shared.Open(context.Background(), r.cfg)
	must(r.t, err)
}

// sees fails the test unless a chain shows the wanted contents.
func (r *reader) sees(chain digest.Digest, want string) {
	r.t.Helper()
	dir, err := r.Lower(context.Background(), chain)
	must(r.t, err)
	if got, err := os.ReadFile(filepath.Join(dir, "link")); err != nil || string(got) != want {
		r.t.Errorf("chain %s shows %q, %v; expected %q", chain, got, err, want)
	}
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func TestLower(t *testing.T) {
	o := newOwner(t)
	base, app := o.add("base"), o.add("base", "app")
	r := newReader(t, o.path)
	r.sees(app, "app")
	r.sees(base, "base")
	if _, none := chainOf("app"); !errors.Is(r.Claim(t.Context(), none), shared.ErrNotFound) {
		t.Error("a chain that the pool lacks was claimed")
	}

	// Later publications appear, too; a restarted reader finds its mounts.
	later := o.add("later")
	if !r.Refresh(t.Context()) {
		t.Error("the new image was not noticed")
	}
	if r.Refresh(t.Context()) {
		t.Error("something new was noticed that is not there")
	}
	r.sees(later, "later")
	dir, err := r.Lower(t.Context(), app)
	must(t, err)
	must(t, r.Close())
	r.open()
	if s := r.Status()[0]; s.Mounted != 3 || s.Claimed != 3 || s.Images != 3 || s.Error != "" {
		t.Errorf("after a restart: %+v", s)
	}
	again, err := r.Lower(t.Context(), app)
	if err != nil || again != dir {
		t.Errorf("after a restart the image is at %q, %v; before it was at %q", again, err, dir)
	}

	// Needed images stay.
	must(t, r.Sweep(t.Context(), func(c digest.Digest) bool { return c == base }))
	if s := r.Status()[0]; s.Mounted != 1 || s.Claimed != 1 {
		t.Errorf("after a sweep: %+v", s)
	}
	f, err := os.Open(filepath.Join(mustDir(r, base), "file"))
	must(t, err)
	defer f.Close()
	must(t, r.Sweep(t.Context(), func(digest.Digest) bool { return false }))
	if s := r.Status()[0]; s.Claimed != 1 {
		t.Errorf("while a file is open: %+v", s)
	}
}

func mustDir(r *reader, chain digest.Digest) string {
	dir, err := r.Lower(context.Background(), chain)
	must(r.t, err)
	return dir
}

// A lying pool affects its own images and no others.
func TestHostile(t *testing.T) {
	good, bad := newOwner(t), newOwner(t)
	fine, ill := good.add("fine"), bad.add("ill")
	r := newReader(t, bad.path, good.path, filepath.Join(t.TempDir(), "missing"))
	if s := r.Status(); s[0].Error != "" || s[1].Error != "" || s[2].Error == "" {
		t.Fatalf("at first: %+v", s)
	}
	_, planted := chainOf("planted")
	for _, c := range []struct{ name, document string }{
		{"no JSON", "{"},
		{"other layers", fmt.Sprintf(`{"chainID": %q, "diffIDs": [%q]}`, planted, digest.FromString("other"))},
		{"no layers", fmt.Sprintf(`{"chainID": %q, "diffIDs": []}`, planted)},
		{"digest that is none", fmt.Sprintf(`{"chainID": %q, "diffIDs": ["sha256:12"]}`, planted)},
	} {
		t.Run("document with "+c.name, func(t *testing.T) {
			bad.addRaw(c.name, "planted", []byte(c.document))
			if err := r.Claim(t.Context(), planted); !errors.Is(err, shared.ErrNotFound) {
				t.Errorf("claim: %v, expected %v", err, shared.ErrNotFound)
			}
			must(t, bad.RemoveImage(t.Context(), c.name))
		})
	}
	good.add("planted")
	r.sees(planted, "planted")

	change := func(at int64, b []byte) {
		t.Helper()
		f, err := os.OpenFile(bad.path, os.O_RDWR, 0)
		must(t, err)
		_, err = f.WriteAt(b, at)
		must(t, errors.Join(err, f.Close()))
	}
	cat, err := pool.ReadCatalogue(bad.mem)
	must(t, err)
	saved := make([]byte, 64<<10)
	_, err = bad.mem.ReadAt(saved, 0)
	must(t, err)
	slot := cat.Geometry.SlotOff(cat.Images[0].Slot)
	for _, c := range []struct {
		name string
		harm func()
		err  error
	}{
		{"slot", func() { change(slot+8, bytes.Repeat([]byte{0xff}, 40)) }, mount.ErrCheck},
		{"superblock", func() { change(1024+20, bytes.Repeat([]byte{0xff}, 8)) }, mount.ErrCheck},
		{"version 1", func() { change(4096+8, []byte{1}); change(8192+8, []byte{1}) }, pool.ErrVersion},
		{"no pool", func() { change(4096, make([]byte, 8192)) }, pool.ErrWiped},
		{"truncated", func() { must(t, os.Truncate(bad.path, 32<<20)) }, shared.ErrSize},
		{"truncated to nothing", func() { must(t, os.Truncate(bad.path, 0)) }, region.ErrSize},
	} {
		t.Run(c.name, func(t *testing.T) {
			raw := make([]byte, 128)
			_, err := bad.mem.ReadAt(raw, slot)
			must(t, err)
			c.harm()
			if _, err := r.Lower(t.Context(), ill); !errors.Is(err, c.err) {
				t.Errorf("error %v, expected %v", err, c.err)
			}
			r.sees(fine, "fine")
			must(t, os.Truncate(bad.path, 64<<20))
			change(0, saved)
			change(slot, raw)
		})
	}
	own := r.cfg
	own.Own, own.Root = good.ID(), filepath.Join(t.TempDir(), "shared")
	p, err := shared.Open(t.Context(), own)
	must(t, err)
	if err := p.Claim(t.Context(), fine); !errors.Is(err, shared.ErrOwn) {
		t.Errorf("own pool: %v", err)
	}
	must(t, p.Close())
}

// A claimed image stays, whatever its owner wants, until the claim ends.
func TestLease(t *testing.T) {
	place := filepath.Join(t.TempDir(), "guest.lease")
	must(t, os.WriteFile(place, make([]byte, lease.MinSize), 0o600))
	regions, err := lease.NewRegions([]string{place})
	must(t, err)
	o := newOwner(t)
	o.SetLeases(regions)
	used, other := o.add("used"), o.add("other")
	r := newReader(t)
	r.cfg.Pools = []shared.Source{{Name: o.path, Lease: place}}
	must(t, r.Close())
	r.open()
	r.sees(used, "used")
	if s := r.Status()[0]; !s.Leased {
		t.Errorf("status %+v, expected a lease", s)
	}

	must(t, o.RemoveImage(t.Context(), other.String()))
	if err := r.Claim(t.Context(), other); !errors.Is(err, shared.ErrNotFound) {
		t.Errorf("claim of a removed image: %v", err)
	}
	var leased *pool.LeasedError
	if err := o.RemoveImage(t.Context(), used.String()); !errors.As(err, &leased) {
		t.Errorf("removal of an image that is in use: %v", err)
	}
	r.sees(used, "used")
	must(t, r.Close())
	r.open()
	r.sees(used, "used")

	// Another reader cannot take the region.
	thief := r.cfg
	thief.Root = filepath.Join(t.TempDir(), "shared")
	p, err := shared.Open(t.Context(), thief)
	must(t, err)
	if err := p.Claim(t.Context(), used); !errors.Is(err, region.ErrBusy) {
		t.Errorf("claim in the lease region of another process: %v, expected %v", err, region.ErrBusy)
	}
	must(t, r.Close())
	if err := p.Claim(t.Context(), used); !errors.Is(err, lease.ErrTaken) {
		t.Errorf("claim in the lease region of another machine: %v, expected %v", err, lease.ErrTaken)
	}
	must(t, p.Close())
	r.open()

	must(t, r.Sweep(t.Context(), func(digest.Digest) bool { return false }))
	must(t, o.RemoveImage(t.Context(), used.String()))
	if err := r.Claim(t.Context(), used); !errors.Is(err, shared.ErrNotFound) {
		t.Errorf("claim after the end of the lease: %v", err)
	}

	// The owner was told wrongly that the reader is gone.
	again := o.add("again")
	r.sees(again, "again")
	_, err = regions.Void(place, false)
	must(t, err)
	if _, err := r.Lower(t.Context(), again); !errors.Is(err, lease.ErrLost) {
		t.Errorf("after the lease was taken away: %v, expected %v", err, lease.ErrLost)
	}
	if s := r.Status()[0]; !strings.Contains(s.Error, lease.ErrLost.Error()) {
		t.Errorf("status %+v, expected %v", s, lease.ErrLost)
	}
	must(t, r.Close())
	r.open() // it takes the region again
	must(t, r.Sweep(t.Context(), func(digest.Digest) bool { return false }))
}

// A pool is replaced under a reader: no mount is mistaken for one of the new pool.
func TestReset(t *testing.T) {
	o := newOwner(t)
	old := o.add("old")
	other := newOwner(t)
	fine := other.add("fine")
	r := newReader(t, o.path, other.path)
	f, err := os.Open(filepath.Join(mustDir(r, old), "file"))
	must(t, err)
	o.renew()
	now := o.add("now")
	if _, err := r.Lower(t.Context(), now); !errors.Is(err, shared.ErrReset) {
		t.Errorf("while a file of the old pool is open: %v, expected %v", err, shared.ErrReset)
	}
	r.sees(fine, "fine")
	must(t, f.Close())
	r.sees(now, "now")
	if err := r.Claim(t.Context(), old); !errors.Is(err, shared.ErrNotFound) {
		t.Errorf("claim of what the old pool had: %v, expected %v", err, shared.ErrNotFound)
	}
}

// A machine without an identity is told why a reboot made it another reader, and the remedy.
func TestNoIdentity(t *testing.T) {
	defer shared.WithoutIdentity()()
	place := filepath.Join(t.TempDir(), "guest.lease")
	must(t, os.WriteFile(place, make([]byte, lease.MinSize), 0o600))
	o := newOwner(t)
	r := newReader(t)
	r.cfg.Pools = []shared.Source{{Name: o.path, Lease: place}}
	must(t, r.Close())
	r.open()
	if s := r.Status()[0]; s.Error != "" || !s.Leased || s.Lease != place {
		t.Errorf("status %+v, expected a lease", s)
	}
	must(t, r.Close())
	must(t, os.RemoveAll(r.cfg.Root)) // as with a root directory in memory
	p, err := shared.Open(t.Context(), r.cfg)
	must(t, err)
	s := p.Status()[0]
	must(t, p.Close())
	for _, want := range []string{"belongs to reader", "daxfs pool release", "/etc/machine-id", "-uuid of QEMU"} {
		if !strings.Contains(s.Error, want) {
			t.Errorf("error %q, expected %q in it", s.Error, want)
		}
	}
	must(t, os.WriteFile(place, make([]byte, lease.MinSize), 0o600))
	r.open()
}

// leased sets up a lease region, and returns its path and the owner's view.
func leased(t *testing.T, o *owner, r *reader) (place string, regions *lease.Regions) {
	t.Helper()
	place = filepath.Join(t.TempDir(), "guest.lease")
	must(t, os.WriteFile(place, make([]byte, lease.MinSize), 0o600))
	regions, err := lease.NewRegions([]string{place})
	must(t, err)
	o.SetLeases(regions)
	must(t, r.Close())
	r.cfg.Pools = []shared.Source{{Name: o.path, Lease: place}}
	r.open()
	return place, regions
}

// claims counts the claims in a lease region.
func claims(t *testing.T, regions *lease.Regions) int {
	t.Helper()
	list, err := regions.List()
	must(t, err)
	return len(list[0].Claims)
}

// A pool is replaced while the reader is not running, as when its owner reboots: the remains of the
// old one are found and named, and end together with their need.
func TestReplaced(t *testing.T) {
	o := newOwner(t)
	gone, again := o.addNamed("gone"), o.add("again")
	r := newReader(t)
	_, regions := leased(t, o, r)
	f, err := os.Open(filepath.Join(mustDir(r, gone), "file"))
	must(t, err)
	must(t, r.Claim(t.Context(), again))
	was := r.Status()[0]
	must(t, r.Close())
	o.renew()
	o.SetLeases(regions)
	now := o.add("now")
	o.add("again")
	r.open()
	if s := r.Status()[0]; !strings.Contains(s.Error, shared.ErrReset.Error()) || s.Claimed != 2 {
		t.Errorf("while a file of the old pool is open: %+v, expected %v", s, shared.ErrReset)
	}
	if _, err := r.Lower(t.Context(), now); !errors.Is(err, shared.ErrReset) {
		t.Errorf("while a file of the old pool is open: %v, expected %v", err, shared.ErrReset)
	}
	must(t, f.Close())
	r.sees(now, "now")
	must(t, r.Claim(t.Context(), again)) // the new pool has it, too
	s := r.Status()[0]
	for _, want := range []string{was.ID, s.ID, "1 images", "example.org/gone:1", "pull"} {
		if !strings.Contains(s.Lost, want) {
			t.Errorf("lost: %q, expected %q in it", s.Lost, want)
		}
	}
	if s.Error != "" || s.ID == was.ID || s.Claimed != 3 || claims(t, regions) != 3 {
		t.Errorf("status %+v and %d claims, expected 3", s, claims(t, regions))
	}
	needed := func(c digest.Digest) bool { return c == gone || c == now }
	must(t, r.Sweep(t.Context(), needed))
	must(t, r.Close())
	r.open()
	if s := r.Status()[0]; s.Lost == "" || s.Claimed != 2 || claims(t, regions) != 2 {
		t.Errorf("while it is needed: %+v and %d claims, expected 2", s, claims(t, regions))
	}
	must(t, r.Sweep(t.Context(), func(c digest.Digest) bool { return c == now }))
	if s := r.Status()[0]; s.Lost != "" || s.Claimed != 1 || claims(t, regions) != 1 {
		t.Errorf("when nothing needs it: %+v and %d claims, expected 1", s, claims(t, regions))
	}
	if _, err := os.Stat(filepath.Join(r.cfg.Root, was.ID)); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the directory of the old pool: %v, expected that it is gone", err)
	}
}

// Nothing is lost that another pool has.
func TestReplacedElsewhere(t *testing.T) {
	o, other := newOwner(t), newOwner(t)
	chain := o.add("image")
	r := newReader(t, o.path, other.path)
	must(t, r.Claim(t.Context(), chain))
	o.renew()
	r.Refresh(t.Context())
	if s := r.Status()[0]; s.Lost == "" || s.Claimed != 1 {
		t.Errorf("status %+v, expected that the image is lost", s)
	}
	other.add("image")
	r.sees(chain, "image")
	if s := r.Status(); s[0].Lost != "" || s[0].Claimed != 0 || s[1].Claimed != 1 {
		t.Errorf("status %+v, expected that the other pool has it", s)
	}
}

// While a pool cannot be read at all, its claims are known, and none ends.
func TestAway(t *testing.T) {
	o := newOwner(t)
	used := o.add("used")
	r := newReader(t)
	_, regions := leased(t, o, r)
	r.sees(used, "used")
	must(t, r.Close())
	must(t, os.Rename(o.path, o.path+".away"))
	r.open()
	if s := r.Status()[0]; s.Error == "" || s.Claimed != 1 {
		t.Errorf("status %+v, expected an error, and one claim", s)
	}
	must(t, r.Sweep(t.Context(), func(digest.Digest) bool { return false }))
	if n := claims(t, regions); n != 1 {
		t.Errorf("%d claims, expected that of an image that is mounted still", n)
	}
	must(t, os.Rename(o.path+".away", o.path))
	r.sees(used, "used")
}

// While the lease region cannot be opened, no claim is forgotten.
func TestReleaseLater(t *testing.T) {
	o := newOwner(t)
	used := o.add("used")
	r := newReader(t)
	place, regions := leased(t, o, r)
	must(t, r.Claim(t.Context(), used))
	must(t, r.Close())
	must(t, os.Rename(place, place+".away"))
	r.open()
	if err := r.Sweep(t.Context(), func(digest.Digest) bool { return false }); err == nil {
		t.Error("a claim ended without a word to its owner")
	}
	must(t, os.Rename(place+".away", place))
	r.Refresh(t.Context())
	must(t, r.Sweep(t.Context(), func(digest.Digest) bool { return false }))
	if s := r.Status()[0]; s.Claimed != 0 || claims(t, regions) != 0 {
		t.Errorf("status %+v and %d claims, expected none", s, claims(t, regions))
	}
}

// Memory may be larger than its pool. An owner may grow the pool, or put a copy in its place.
func TestLargerMemory(t *testing.T) {
	o := newOwner(t)
	first := o.add("first")
	must(t, os.Truncate(o.path, 96<<20))
	r := newReader(t, o.path)
	r.sees(first, "first")
	nothing := func(digest.Digest) bool { return false }
	must(t, r.Sweep(t.Context(), nothing))

	must(t, errors.Join(o.Pool.Close(), o.mem.Close(), os.Truncate(o.path, 128<<20)))
	var err error
	o.mem, err = region.Open(region.Config{Kind: region.KindFile, Path: o.path, Size: 128 << 20})
	must(t, err)
	o.Pool, err = pool.Grow(o.mem, o.path+".index", pool.Options{})
	must(t, err)
	second := o.add("second")
	r.sees(second, "second")

	f, err := os.Open(filepath.Join(mustDir(r, second), "file"))
	must(t, err)
	must(t, errors.Join(o.Pool.Close(), o.mem.Close()))
	raw, err := os.ReadFile(o.path)
	must(t, err)
	must(t, os.WriteFile(o.path+".copy", raw, 0o600))
	must(t, os.Rename(o.path+".copy", o.path))
	o.mem, err = region.Open(region.Config{Kind: region.KindFile, Path: o.path, Size: 128 << 20})
	must(t, err)
	o.Pool, err = pool.Open(o.mem, o.path+".index", pool.Options{})
	must(t, err)
	third := o.add("third")
	if _, err := r.Lower(t.Context(), third); !errors.Is(err, shared.ErrReset) {
		t.Errorf("while a file of the old copy is open: %v, expected %v", err, shared.ErrReset)
	}
	must(t, f.Close())
	r.sees(third, "third")
	r.sees(second, "second")
}

// A lease region inside the pool would be overwritten by the owner, and would overwrite the pool.
func TestLeaseInPool(t *testing.T) {
	o := newOwner(t)
	chain := o.add("image")
	before, err := os.ReadFile(o.path)
	must(t, err)
	place := fmt.Sprintf("%s@%d+%d", o.path, 48<<20, lease.MinSize) // an unused range
	p, err := shared.Open(t.Context(), shared.Config{
		Root: filepath.Join(t.TempDir(), "shared"), Drivers: drivers.All(),
		Pools: []shared.Source{{Name: o.path, Lease: place}},
	})
	must(t, err)
	if err := p.Claim(t.Context(), chain); !errors.Is(err, shared.ErrInPool) {
		t.Errorf("claim: %v, expected %v", err, shared.ErrInPool)
	}
	must(t, p.Close())
	if after, err := os.ReadFile(o.path); err != nil || !bytes.Equal(before, after) {
		t.Errorf("the pool has changed, %v", err)
	}
}

// One pool under two names is read once.
func TestTwice(t *testing.T) {
	o := newOwner(t)
	chain := o.add("image")
	link := filepath.Join(t.TempDir(), "link")
	must(t, os.Symlink(filepath.Dir(o.path), link))
	r := newReader(t, o.path, filepath.Join(link, filepath.Base(o.path)))
	r.sees(chain, "image")
	if s := r.Status(); s[0].Error != "" || !strings.Contains(s[1].Error, shared.ErrTwice.Error()) ||
		s[1].Claimed != 0 {
		t.Errorf("status %+v, expected %v of the second", s, shared.ErrTwice)
	}
}

// Memory that the reader could write is opened for reading, and stays unchanged.
func TestWritesNothing(t *testing.T) {
	o := newOwner(t)
	chain := o.add("image")
	o.close()
	defer o.open()
	before, err := os.ReadFile(o.path)
	must(t, err)
	r := newReader(t, o.path)
	r.sees(chain, "image")
	fds, err := os.ReadDir("/proc/self/fd")
	must(t, err)
	n := 0
	for _, fd := range fds {
		if path, _ := os.Readlink("/proc/self/fd/" + fd.Name()); path != o.path {
			continue
		}
		n++
		info, err := os.ReadFile("/proc/self/fdinfo/" + fd.Name())
		must(t, err)
		var pos, flags int
		if _, err := fmt.Sscanf(string(info), "pos: %d\nflags: %o", &pos, &flags); err != nil ||
			flags&unix.O_ACCMODE != unix.O_RDONLY {
			t.Errorf("descriptor %s has flags %o, %v", fd.Name(), flags, err)
		}
	}
	if n == 0 {
		t.Error("the reader has no descriptor of the pool")
	}
	must(t, r.Sweep(t.Context(), func(digest.Digest) bool { return false }))
	after, err := os.ReadFile(o.path)
	must(t, err)
	if !bytes.Equal(before, after) {
		t.Error("the reader has changed the pool")
	}
}

// Images with documents beyond a limit are left out; other pools keep working.
func TestDocumentsAreBounded(t *testing.T) {
	defer shared.BoundDocuments(1000)()
	large, other := newOwner(t), newOwner(t)
	first := large.add("first")
	ids, last := chainOf("last")
	raw, err := json.Marshal(store.Document{ChainID: last, DiffIDs: ids})
	must(t, err)
	large.addRaw("last", "last", append(raw, bytes.Repeat([]byte(" "), 1000)...))
	fine := other.add("fine")
	r := newReader(t, large.path, other.path)
	r.sees(first, "first")
	if err := r.Claim(t.Context(), last); !errors.Is(err, shared.ErrNotFound) {
		t.Errorf("claim of an image with a document that is too large: %v, expected %v", err, shared.ErrNotFound)
	}
	r.sees(fine, "fine")
}
