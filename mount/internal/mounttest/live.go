package mounttest

import (
	"crypto/rand"
	"crypto/sha256"
	"maps"
	"os"
	"path"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/daxfs/daxfs-snapshotter/daxfs"
)

// LivePool is a pool in one file that publishes images while it is mounted. It lacks the index,
// durability and reuse of package pool.
type LivePool struct {
	Path string
	File *os.File
	G    daxfs.Geometry
	Size int64

	next, data int64 // places for the next tree and the next contents
	used       int   // slots
	nids       map[daxfs.InodeKey][]uint64
	contents   map[[32]byte]int64
}

// Slot is a published image.
type Slot struct {
	Name string
	Nid  uint64
	N    int
	// Nids are the inodes of regular files, by path.
	Nids map[string]uint64
	// Off are the offsets of their contents, by path.
	Off map[string]int64
	// Tree is the used part of the tree area at that time: first offset and end.
	Tree [2]int64
}

const (
	livePoolSize = 512 << 20
	liveData     = 64 << 20 // where contents begin
)

// NewLivePool makes an empty pool in a new file, or on a block device of at least 512 MiB. device
// chooses the number of slots in a block for block devices.
func NewLivePool(t testing.TB, path string, device bool) *LivePool {
	t.Helper()
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	p := &LivePool{
		Path: path, File: f, Size: livePoolSize, data: liveData,
		nids: map[daxfs.InodeKey][]uint64{}, contents: map[[32]byte]int64{},
	}
	p.G = daxfs.Geometry{
		Slots: 2000, PerBlock: daxfs.SlotsPerBlock, Head: 8 * daxfs.BlockSize, Blocks: livePoolSize / daxfs.BlockSize,
	}
	if device {
		p.G.PerBlock = 1
	}
	rand.Read(p.G.UUID[:])
	if st, err := f.Stat(); err != nil {
		t.Fatal(err)
	} else if st.Mode().IsRegular() {
		if err := f.Truncate(p.Size); err != nil {
			t.Fatal(err)
		}
	}
	if err := daxfs.FormatLive(f, p.G); err != nil {
		t.Fatal(err)
	}
	if err := f.Sync(); err != nil {
		t.Fatal(err)
	}
	p.next = p.G.TreeStart()
	return p
}

// Publish publishes an image of regular files by path. Equal files of images share an inode.
func (p *LivePool) Publish(t testing.TB, files map[string]string) Slot {
	t.Helper()
	s := p.Prepare(t, files)
	p.Show(t, s)
	return s.Slot
}

// Prepared is an image that is written but not published.
type Prepared struct {
	Slot
	bytes []byte
}

// Prepare does all of Publish except the last step.
func (p *LivePool) Prepare(t testing.TB, files map[string]string) Prepared {
	t.Helper()
	root := &daxfs.Node{Mode: unix.S_IFDIR | 0o755}
	for _, name := range slices.Sorted(maps.Keys(files)) {
		dir := root
		for part := range strings.SplitSeq(path.Dir(name), "/") {
			if part == "." {
				continue
			}
			if dir.Entries[part] == nil {
				child(dir, part, &daxfs.Node{Mode: unix.S_IFDIR | 0o755})
			}
			dir = dir.Entries[part]
		}
		child(dir, path.Base(name), &daxfs.Node{Mode: unix.S_IFREG | 0o755, Data: p.put(t, []byte(files[name]))})
	}
	plan, err := daxfs.NewLivePlan(root, daxfs.Options{}, false)
	if err != nil {
		t.Fatal(err)
	}
	err = plan.Resolve(func(f daxfs.LiveFile) (uint64, daxfs.Data, error) {
		if have := p.nids[f.Key]; f.Seq < len(have) {
			return have[f.Seq], f.Data, nil
		}
		return 0, f.Data, nil
	})
	if err != nil {
		t.Fatal(err)
	}
	s := Prepared{Slot: Slot{
		N: p.used, Name: p.G.SlotName(p.used), Nid: p.G.SlotNid(p.used), Nids: map[string]uint64{},
		Off: map[string]int64{},
	}}
	p.used++
	if err := plan.PlaceLive(p.G, p.next, s.N); err != nil {
		t.Fatal(err)
	}
	p.next += plan.Size()
	s.Tree = [2]int64{p.G.TreeStart(), p.next}
	if p.next > liveData {
		t.Fatal("the tree area of the test is full")
	}
	if err := plan.WriteRun(p.File); err != nil {
		t.Fatal(err)
	}
	byOff := map[int64][]uint64{}
	for i := range plan.FileCount() {
		f := plan.File(i)
		if f.New {
			p.nids[f.Key] = append(p.nids[f.Key], f.Nid)
		}
		byOff[f.Data.Off] = append(byOff[f.Data.Off], f.Nid)
	}
	for _, name := range slices.Sorted(maps.Keys(files)) {
		off := p.contents[sha256.Sum256([]byte(files[name]))]
		s.Off[name], s.Nids[name] = off, byOff[off][0]
		byOff[off] = byOff[off][1:]
	}
	s.bytes = plan.Slot()
	return s
}

// Show does the last step of Publish.
func (p *LivePool) Show(t testing.TB, s Prepared) {
	t.Helper()
	if err := daxfs.PublishSlot(p.File, p.G, s.N, s.bytes, p.File.Sync); err != nil {
		t.Fatal(err)
	}
}

func child(dir *daxfs.Node, name string, n *daxfs.Node) {
	if dir.Entries == nil {
		dir.Entries = map[string]*daxfs.Node{}
	}
	dir.Entries[name] = n
}

// put stores contents once.
func (p *LivePool) put(t testing.TB, b []byte) daxfs.Data {
	t.Helper()
	sum := sha256.Sum256(b)
	off, ok := p.contents[sum]
	if !ok {
		off = p.data
		p.data += (int64(len(b)) + daxfs.BlockSize - 1) / daxfs.BlockSize * daxfs.BlockSize
		p.contents[sum] = off
		if _, err := p.File.WriteAt(b, off); err != nil {
			t.Fatal(err)
		}
	}
	d := daxfs.Data{Off: off, Size: int64(len(b))}
	copy(d.Sum[:], sum[:])
	return d
}

// Retract removes an image but keeps its files.
func (p *LivePool) Retract(t testing.TB, s Slot) {
	t.Helper()
	if err := daxfs.RetractSlot(p.File, p.G, s.N); err != nil {
		t.Fatal(err)
	}
}

// Erase durably makes inodes unreadable for kernels that do not have them in memory.
func (p *LivePool) Erase(nids ...uint64) error {
	for _, nid := range nids {
		if err := daxfs.EraseInode(p.File, p.G, nid); err != nil {
			return err
		}
	}
	return p.File.Sync()
}
