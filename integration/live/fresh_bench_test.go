package live

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/daxfs/daxfs-snapshotter/daxfs"
	"github.com/daxfs/daxfs-snapshotter/mount"
	"github.com/daxfs/daxfs-snapshotter/mount/erofs"
	"github.com/daxfs/daxfs-snapshotter/pool"
	"github.com/daxfs/daxfs-snapshotter/pool/region"
)

// BenchmarkFirstBind measures the first bind of an image in a table: after the pool was mounted
// through a loop device ("mount"), after a restart of the daemon ("restart"), and after a restart
// without the record of comparisons, so that all metadata of the pool is compared ("all"). Each image
// has 1,000 files of its own. Cold means that the host has no page of the pool in memory. Run it with -benchtime 3x.
func BenchmarkFirstBind(b *testing.B) {
	if os.Geteuid() != 0 {
		b.Skip("mounting needs root")
	}
	for _, images := range []int{300, 3000} {
		b.Run(fmt.Sprintf("images=%d", images), func(b *testing.B) {
			p := newFullPool(b, images)
			for _, cold := range []bool{true, false} {
				for _, after := range []string{"mount", "restart", "all"} {
					b.Run(fmt.Sprintf("after=%s/cold=%v", after, cold),
						func(b *testing.B) { p.firstBind(b, after, cold) })
				}
			}
		})
	}
}

// fullPool is a pool of images and its file.
type fullPool struct {
	*pool.Pool
	r    region.Region
	path string
	keys []string
	tree int64 // bytes of the tree area in use
}

func newFullPool(b *testing.B, images int) *fullPool {
	b.Helper()
	dir := b.TempDir()
	p := &fullPool{path: filepath.Join(dir, "pool")}
	var err error
	p.r, err = region.Open(region.Config{Kind: region.KindFile, Path: p.path, Size: 4 << 30, Create: true})
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() { p.r.Close() })
	p.Pool, err = pool.Create(p.r, filepath.Join(dir, "index"), pool.Options{Device: pool.Yes, Slots: images})
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() { p.Close() })
	for i := range images {
		p.keys = append(p.keys, key(i))
		root := &daxfs.Node{Mode: unix.S_IFDIR | 0o755, Entries: map[string]*daxfs.Node{}}
		for n := range 1000 {
			if n%50 == 0 {
				root.Entries[fmt.Sprint("dir", n/50)] = &daxfs.Node{
					Mode:    unix.S_IFDIR | 0o755,
					Entries: map[string]*daxfs.Node{},
				}
			}
			root.Entries[fmt.Sprint("dir", n/50)].Entries[fmt.Sprintf("file-with-a-usual-name-%d.py", n)] = &daxfs.Node{
				Mode: unix.S_IFREG | 0o644, Mtime: daxfs.Time{Sec: int64(i), Nsec: uint32(n)},
			}
		}
		if _, err := p.AddImage(b.Context(), key(i), root, daxfs.Options{}); err != nil {
			b.Fatal(err)
		}
	}
	for _, r := range p.TreeRanges() {
		p.tree += r[1] - r[0]
	}
	return p
}

// image describes an image like the store.
func (p *fullPool) image(b *testing.B, n int) mount.Image {
	b.Helper()
	m, err := p.Image(p.keys[n])
	if err != nil {
		b.Fatal(err)
	}
	img := mount.Image{Key: m.Key, Name: m.Name(), Nid: p.Geometry().SlotNid(m.Slot), UUID: m.UUID, Created: m.Created}
	for _, r := range p.TreeRanges() {
		img.Tree = append(img.Tree, mount.Range{Off: r[0], End: r[1]})
	}
	return img
}

func (p *fullPool) firstBind(b *testing.B, after string, cold bool) {
	var spent time.Duration
	for range b.N {
		spent += p.once(b, after, cold)
	}
	perOp := spent / time.Duration(b.N)
	b.ReportMetric(0, "ns/op") // includes the preparation of each
	b.ReportMetric(float64(perOp.Microseconds())/1000, "ms")
	b.ReportMetric(float64(p.tree)/(1<<20), "tree-MiB")
	if after == "all" {
		b.ReportMetric(float64(p.tree)/1e6/perOp.Seconds(), "MB/s")
	}
}

// once returns the time for the first image.
func (p *fullPool) once(b *testing.B, after string, cold bool) time.Duration {
	b.Helper()
	root := b.TempDir()
	tab := p.open(b, root)
	if after != "mount" {
		if _, err := tab.Mount(b.Context(), p.image(b, 0)); err != nil {
			b.Fatal(err)
		}
		if after == "all" {
			forget(b, root)
		}
		tab = p.open(b, root)
	}
	advice := unix.FADV_WILLNEED
	if cold {
		advice = unix.FADV_DONTNEED
	}
	if err := errors.Join(p.r.Sync(0, p.r.Size()), unix.Fadvise(p.r.Info().FD, 0, p.r.Size(), advice)); err != nil {
		b.Fatal(err)
	}
	start := time.Now()
	_, err := tab.Mount(b.Context(), p.image(b, 1))
	spent := time.Since(start)
	if err != nil {
		b.Fatal(err)
	}
	for _, m := range tab.List() {
		if err := tab.Unmount(b.Context(), m.Key); err != nil {
			b.Fatal(err)
		}
	}
	if err := tab.UnmountPool(b.Context()); err != nil {
		b.Fatal(err)
	}
	return spent
}

func (p *fullPool) open(b *testing.B, root string) *mount.Table {
	b.Helper()
	tab, err := mount.Open(b.Context(), root, []mount.Driver{erofs.Loop{}},
		mount.Pool{Region: p.r.Info(), Size: p.r.Size(), UUID: p.Geometry().UUID}, mount.Options{})
	if err != nil {
		b.Fatal(err)
	}
	return tab
}

// forget changes the record of the mount to one that does not say what was compared.
func forget(b *testing.B, root string) {
	b.Helper()
	names, err := filepath.Glob(filepath.Join(root, "live/*/pool.json"))
	if err != nil || len(names) != 1 {
		b.Fatalf("records %q, %v", names, err)
	}
	text, err := os.ReadFile(names[0])
	if err != nil {
		b.Fatal(err)
	}
	var rec map[string]any
	if err := json.Unmarshal(text, &rec); err != nil || rec["fresh"] == nil {
		b.Fatalf("record %s, %v", text, err)
	}
	delete(rec, "fresh")
	if text, err = json.Marshal(rec); err != nil {
		b.Fatal(err)
	}
	if err := os.WriteFile(names[0], text, 0o600); err != nil {
		b.Fatal(err)
	}
}
