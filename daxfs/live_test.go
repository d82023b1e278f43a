package daxfs_test

import (
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/daxfs/daxfs-snapshotter/daxfs"
	"golang.org/x/sys/unix"
)

// livePool publishes images into a live tree like package pool. Contents lie in a store above the tree.
type livePool struct {
	s    *store
	g    daxfs.Geometry
	next int64 // next address of the tree area
	used int   // used slots
	have map[daxfs.InodeKey][]uint64
}

const (
	liveData = 48 << 20  // start of contents
	liveSize = 192 << 20 // size of the pool
)

func newLivePool(t testing.TB, slots, perBlock int) *livePool {
	t.Helper()
	p := &livePool{s: newStore(liveData), have: map[daxfs.InodeKey][]uint64{}}
	p.g = daxfs.Geometry{
		UUID: [16]byte{1, 2, 3}, Slots: slots, PerBlock: perBlock, Head: 3 * daxfs.BlockSize,
		Blocks: liveSize / daxfs.BlockSize,
	}
	if err := daxfs.FormatLive(&p.s.f, p.g); err != nil {
		t.Fatal(err)
	}
	p.next = p.g.TreeStart()
	return p
}

// inode resolves a file of a plan to an inode that the pool has; 0 for a new one.
func (p *livePool) inode(f daxfs.LiveFile) (uint64, daxfs.Data, error) {
	if have := p.have[f.Key]; f.Seq < len(have) {
		return have[f.Seq], f.Data, nil
	}
	return 0, f.Data, nil
}

// write writes the run of an image and returns its unpublished slot.
func (p *livePool) write(t testing.TB, root *daxfs.Node) (slot int, bytes []byte, plan *daxfs.LivePlan) {
	t.Helper()
	plan, err := daxfs.NewLivePlan(root, daxfs.Options{}, false)
	if err != nil {
		t.Fatal(err)
	}
	if err := plan.Resolve(p.inode); err != nil {
		t.Fatal(err)
	}
	slot = p.used
	p.used++
	if err := plan.PlaceLive(p.g, p.next, slot); err != nil {
		t.Fatal(err)
	}
	if p.next += plan.Size(); p.next > liveData {
		t.Fatal("the tree area of the test is full")
	}
	if err := plan.WriteRun(&p.s.f); err != nil {
		t.Fatal(err)
	}
	for i := range plan.FileCount() {
		if f := plan.File(i); f.New {
			p.have[f.Key] = append(p.have[f.Key], f.Nid)
		}
	}
	return slot, plan.Slot(), plan
}

func (p *livePool) publish(t testing.TB, root *daxfs.Node) (slot int) {
	t.Helper()
	slot, bytes, _ := p.write(t, root)
	if err := daxfs.PublishSlot(&p.s.f, p.g, slot, bytes, func() error { return nil }); err != nil {
		t.Fatal(err)
	}
	return slot
}

func (p *livePool) check(t testing.TB) {
	t.Helper()
	p.s.f.Truncate(int64(p.g.Blocks) * daxfs.BlockSize)
	err := daxfs.CheckLive(daxfs.Mem(p.s.f.b), int64(len(p.s.f.b)), daxfs.LiveCheckOptions{},
		func(f daxfs.Finding) bool {
			t.Errorf("check: %v", f)
			return true
		})
	if err != nil {
		t.Error(err)
	}
}

// TestLiveKernel publishes images one by one into a mounted live tree and compares the kernel's view.
func TestLiveKernel(t *testing.T) {
	for _, perBlock := range []int{daxfs.SlotsPerBlock, 1} {
		for _, backing := range []string{"file", "loop"} {
			t.Run(fmt.Sprint(backing, perBlock), func(t *testing.T) {
				if testing.Short() && (backing != "file" || perBlock == 1) {
					t.Skip("slow: publishes every tree once more")
				}
				makers := kernelTrees()
				delete(makers, "large") // takes long to write its contents
				if testing.Short() {
					for _, name := range []string{"links", "huge directory", "directory tails"} { // are long to compare
						delete(makers, name)
					}
				}
				// One slot for each image and the one below: fsck.erofs rejects an unpublished slot.
				p := newLivePool(t, len(makers)+1, perBlock)
				trees := map[string]*daxfs.Node{}
				for name, make := range makers {
					trees[name] = make(p.s)
				}
				trees["root with xattrs"] = dir(map[string]*daxfs.Node{"f": {
					Mode: unix.S_IFREG | 0o644,
					Data: p.s.put([]byte("x")),
				}})
				trees["root with xattrs"].Xattrs = []daxfs.Xattr{
					{Name: "user.long", Value: make([]byte, 60_000)},
					{Name: "security.capability", Value: capability},
					{Name: "system.posix_acl_default", Value: acl(1)},
					{Name: "trusted.empty"},
				}
				p.check(t)
				file := writeTemp(t, p.s.f.b)
				mountNamespace(t)
				log := kernelLog(t)
				mnt, device := mountImage(t, backing, file, 0, int64(len(p.s.f.b)))
				f, err := os.OpenFile(file, os.O_RDWR, 0)
				if err != nil {
					t.Fatal(err)
				}
				defer f.Close()
				var order []string
				for _, name := range slices.Sorted(maps.Keys(trees)) {
					from := p.next
					slot, bytes, _ := p.write(t, trees[name])
					if _, err := f.WriteAt(p.s.f.b[from:p.next], from); err != nil {
						t.Fatal(err)
					}
					if err := daxfs.PublishSlot(f, p.g, slot, bytes, f.Sync); err != nil {
						t.Fatal(err)
					}
					if err := daxfs.PublishSlot(&p.s.f, p.g, slot, bytes, f.Sync); err != nil {
						t.Fatal(err)
					}
					if device != "" {
						flush(t, device)
					}
					order = append(order, name)
				}
				for slot, name := range order {
					compareTree(t, filepath.Join(mnt, p.g.SlotName(slot)), trees[name], p.s)
				}
				if device != "" {
					for _, line := range log(device) {
						t.Errorf("the kernel says %s", line)
					}
				}
				p.check(t)
				fsck(t, file)
			})
		}
	}
}

// flush makes the kernel drop its cache of a loop device, with the state before a publication.
func flush(t testing.TB, device string) {
	t.Helper()
	d, err := os.Open("/dev/" + device)
	if err != nil {
		t.Fatal(err)
	}
	defer d.Close()
	if err := unix.IoctlSetInt(int(d.Fd()), unix.BLKFLSBUF, 0); err != nil {
		t.Fatal(err)
	}
}

// TestLiveShares: two images share the k-th inode of equal files, and groups of hard links as a whole
// or not at all.
func TestLiveShares(t *testing.T) {
	p := newLivePool(t, 300, daxfs.SlotsPerBlock)
	file := func(body string) *daxfs.Node {
		return &daxfs.Node{Mode: unix.S_IFREG | 0o644, Data: p.s.put([]byte(body))}
	}
	linked, wider := file("linked"), file("wider")
	one := dir(map[string]*daxfs.Node{
		"a": file("same"), "b": file("same"), "l1": linked, "l2": linked, "w1": wider, "w2": wider, "e": file(""),
		"s": symlink("a"),
	})
	later := file("same")
	later.Mtime.Sec = 1
	wider2 := file("wider")
	two := dir(map[string]*daxfs.Node{
		"x": file("same"), "y": file("same"), "z": file("same"), "l3": file(""), "k": later, "w1": wider2,
		"w2": wider2, "w3": wider2,
	})
	lnk := file("linked")
	two.Entries["p"], two.Entries["q"] = lnk, lnk
	p.publish(t, one)
	p.publish(t, two)
	p.check(t)
	l, err := daxfs.OpenLive(daxfs.Mem(p.s.f.b), int64(len(p.s.f.b)))
	if err != nil {
		t.Fatal(err)
	}
	if l.Geometry() != p.g {
		t.Errorf("geometry %+v, expected %+v", l.Geometry(), p.g)
	}
	nid := func(slot int, name string) uint64 {
		img, err := l.Image(slot)
		if err != nil {
			t.Fatal(err)
		}
		in, err := img.Lookup(name, false)
		if err != nil {
			t.Fatal(err)
		}
		return in.Nid
	}
	for _, c := range []struct {
		a, b  string
		equal bool
	}{
		{"0/a", "1/x", true},
		{"0/b", "1/y", true},
		{"0/a", "0/b", false},
		{"0/b", "1/z", false},
		{"0/l1", "1/p", true},
		{"0/l1", "0/l2", true},
		{"0/w1", "1/w1", false},
		{"0/e", "1/l3", true},
		{"0/a", "1/k", false},
		{"1/z", "1/x", false},
	} {
		a, b := nid(int(c.a[0]-'0'), c.a[2:]), nid(int(c.b[0]-'0'), c.b[2:])
		if (a == b) != c.equal {
			t.Errorf("%s is inode %d, %s is %d; expected one inode: %t", c.a, a, c.b, b, c.equal)
		}
	}
	if _, err := l.Image(2); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("a slot where nothing is published: %v, expected ErrNotExist", err)
	}
}

// liveCorruptions break one rule of a live tree each.
var liveCorruptions = map[string]struct {
	rule  daxfs.Rule
	spoil func(t *testing.T, p *livePool)
	opts  daxfs.LiveCheckOptions
}{
	"inode count": {rule: daxfs.RuleLiveSuper, spoil: func(_ *testing.T, p *livePool) {
		p.s.f.b[1024+16]++
		setChecksum(p.s.f.b)
	}},
	"root of another": {rule: daxfs.RuleLiveShared, spoil: func(_ *testing.T, p *livePool) {
		copy(p.s.f.b[p.g.SlotOff(2):][:daxfs.SlotSize], p.s.f.b[p.g.SlotOff(1):])
	}},
	"slot with a file": {rule: daxfs.RuleRoot, spoil: func(_ *testing.T, p *livePool) {
		binary.LittleEndian.PutUint16(p.s.f.b[p.g.SlotOff(1)+4:], unix.S_IFREG|0o600)
	}},
	"label": {rule: daxfs.RuleChecksum, spoil: func(t *testing.T, p *livePool) { p.s.f.b[1024+64]++ }},
	"retracted half": {
		rule:  daxfs.RuleLiveSlots,
		spoil: func(t *testing.T, p *livePool) { p.s.f.b[p.g.SlotOff(9)+20] = 1 },
	},
	"before its tree": {rule: daxfs.RuleDirBlock, spoil: func(t *testing.T, p *livePool) {
		from := p.next
		slot, b, _ := p.write(t, dir(map[string]*daxfs.Node{"d": dir(nil)}))
		clear(p.s.f.b[from : from+64])
		_ = daxfs.PublishSlot(&p.s.f, p.g, slot, b, func() error { return nil })
	}},
	"tree of another": {rule: daxfs.RuleDots, spoil: func(t *testing.T, p *livePool) {
		copy(p.s.f.b[p.g.SlotOff(2):][:daxfs.SlotSize], p.s.f.b[p.g.SlotOff(1):])
	}},
	"erased file": {rule: daxfs.RuleInodeSize, spoil: func(t *testing.T, p *livePool) {
		for _, nids := range p.have {
			_ = daxfs.EraseInode(&p.s.f, p.g, nids[0])
		}
	}},
	"two inodes on one extent": {
		rule: daxfs.RuleLiveDAX, opts: daxfs.LiveCheckOptions{OneInode: true},
		spoil: func(t *testing.T, p *livePool) {
			f := &daxfs.Node{Mode: unix.S_IFREG | 0o600, Data: p.s.put([]byte("f"))}
			p.publish(t, dir(map[string]*daxfs.Node{"f": f}))
		},
	},
	"slot names": {rule: daxfs.RuleLiveSlots, spoil: func(t *testing.T, p *livePool) {
		at := strings.Index(string(p.s.f.b[p.g.Head:p.g.TreeStart()]), "00299")
		p.s.f.b[p.g.Head+int64(at)+4] = 'a'
	}},
}

// TestLiveCheck breaks one rule of a live tree at a time.
func TestLiveCheck(t *testing.T) {
	base := func() *livePool {
		p := newLivePool(t, 300, 1)
		p.publish(t, randomTree(1, 60, p.s))
		p.publish(t, dir(map[string]*daxfs.Node{"d": dir(nil), "f": {Mode: unix.S_IFREG, Data: p.s.put([]byte("f"))}}))
		p.s.f.Truncate(int64(p.g.Blocks) * daxfs.BlockSize)
		return p
	}
	for name, c := range liveCorruptions {
		t.Run(name, func(t *testing.T) {
			p := base()
			p.check(t)
			c.spoil(t, p)
			var got []daxfs.Rule
			err := daxfs.CheckLive(daxfs.Mem(p.s.f.b), int64(len(p.s.f.b)), c.opts, func(f daxfs.Finding) bool {
				got = append(got, f.Rule)
				return true
			})
			if err == nil || !slices.Contains(got, c.rule) {
				t.Errorf("found %q, %v; expected %s", got, err, c.rule)
			}
		})
	}
}

// The slot of a removed image is refused, and so are its files once they are erased.
func TestLiveRetract(t *testing.T) {
	p := newLivePool(t, 300, daxfs.SlotsPerBlock)
	slot := p.publish(t, dir(map[string]*daxfs.Node{"f": {Mode: unix.S_IFREG | 0o644, Data: p.s.put([]byte("f"))}}))
	if err := daxfs.RetractSlot(&p.s.f, p.g, slot); err != nil {
		t.Fatal(err)
	}
	p.check(t)
	l, err := daxfs.OpenLive(daxfs.Mem(p.s.f.b), int64(len(p.s.f.b)))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := l.Image(slot); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("image at a retracted slot: %v", err)
	}
	if _, err := l.FS().Lookup(p.g.SlotName(slot)+"/f", false); !errors.Is(err, daxfs.ErrCorrupt) {
		t.Errorf("a file behind a retracted slot: %v, expected ErrCorrupt", err)
	}
	var nid uint64
	for _, nids := range p.have {
		nid = nids[0]
	}
	if _, err := l.FS().Erased(nid); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("an inode that is not erased: %v", err)
	}
	if err := daxfs.EraseInode(&p.s.f, p.g, nid); err != nil {
		t.Fatal(err)
	}
	p.s.f.Truncate(int64(p.g.Blocks) * daxfs.BlockSize)
	if l, err = daxfs.OpenLive(daxfs.Mem(p.s.f.b), int64(len(p.s.f.b))); err != nil {
		t.Fatal(err)
	}
	if _, err := l.FS().Inode(nid); !errors.Is(err, daxfs.ErrCorrupt) {
		t.Errorf("an erased inode: %v, expected ErrCorrupt", err)
	}
	in, err := l.FS().Erased(nid)
	if err != nil {
		t.Fatal(err)
	}
	if b, err := in.View(0, 10); err != nil || string(b) != "f" {
		t.Errorf("what an erased inode had: %q, %v", b, err)
	}
}

func TestGeometry(t *testing.T) {
	for _, perBlock := range []int{1, daxfs.SlotsPerBlock} {
		for _, slots := range []int{2, 3, 238, 239, 240, 241, 479, 480, 481, 5000, daxfs.MaxSlots} {
			if testing.Short() && slots == daxfs.MaxSlots && perBlock == 1 {
				continue // checks a block for each slot
			}
			g := daxfs.Geometry{Slots: slots, PerBlock: perBlock, Head: 1 << 20}
			g.Blocks = uint32(g.TreeStart() / daxfs.BlockSize)
			var m memFile
			if err := daxfs.FormatLive(&m, g); err != nil {
				t.Fatalf("%d slots: %v", slots, err)
			}
			m.Truncate(int64(g.Blocks) * daxfs.BlockSize)
			err := daxfs.CheckLive(daxfs.Mem(m.b), int64(len(m.b)), daxfs.LiveCheckOptions{},
				func(f daxfs.Finding) bool {
					t.Errorf("%d slots, %d in a block: %v", slots, perBlock, f)
					return false
				})
			if err != nil {
				t.Error(err)
			}
		}
	}
}

// setChecksum corrects the checksum in the superblock of an image.
func setChecksum(b []byte) {
	table := crc32.MakeTable(crc32.Castagnoli)
	clear(b[1024+4 : 1024+8])
	binary.LittleEndian.PutUint32(b[1024+4:], ^crc32.Update(0, table, b[1024:4096]))
}

// slotWrites applies writes two bytes at a time, as memory may, and looks at the tree in between. It knows
// whether a write was not synced, and fails one operation.
type slotWrites struct {
	p         *livePool
	look      func(unsynced bool)
	unsynced  bool
	n, failAt int
}

func (w *slotWrites) hit() error {
	if w.n++; w.n == w.failAt {
		return unix.EIO
	}
	return nil
}

func (w *slotWrites) WriteAt(b []byte, off int64) (int, error) {
	if err := w.hit(); err != nil {
		return 0, err
	}
	before := w.unsynced
	w.unsynced = true
	for i := 0; i < len(b); i += 2 {
		if _, err := w.p.s.f.WriteAt(b[i:i+2], off+int64(i)); err != nil {
			return i, err
		}
		w.look(before)
	}
	return len(b), nil
}

func (w *slotWrites) sync() error {
	w.unsynced = false
	return w.hit()
}

// TestSlotWrites publishes an image and retracts it: a lookup in between finds no image or all of it, and
// an image only after the rest of its slot was synced. Each failed operation is reported.
func TestSlotWrites(t *testing.T) {
	for failAt := 0; ; failAt++ {
		p := newLivePool(t, 4, daxfs.SlotsPerBlock)
		slot, bytes, _ := p.write(t, dir(map[string]*daxfs.Node{"empty": {Mode: unix.S_IFREG | 0o644}}))
		found := func() bool {
			live, err := daxfs.OpenLive(&p.s.f, liveSize)
			if err != nil {
				t.Fatal(err)
			}
			img, err := live.Image(slot)
			if errors.Is(err, fs.ErrNotExist) {
				return false
			}
			if err == nil {
				_, err = fs.Stat(img, "empty")
			}
			if err != nil {
				t.Errorf("an image in the making: %v", err)
			}
			return true
		}
		w := &slotWrites{p: p, failAt: failAt}
		w.look = func(unsynced bool) {
			if found() && unsynced {
				t.Error("the image appears before the rest of its slot was synced")
			}
		}
		err := daxfs.PublishSlot(w, p.g, slot, bytes, w.sync)
		if err == nil {
			if !found() || w.unsynced {
				t.Errorf("published: found %t, not synced %t", found(), w.unsynced)
			}
			w.look = func(bool) { // the mode goes first
				if found() {
					t.Error("the image is there while its slot is being emptied")
				}
			}
			err = daxfs.RetractSlot(w, p.g, slot)
		}
		if failed := failAt > 0 && failAt <= w.n; failed != errors.Is(err, unix.EIO) || !failed && err != nil {
			t.Errorf("operation %d of %d fails: %v", failAt, w.n, err)
		}
		if failAt > w.n || t.Failed() {
			break
		}
	}
}
