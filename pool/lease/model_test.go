package lease

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"math/rand/v2"
	"os"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/daxfs/daxfs-snapshotter/daxfs"
	"github.com/daxfs/daxfs-snapshotter/internal/slow"
	"github.com/daxfs/daxfs-snapshotter/pool"
	"github.com/daxfs/daxfs-snapshotter/pool/region"
)

// TestInterleavings runs owners and readers of one shared file through 1,000 random interleavings of
// claims, releases, removals, additions, epochs, and crashes of either side, all with the real code.
// Readers also take steps inside the owner's: at every write, every sync and every look at the leases.
// After each step, everything that a reader uses must have its original bytes.
func TestInterleavings(t *testing.T) {
	n := 1000
	if slow.Leave() {
		n = 30
	} else if testing.Short() {
		n = 100
	}
	dir, err := os.MkdirTemp("/dev/shm", "leasetest")
	if err != nil {
		dir = t.TempDir()
	}
	defer os.RemoveAll(dir)
	var total counts
	for seed := range n {
		w := &world{t: t, dir: filepath.Join(dir, fmt.Sprint(seed)), rng: rand.New(rand.NewPCG(uint64(seed), 7))}
		w.run(40)
		total.add(w.counts)
		if err := os.RemoveAll(w.dir); err != nil {
			t.Fatal(err)
		}
		if t.Failed() {
			t.Fatalf("seed %d", seed)
		}
	}
	t.Logf("%+v", total)
	for _, c := range []int{
		total.used, total.late, total.leased, total.removed, total.ownerCrashes,
		total.readerCrashes, total.inside, total.epochs, total.refused,
	} {
		if c == 0 {
			t.Errorf("something never happened: %+v", total)
		}
	}
}

// counts says how often each event happened, to show that the test reaches it.
type counts struct {
	used          int // claims that held
	late          int // claims that came too late
	leased        int // removals that waited
	removed       int
	inside        int // reader steps inside an owner step
	ownerCrashes  int
	readerCrashes int
	epochs        int
	refused       int // epochs that waited
}

func (c *counts) add(o counts) {
	c.used += o.used
	c.late += o.late
	c.leased += o.leased
	c.removed += o.removed
	c.inside += o.inside
	c.ownerCrashes += o.ownerCrashes
	c.readerCrashes += o.readerCrashes
	c.epochs += o.epochs
	c.refused += o.refused
}

// world is one interleaving.
type world struct {
	t   *testing.T
	dir string
	rng *rand.Rand
	counts

	disk    region.Region // the shared file as readers see it
	owner   *pool.Pool
	shared  *crashing // the shared file as the owner sees it
	regions *Regions
	readers []*reader
	next    int // number of the next image
	busy    bool
}

var ctx = context.Background()

func (w *world) must(err error) {
	w.t.Helper()
	if err != nil {
		w.t.Fatal(err)
	}
}

func (w *world) run(steps int) {
	w.must(os.Mkdir(w.dir, 0o700))
	var specs []string
	for i := range 2 {
		path := filepath.Join(w.dir, fmt.Sprint(i, suffix))
		w.must(os.WriteFile(path, make([]byte, MinSize), 0o600))
		specs = append(specs, path)
		w.readers = append(w.readers,
			&reader{w: w, spec: path, who: Reader{Name: fmt.Sprint("guest", i), Machine: [16]byte{byte(i + 1)}}})
	}
	var err error
	w.regions, err = NewRegions(specs)
	w.must(err)
	r, err := region.Open(w.config())
	w.must(err)
	p, err := pool.Create(r, w.index(), pool.Options{Slots: 40, DAX: pool.No, Device: pool.No, Windows: pool.No})
	w.must(err)
	w.must(errors.Join(p.Close(), r.Close()))
	w.disk, err = region.Open(w.config())
	w.must(err)
	defer w.disk.Close()
	for _, r := range w.readers {
		r.open()
	}
	w.openOwner()
	for range steps {
		switch n := w.rng.IntN(20); {
		case n < 6:
			w.add()
		case n < 10:
			w.remove()
		case n == 10:
			w.crashOwner()
		case n == 11:
			w.epoch()
		default:
			w.readerStep()
		}
		w.check()
		if w.t.Failed() {
			break
		}
	}
	for _, r := range w.readers {
		r.l.Close()
	}
	w.must(w.owner.Check(ctx, func(f pool.Finding) bool { w.t.Errorf("check: %v", f); return true }))
	w.must(w.owner.Close())
	w.must(w.shared.Close())
}

func (w *world) index() string { return filepath.Join(w.dir, "index") }

func (w *world) config() region.Config {
	return region.Config{Kind: kindOf(w.dir), Path: filepath.Join(w.dir, "pool"), Size: region.MinSize, Create: true}
}

func kindOf(dir string) string {
	var st unix.Statfs_t
	if unix.Statfs(dir, &st) == nil && st.Type == unix.TMPFS_MAGIC {
		return region.KindTmpfs
	}
	return region.KindFile
}

// crashing is the owner's region. Readers take steps during its use; after a crash it does nothing.
type crashing struct {
	region.Region
	w    *world
	left int // operations until it crashes; 0 for never
	dead bool
}

var errCrash = errors.New("the owner crashed")

func (c *crashing) step() error {
	if c.left > 0 {
		if c.left--; c.left == 0 {
			c.dead = true
		}
	}
	if c.dead {
		return errCrash
	}
	c.w.meanwhile()
	return nil
}

func (c *crashing) WriteAt(b []byte, off int64) (int, error) {
	if err := c.step(); err != nil {
		return 0, err
	}
	return c.Region.WriteAt(b, off)
}

func (c *crashing) Punch(off, n int64) error {
	if err := c.step(); err != nil {
		return err
	}
	return c.Region.Punch(off, n)
}

func (c *crashing) Sync(off, n int64) error {
	if err := c.step(); err != nil {
		return err
	}
	return nil // a process ends here, not the machine
}

// looking lets readers take steps around each look at the leases.
type looking struct{ w *world }

func (l looking) Users(id [16]byte, m pool.Image) ([]string, error) {
	l.w.meanwhile()
	defer l.w.meanwhile()
	return l.w.regions.Users(id, m)
}

func (l looking) Any(id [16]byte) ([]string, error) {
	l.w.meanwhile()
	defer l.w.meanwhile()
	return l.w.regions.Any(id)
}

// meanwhile now and then lets a reader take a step inside one of the owner.
func (w *world) meanwhile() {
	if !w.busy && w.rng.IntN(4) == 0 {
		w.inside++
		w.readerStep()
		w.check()
	}
}

func (w *world) openOwner() {
	r, err := region.Open(w.config())
	w.must(err)
	w.shared = &crashing{Region: r, w: w}
	w.owner, err = pool.Open(w.shared, w.index(), pool.Options{Warn: func(error) {}})
	w.must(err)
	w.owner.SetLeases(looking{w})
	w.must(w.reap())
}

// crashOwner makes the owner crash during an operation, then starts another one.
func (w *world) crashOwner() {
	w.ownerCrashes++
	w.shared.left = 1 + w.rng.IntN(12)
	for !w.shared.dead {
		if w.rng.IntN(2) == 0 {
			w.add()
		} else {
			w.remove()
		}
		w.shared.WriteAt(nil, 0) // crashes at the latest here
	}
	w.must(w.owner.Close())
	w.must(w.shared.Close())
	w.openOwner()
}

// failed tells a crash of the owner from forbidden failures.
func (w *world) failed(err error) bool {
	if err != nil && !errors.Is(err, errCrash) && !errors.Is(err, pool.ErrFull) && !w.shared.dead {
		w.t.Error(err)
	}
	return err != nil
}

// body returns the unique contents of an image.
func body(n int) []byte {
	return bytes.Repeat(fmt.Appendf(nil, "contents of image %06d\n", n), 300+n%7*100)
}

func key(n int) string { return fmt.Sprint("image", n) }

func (w *world) add() {
	n := w.next
	w.next++
	b := w.owner.Begin()
	defer b.Discard()
	data, err := b.Put(ctx, int64(len(body(n))), bytes.NewReader(body(n)))
	if w.failed(err) {
		return
	}
	root := &daxfs.Node{
		Mode:    unix.S_IFDIR | 0o755,
		Entries: map[string]*daxfs.Node{"file": {Mode: unix.S_IFREG | 0o644, Data: data}},
	}
	if _, err := w.owner.AddImage(ctx, key(n), root, daxfs.Options{}); w.failed(err) {
		return
	}
	w.failed(w.owner.SetDocument(ctx, key(n), body(n)))
}

func (w *world) remove() {
	all := w.owner.Images()
	if len(all) == 0 {
		return
	}
	m := all[w.rng.IntN(len(all))]
	if w.owner.Unlisted(m.Key) && w.rng.IntN(4) == 0 { // somebody wants it again
		w.failed(w.owner.Relist(ctx, m.Key))
		return
	}
	err := w.owner.RemoveImage(ctx, m.Key)
	switch {
	case errors.Is(err, pool.ErrLeased):
		w.leased++
	case !w.failed(err):
		w.removed++
	}
	w.failed(w.reap())
}

// reap frees dead contents: nothing on this host has the pool mounted.
func (w *world) reap() error {
	dead, err := w.owner.Erase(ctx, w.owner.Dead())
	if err != nil {
		return err
	}
	return w.owner.Free(ctx, dead)
}

func (w *world) epoch() {
	err := w.owner.NewEpoch(ctx)
	switch {
	case errors.Is(err, pool.ErrLeased):
		w.refused++
	case !w.failed(err):
		w.epochs++
	}
}

func (w *world) readerStep() {
	w.busy = true
	defer func() { w.busy = false }()
	w.readers[w.rng.IntN(len(w.readers))].step()
}

func (w *world) check() {
	for _, r := range w.readers {
		r.check()
	}
}

// reader is a machine that reads the pool.
type reader struct {
	w    *world
	spec string
	who  Reader
	l    *Lease
	// claiming is an image whose claim is written while the second look at the catalogue is pending.
	claiming *pool.Image
	using    []pool.Image
}

func (r *reader) open() {
	var err error
	r.l, err = Open(r.spec, r.who)
	r.w.must(err)
}

func (r *reader) catalogue() *pool.Catalogue {
	c, err := pool.ReadCatalogue(r.w.disk)
	if errors.Is(err, pool.ErrCorrupt) && c != nil {
		return c // an entry is being written at this moment
	}
	if err != nil {
		return &pool.Catalogue{}
	}
	return c
}

func (r *reader) step() {
	w := r.w
	if r.claiming != nil && w.rng.IntN(8) > 0 {
		r.finish()
		return
	}
	switch n := w.rng.IntN(10); {
	case n < 5 && r.claiming == nil:
		c := r.catalogue()
		if len(c.Images) == 0 {
			return
		}
		m := c.Images[w.rng.IntN(len(c.Images))]
		for _, u := range r.using {
			if u.Key == m.Key {
				return
			}
		}
		held, err := r.l.Claim(c.PoolID, m)
		w.must(err)
		if held {
			w.t.Errorf("%s: image %q was claimed already", r.who.Name, m.Key)
		}
		r.claiming = &m
	case n < 8 && len(r.using) > 0:
		i := w.rng.IntN(len(r.using))
		m := r.using[i]
		r.using = append(r.using[:i:i], r.using[i+1:]...)
		w.must(r.l.Release(w.owner.ID(), m))
	case n == 8:
		r.crash()
	}
}

// finish is the second half of a claim.
func (r *reader) finish() {
	m := *r.claiming
	r.claiming = nil
	for _, now := range r.catalogue().Images {
		if now.Key == m.Key && now.Slot == m.Slot && now.UUID == m.UUID {
			r.w.used++
			r.using = append(r.using, m)
			return
		}
	}
	r.w.late++
	r.w.must(r.l.Release(r.w.owner.ID(), m))
}

// crash ends the process of the reader, or its machine. A process restarts and keeps its images. A
// machine forgets everything, and its claims wait until somebody declares them void.
func (r *reader) crash() {
	w := r.w
	w.readerCrashes++
	r.l.Close()
	machine := w.rng.IntN(2) == 0
	if w.rng.IntN(3) == 0 { // while it writes an entry
		f, err := os.OpenFile(r.spec, os.O_RDWR, 0)
		w.must(err)
		t := make(table, MinSize-headerSize)
		_, err = f.ReadAt(t, headerSize)
		w.must(err)
		for i := range t.count() {
			if _, s := t.entry(i); s == free {
				_, err := f.WriteAt([]byte{1, 2, 3}, headerSize+int64(i)*entrySize)
				w.must(err)
				break
			}
		}
		w.must(f.Close())
		w.check()
	}
	// Claims that a restarted reader does not know are released as those of an earlier boot, or by name.
	if r.claiming != nil {
		r.open()
		w.must(r.l.Release(w.owner.ID(), *r.claiming))
		r.l.Close()
		r.claiming = nil
	}
	if machine {
		r.using = nil
		_, err := w.regions.Void(r.spec, false)
		w.must(err)
	}
	r.open()
	for _, m := range r.using {
		held, err := r.l.Claim(w.owner.ID(), m)
		w.must(err)
		if !held {
			w.t.Errorf("%s: the claim of image %q was lost", r.who.Name, m.Key)
		}
	}
}

// check reads every image that the reader uses.
func (r *reader) check() {
	for _, m := range r.using {
		var n int
		if _, err := fmt.Sscanf(m.Key, "image%d", &n); err != nil {
			r.w.t.Fatal(err)
		}
		got, err := contents(r.w.disk, m)
		if err != nil || !bytes.Equal(got, body(n)) {
			r.w.t.Errorf("%s uses image %q and reads %d other bytes: %v", r.who.Name, m.Key, len(got), err)
			return
		}
	}
}

func contents(r region.Region, m pool.Image) ([]byte, error) {
	live, err := daxfs.OpenLive(r, r.Size())
	if err != nil {
		return nil, err
	}
	img, err := live.Image(m.Slot)
	if err != nil {
		return nil, err
	}
	return fs.ReadFile(img, "file")
}
