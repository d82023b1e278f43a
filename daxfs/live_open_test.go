package daxfs_test

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"slices"
	"strings"
	"testing"

	"github.com/daxfs/daxfs-snapshotter/daxfs"
	"golang.org/x/sys/unix"
)

// newSmallLive is newLivePool with room for a few small images.
func newSmallLive(t testing.TB, slots, perBlock int) *livePool {
	t.Helper()
	p := &livePool{have: map[daxfs.InodeKey][]uint64{}}
	p.g = daxfs.Geometry{UUID: [16]byte{1, 2, 3}, Slots: slots, PerBlock: perBlock, Head: 3 * daxfs.BlockSize}
	p.next = p.g.TreeStart()
	p.s = newStore(p.next + 64*daxfs.BlockSize)
	p.g.Blocks = uint32(p.s.next/daxfs.BlockSize + 16)
	if err := daxfs.FormatLive(&p.s.f, p.g); err != nil {
		t.Fatal(err)
	}
	return p
}

// openLive opens the tree after the superblock's checksum was made right again.
func (p *livePool) openLive() (*daxfs.Live, error) {
	p.s.f.Truncate(int64(p.g.Blocks) * daxfs.BlockSize)
	setChecksum(p.s.f.b)
	return daxfs.OpenLive(daxfs.Mem(p.s.f.b), int64(len(p.s.f.b)))
}

// setDirent gives the entry of a name in the first block of the root directory another inode.
func (p *livePool) setDirent(name string, nid uint64) {
	b := p.s.f.b[p.g.Head+daxfs.BlockSize:][:daxfs.BlockSize]
	for at := 0; ; at += 12 {
		off := binary.LittleEndian.Uint16(b[at+8:])
		if string(b[off:][:len(name)]) == name {
			binary.LittleEndian.PutUint64(b[at:], nid)
			return
		}
	}
}

// TestOpenLiveRefuses: each change makes a file system that readers of live trees must not take for one.
func TestOpenLiveRefuses(t *testing.T) {
	const super = 1024
	le := binary.LittleEndian
	setLinks := func(p *livePool, n uint32) { le.PutUint32(p.s.f.b[p.g.NidOff(1)+44:], n) }
	for name, spoil := range map[string]func(p *livePool){
		"root at another inode": func(p *livePool) {
			copy(p.s.f.b[p.g.NidOff(3):][:64], p.s.f.b[p.g.NidOff(1):])
			le.PutUint16(p.s.f.b[super+14:], 3)
		},
		"label":               func(p *livePool) { p.s.f.b[super+64]++ },
		"one slot":            func(p *livePool) { setLinks(p, 2+1) },
		"no links":            func(p *livePool) { setLinks(p, 0) },
		"too many slots":      func(p *livePool) { setLinks(p, 2+daxfs.MaxSlots+1) },
		"slots for one block": func(p *livePool) { setLinks(p, 2+100) },
		"slots behind the end": func(p *livePool) {
			le.PutUint32(p.s.f.b[super+36:], uint32(p.g.Head/daxfs.BlockSize)+3)
		},
		"no second slot": func(p *livePool) { p.s.f.b[p.g.Head+daxfs.BlockSize+3*12+8]++ },
		"first slot":     func(p *livePool) { p.setDirent("00000", p.g.SlotNid(0)+7) },
		"second slot":    func(p *livePool) { p.setDirent("00001", p.g.SlotNid(1)+7) },
		"no first slot":  func(p *livePool) { p.s.f.b[p.g.Head+daxfs.BlockSize+2*12+8]++ },
		"regular root":   func(p *livePool) { le.PutUint16(p.s.f.b[p.g.NidOff(1)+4:], unix.S_IFREG|0o600) },
	} {
		for _, perBlock := range []int{1, daxfs.SlotsPerBlock} {
			t.Run(fmt.Sprint(name, perBlock), func(t *testing.T) {
				p := newSmallLive(t, 300, perBlock)
				p.publish(t, dir(nil))
				if _, err := p.openLive(); err != nil {
					t.Fatal(err)
				}
				spoil(p)
				_, err := p.openLive()
				var fe *daxfs.FormatError
				if err == nil || !errors.Is(err, daxfs.ErrUnsupported) && !errors.As(err, &fe) {
					t.Errorf("error %v, expected ErrUnsupported or a FormatError", err)
				}
			})
		}
	}
	for _, size := range []int64{-1, 0, daxfs.BlockSize - 1, 1 << 45} {
		var fe *daxfs.FormatError
		report := func(f daxfs.Finding) bool {
			if f.Rule != daxfs.RuleImageSize || f.Path != "" {
				t.Errorf("size %d: finding %v", size, f)
			}
			return true
		}
		_, err := daxfs.OpenLive(failingReader{}, size)
		check := daxfs.CheckLive(failingReader{}, size, daxfs.LiveCheckOptions{}, report)
		for _, err := range []error{err, check} {
			if !errors.As(err, &fe) || fe.Rule != daxfs.RuleImageSize {
				t.Errorf("size %d: error %v, expected rule %s", size, err, daxfs.RuleImageSize)
			}
		}
	}
}

// TestGeometryRefuses: nothing is written or placed for a geometry that no live tree can have.
func TestGeometryRefuses(t *testing.T) {
	good := daxfs.Geometry{Slots: 300, PerBlock: daxfs.SlotsPerBlock, Head: 3 * daxfs.BlockSize}
	good.Blocks = uint32(good.TreeStart()/daxfs.BlockSize) + 1
	plan, err := daxfs.NewLivePlan(dir(nil), daxfs.Options{}, false)
	if err != nil {
		t.Fatal(err)
	}
	if err := plan.Resolve(nil); err != nil {
		t.Fatal(err)
	}
	for want, change := range map[string]func(g *daxfs.Geometry){
		"1 slots, expected 2 to":     func(g *daxfs.Geometry) { g.Slots = 1 },
		"65473 slots, expected 2 to": func(g *daxfs.Geometry) { g.Slots = daxfs.MaxSlots + 1 },
		"2 slots in a block":         func(g *daxfs.Geometry) { g.PerBlock = 2 },
		"begins at 0":                func(g *daxfs.Geometry) { g.Head = 0 },
		"begins at -4096":            func(g *daxfs.Geometry) { g.Head = -daxfs.BlockSize },
		"begins at 12289":            func(g *daxfs.Geometry) { g.Head++ },
		"whose slots end at":         func(g *daxfs.Geometry) { g.Blocks -= 2 },
	} {
		g := good
		change(&g)
		var m memFile
		for name, err := range map[string]error{
			"validate": g.Validate(), "format": daxfs.FormatLive(&m, g), "grow": daxfs.GrowLive(&m, g),
			"place": plan.PlaceLive(g, good.TreeStart(), 0),
		} {
			if !errors.Is(err, daxfs.ErrInvalid) || !strings.Contains(err.Error(), want) {
				t.Errorf("%s: error %v, expected %v that says %q", name, err, daxfs.ErrInvalid, want)
			}
		}
		if len(m.b) > 0 {
			t.Errorf("%q: %d bytes are written", want, len(m.b))
		}
	}
	if err := plan.WriteRun(&memFile{}); !errors.Is(err, daxfs.ErrNotPlaced) {
		t.Errorf("a run without a place: error %v, expected %v", err, daxfs.ErrNotPlaced)
	}
	if err := plan.PlaceLive(good, good.TreeStart(), 0); err != nil {
		t.Errorf("the sound geometry: %v", err)
	}
}

// TestFormatLiveErrors fails each write in turn: nobody can mount what is half written.
func TestFormatLiveErrors(t *testing.T) {
	for n := 0; ; n++ {
		p := newSmallLive(t, 300, 1)
		if _, err := p.openLive(); err != nil {
			t.Fatal(err)
		}
		w := &failingWriter{w: &p.s.f, left: n}
		err := daxfs.FormatLive(w, p.g)
		if w.left >= 0 {
			if err != nil || n < 3 {
				t.Errorf("%d writes, error %v", n, err)
			}
			break
		}
		if !errors.Is(err, errDisk) {
			t.Errorf("write %d fails: error %v", n, err)
		}
		if _, err := daxfs.OpenLive(&p.s.f, int64(len(p.s.f.b))); err == nil && n > 0 {
			t.Errorf("write %d fails, and the tree opens all the same", n)
		}
	}
}

// failingWriter fails the write after left writes.
type failingWriter struct {
	w    io.WriterAt
	left int
}

func (f *failingWriter) WriteAt(p []byte, off int64) (int, error) {
	if f.left--; f.left < 0 {
		return 0, errDisk
	}
	return f.w.WriteAt(p, off)
}

// TestGrowLive: a tree that has grown covers more blocks, and its images stay as they are.
func TestGrowLive(t *testing.T) {
	p := newSmallLive(t, 4, daxfs.SlotsPerBlock)
	slot := p.publish(t, dir(map[string]*daxfs.Node{"f": file(p.s.put([]byte("before")))}))
	small := p.g
	p.g.Blocks += 10
	if err := daxfs.GrowLive(&failingWriter{}, p.g); !errors.Is(err, errDisk) {
		t.Errorf("error %v, expected %v", err, errDisk)
	}
	if err := daxfs.GrowLive(&p.s.f, p.g); err != nil {
		t.Fatal(err)
	}
	if _, err := daxfs.OpenLive(&p.s.f, int64(small.Blocks)*daxfs.BlockSize); !errors.Is(err, daxfs.ErrCorrupt) {
		t.Errorf("without the new blocks: error %v, expected %v", err, daxfs.ErrCorrupt)
	}
	p.check(t)
	l, err := daxfs.OpenLive(daxfs.Mem(p.s.f.b), int64(len(p.s.f.b)))
	if err != nil {
		t.Fatal(err)
	}
	if l.Geometry() != p.g {
		t.Errorf("geometry %+v, expected %+v", l.Geometry(), p.g)
	}
	img, err := l.Image(slot)
	if err != nil {
		t.Fatal(err)
	}
	if b, err := img.ReadFile("f"); string(b) != "before" || err != nil {
		t.Errorf("read %q, %v", b, err)
	}
}

// TestLivePlanFiles: a plan lists its files in the order of the tree and separates the inodes that others may share.
func TestLivePlanFiles(t *testing.T) {
	p := newSmallLive(t, 4, daxfs.SlotsPerBlock)
	shared, own := file(p.s.put([]byte("shared"))), file(p.s.put([]byte("own")))
	p.publish(t, dir(map[string]*daxfs.Node{"f": file(shared.Data)}))
	plan, err := daxfs.NewLivePlan(dir(map[string]*daxfs.Node{
		"d": dir(map[string]*daxfs.Node{"new": own}), "empty": file(daxfs.Data{}), "old": shared,
	}), daxfs.Options{}, false)
	if err != nil {
		t.Fatal(err)
	}
	boom := errors.New("boom")
	var te *daxfs.TreeError
	err = plan.Resolve(func(f daxfs.LiveFile) (uint64, daxfs.Data, error) {
		if f.Data == own.Data {
			return 0, f.Data, boom
		}
		return 0, f.Data, nil
	})
	if !errors.Is(err, boom) || !errors.As(err, &te) || te.Path != "/d/new" {
		t.Errorf("error %v, expected %v of /d/new", err, boom)
	}
	if err := plan.Resolve(p.inode); err != nil {
		t.Fatal(err)
	}
	for i, want := range []struct {
		path  string
		data  daxfs.Data
		isNew bool
	}{{"/d/new", own.Data, true}, {"/empty", daxfs.Data{}, true}, {"/old", shared.Data, false}} {
		data, isNew := plan.FileData(i)
		if path := plan.FilePath(i); path != want.path || data != want.data || isNew != want.isNew {
			t.Errorf("file %d is %q, %+v, new %t; expected %+v", i, path, data, isNew, want)
		}
	}
	if err := plan.PlaceLive(p.g, p.next, p.used); err != nil {
		t.Fatal(err)
	}
	for i := range plan.FileCount() {
		f := plan.File(i)
		off := p.g.NidOff(f.Nid) - p.next
		if in := off >= 0 && off < plan.FileSize(); in != f.New {
			t.Errorf("inode of %s at %d of the run, new %t; %d bytes are of files", plan.FilePath(i), off, f.New,
				plan.FileSize())
		}
	}
	if plan.FileSize() <= 0 || plan.FileSize() >= plan.Size() {
		t.Errorf("%d of %d bytes are of files", plan.FileSize(), plan.Size())
	}
}

// TestLiveRootXattrs: a slot refers to a few xattrs, in the first 16 GiB behind the head of the tree.
func TestLiveRootXattrs(t *testing.T) {
	root := dir(nil)
	var te *daxfs.TreeError
	for n := 1; n <= 14; n++ {
		root.Xattrs = append(root.Xattrs, daxfs.Xattr{Name: fmt.Sprintf("user.%d", n)})
		plan, err := daxfs.NewLivePlan(root, daxfs.Options{}, false)
		if n == 14 {
			if !errors.Is(err, daxfs.ErrInvalid) || !errors.As(err, &te) || te.Path != "/" ||
				!strings.Contains(err.Error(), "14 xattrs, expected at most 13") {
				t.Errorf("%d xattrs: error %v", n, err)
			}
			break
		}
		if err != nil {
			t.Fatalf("%d xattrs: %v", n, err)
		}
		if err := plan.Resolve(nil); err != nil {
			t.Fatal(err)
		}
		g := daxfs.Geometry{Slots: 2, PerBlock: 1, Head: daxfs.BlockSize, Blocks: 1 << 23}
		if err := plan.PlaceLive(g, 16<<30-plan.Size(), 0); err != nil {
			t.Errorf("in the first 16 GiB: %v", err)
		}
		err = plan.PlaceLive(g, 16<<30+g.Head-plan.Size(), 0)
		if !errors.As(err, &te) || te.Path != "/" || !errors.Is(err, daxfs.ErrInvalid) {
			t.Errorf("behind the first 16 GiB: error %v, expected %v of /", err, daxfs.ErrInvalid)
		}
	}
}

// A root directory without permissions is an image like any other: half of its mode is zero.
func TestLiveRootMode(t *testing.T) {
	for _, mode := range []uint32{0, 0o400, 0o1000, 0o7777} {
		p := newSmallLive(t, 4, daxfs.SlotsPerBlock)
		root := dir(nil)
		root.Mode = unix.S_IFDIR | mode
		slot := p.publish(t, root)
		p.check(t)
		l, err := p.openLive()
		if err != nil {
			t.Fatal(err)
		}
		img, err := l.Image(slot)
		if err != nil {
			t.Errorf("mode %#o: %v", mode, err)
			continue
		}
		if in, err := img.Inode(img.Root()); err != nil || in.Mode != root.Mode {
			t.Errorf("mode %#o: read %#o, %v", mode, in.Mode, err)
		}
	}
}

// TestLiveImageRefuses: what is no directory is no image, and neither is a slot outside of the tree.
func TestLiveImageRefuses(t *testing.T) {
	p := newSmallLive(t, 4, daxfs.SlotsPerBlock)
	for range p.g.Slots {
		p.publish(t, dir(nil))
	}
	binary.LittleEndian.PutUint16(p.s.f.b[p.g.SlotOff(2)+4:], unix.S_IFIFO|0o600)
	clear(p.s.f.b[p.g.SlotOff(2)+8:][:8]) // the size
	p.s.f.b[p.g.SlotOff(1)+1] = 1         // the format
	copy(p.s.f.b[p.g.SlotOff(3)+daxfs.SlotSize:], p.s.f.b[p.g.SlotOff(3):][:daxfs.SlotSize])
	l, err := p.openLive()
	if err != nil {
		t.Fatal(err)
	}
	for i, want := range map[int]error{
		-1: fs.ErrNotExist, 0: nil, 1: daxfs.ErrUnsupported, 2: daxfs.ErrCorrupt, 3: nil, 4: fs.ErrNotExist,
	} {
		if _, err := l.Image(i); !errors.Is(err, want) {
			t.Errorf("slot %d: %v, expected %v", i, err, want)
		}
	}
}

// Files that differ in anything a reader sees have no inode in common.
func TestLiveKeys(t *testing.T) {
	body := []byte("x")
	for name, change := range map[string]func(n *daxfs.Node){
		"nothing":     func(*daxfs.Node) {},
		"permissions": func(n *daxfs.Node) { n.Mode |= 0o111 },
		"setuid":      func(n *daxfs.Node) { n.Mode |= unix.S_ISUID },
		"uid":         func(n *daxfs.Node) { n.UID++ },
		"gid":         func(n *daxfs.Node) { n.GID++ },
		"seconds":     func(n *daxfs.Node) { n.Mtime.Sec-- },
		"nanoseconds": func(n *daxfs.Node) { n.Mtime.Nsec++ },
		"xattr value": func(n *daxfs.Node) { n.Xattrs = []daxfs.Xattr{{Name: "user.a", Value: []byte("2")}} },
		"xattr name":  func(n *daxfs.Node) { n.Xattrs = []daxfs.Xattr{{Name: "user.b", Value: []byte("1")}} },
		"no xattr":    func(n *daxfs.Node) { n.Xattrs = nil },
		"more xattrs": func(n *daxfs.Node) { n.Xattrs = append(n.Xattrs, daxfs.Xattr{Name: "user.z"}) },
	} {
		p := newSmallLive(t, 4, daxfs.SlotsPerBlock)
		make := func() *daxfs.Node {
			return &daxfs.Node{
				Mode: unix.S_IFREG | 0o600, UID: 7, GID: 7, Mtime: daxfs.Time{Sec: 9, Nsec: 9}, Data: p.s.put(body),
				Xattrs: []daxfs.Xattr{{Name: "user.a", Value: []byte("1")}},
			}
		}
		other := make()
		change(other)
		p.publish(t, dir(map[string]*daxfs.Node{"f": make()}))
		p.publish(t, dir(map[string]*daxfs.Node{"f": other}))
		p.check(t)
		l, err := p.openLive()
		if err != nil {
			t.Fatal(err)
		}
		a, err := l.FS().Lookup("00000/f", false)
		if err != nil {
			t.Fatal(err)
		}
		b, err := l.FS().Lookup("00001/f", false)
		if err != nil {
			t.Fatal(err)
		}
		if (a.Nid == b.Nid) != (name == "nothing") {
			t.Errorf("%s: inodes %d and %d", name, a.Nid, b.Nid)
		}
	}
}

// TestPlaceLiveRefuses: a run, and the contents that it refers to, lie in the file system and behind the slots.
func TestPlaceLiveRefuses(t *testing.T) {
	const block = daxfs.BlockSize
	g := daxfs.Geometry{Slots: 2, PerBlock: 1, Head: block, Blocks: 64}
	end := int64(g.Blocks) * block
	last := func(plan *daxfs.LivePlan) int64 { return end - plan.Size() }
	at := func(off int64) func(*daxfs.LivePlan) int64 { return func(*daxfs.LivePlan) int64 { return off } }
	first := at(g.TreeStart())
	place := func(d daxfs.Data, off func(*daxfs.LivePlan) int64, slot int) error {
		plan, err := daxfs.NewLivePlan(dir(map[string]*daxfs.Node{"f": file(daxfs.Data{Off: 0, Size: d.Size})}),
			daxfs.Options{}, false)
		if err != nil {
			t.Fatal(err)
		}
		err = plan.Resolve(func(daxfs.LiveFile) (uint64, daxfs.Data, error) { return 0, d, nil })
		if err != nil {
			t.Fatal(err)
		}
		return plan.PlaceLive(g, off(plan), slot)
	}
	ok := daxfs.Data{Off: 32 * block, Size: 1}
	for name, c := range map[string]struct {
		data daxfs.Data
		off  func(*daxfs.LivePlan) int64
		slot int
		good bool
	}{
		"first place":         {ok, first, 0, true},
		"last slot":           {ok, first, 1, true},
		"last place":          {ok, last, 0, true},
		"contents at the end": {daxfs.Data{Off: end - 2*block, Size: block + 1}, first, 0, true},
		"empty contents":      {daxfs.Data{Off: end}, first, 0, true},
		"negative slot":       {ok, first, -1, false},
		"slot too high":       {ok, first, 2, false},
		"in the slots":        {ok, at(g.TreeStart() - block), 0, false},
		"misaligned":          {ok, at(g.TreeStart() + 1), 0, false},
		"over the end":        {ok, func(plan *daxfs.LivePlan) int64 { return last(plan) + block }, 0, false},
		"contents before":     {daxfs.Data{Off: -block, Size: 1}, first, 0, false},
		"contents behind":     {daxfs.Data{Off: end, Size: 1}, first, 0, false},
		"contents over":       {daxfs.Data{Off: end - block, Size: block + 1}, first, 0, false},
	} {
		err := place(c.data, c.off, c.slot)
		if c.good && err != nil || !c.good && !errors.Is(err, daxfs.ErrInvalid) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// TestLiveCheckOptions: a check looks at what its options name, and ends when no more findings are wanted.
func TestLiveCheckOptions(t *testing.T) {
	p := newSmallLive(t, 4, daxfs.SlotsPerBlock)
	for _, name := range []string{"a", "b", "c"} {
		p.publish(t, dir(map[string]*daxfs.Node{name: file(p.s.put([]byte(name)))}))
	}
	l, err := p.openLive()
	if err != nil {
		t.Fatal(err)
	}
	at := func(path string) daxfs.Inode {
		in, err := l.FS().Lookup(path, false)
		if err != nil {
			t.Fatal(err)
		}
		return in
	}
	for _, path := range []string{"00000/a", "00002/c"} {
		binary.LittleEndian.PutUint32(p.s.f.b[p.g.NidOff(at(path).Nid)+44:], 7)
	}
	b := at("00001/b")
	p.s.f.b[b.Off+b.Size]++
	const a, c, tail = "inode-nlink /00000/a", "inode-nlink /00002/c", "data-tail "
	only := func(slot int) daxfs.LiveCheckOptions {
		return daxfs.LiveCheckOptions{Slots: func(i int) bool { return i == slot }}
	}
	for name, want := range map[string]struct {
		opts daxfs.LiveCheckOptions
		most int
		list []string
	}{
		"all":            {daxfs.LiveCheckOptions{}, 9, []string{a, c, tail}},
		"no tails":       {daxfs.LiveCheckOptions{SkipTails: true}, 9, []string{a, c}},
		"first finding":  {daxfs.LiveCheckOptions{}, 1, []string{a}},
		"first slot":     {only(0), 9, []string{a}},
		"second slot":    {only(1), 9, []string{tail}},
		"third slot":     {only(2), 9, []string{c}},
		"an empty slot":  {only(3), 9, nil},
		"no tails of it": {daxfs.LiveCheckOptions{Slots: only(1).Slots, SkipTails: true}, 9, nil},
	} {
		var got []string
		err := daxfs.CheckLive(daxfs.Mem(p.s.f.b), int64(len(p.s.f.b)), want.opts, func(f daxfs.Finding) bool {
			got = append(got, fmt.Sprint(f.Rule, " ", f.Path))
			return len(got) < want.most
		})
		if !slices.Equal(got, want.list) || len(got) > 0 != errors.Is(err, daxfs.ErrCorrupt) {
			t.Errorf("%s: found %q, %v; expected %q", name, got, err, want.list)
		}
	}
}
