package daxfs_test

import (
	"bytes"
	"crypto/sha256"
	"errors"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/daxfs/daxfs-snapshotter/daxfs"
	"github.com/daxfs/daxfs-snapshotter/daxfs/internal/disk"
)

// dataOf returns the contents of files in b as TreeUUID asks for them.
func dataOf(t testing.TB, b []byte) func(daxfs.Inode) (daxfs.Data, error) {
	return func(in daxfs.Inode) (daxfs.Data, error) {
		off, size, ok := in.Data()
		if !ok || size == 0 {
			t.Errorf("asked for the data of inode %d of mode %#o with %d bytes", in.Nid, in.Mode, size)
			return daxfs.Data{}, nil
		}
		return daxfs.Data{Off: off, Size: size, Sum: sha256.Sum256(b[off:][:size])}, nil
	}
}

// TestTreeUUID: the UUID of a tree that was read is that of its plan, wherever the image lies.
func TestTreeUUID(t *testing.T) {
	want := func(name string, f *daxfs.FS, b []byte, uuid [16]byte) {
		t.Helper()
		if got, err := daxfs.TreeUUID(f, dataOf(t, b)); err != nil || got != uuid {
			t.Errorf("%s: UUID %x, %v; its plan has %x", name, got, err, uuid)
		}
	}
	for seed := range uint64(8) {
		n := 1 << (seed + 2)
		s := newStore(daxfs.BlockSize)
		p, b := s.fileImage(t, randomTree(seed, n, s), daxfs.Options{})
		want("file", operate(t, b).f, b, p.UUID())

		s = newStore(4 << 20)
		window, b := s.windowImage(t, randomTree(seed, n, s), 1<<20)
		want("window", operate(t, b).f, b, window.UUID())
		if window.UUID() != p.UUID() {
			t.Errorf("seed %d: the plans have the UUIDs %x and %x", seed, p.UUID(), window.UUID())
		}
	}

	p := newSmallLive(t, 4, daxfs.SlotsPerBlock)
	linked := file(p.s.put([]byte("linked")))
	for _, root := range []*daxfs.Node{
		dir(nil),
		dir(map[string]*daxfs.Node{"a": linked, "b": linked, "z": dir(map[string]*daxfs.Node{"c": linked})}),
		dir(map[string]*daxfs.Node{"a": file(linked.Data), "b": symlink("a"), "n": {
			Mode: unix.S_IFBLK | 0o660, Rdev: unix.Mkdev(8, 300),
		}}),
	} {
		slot, bytes, plan := p.write(t, root)
		if err := daxfs.PublishSlot(&p.s.f, p.g, slot, bytes, func() error { return nil }); err != nil {
			t.Fatal(err)
		}
		l, err := p.openLive()
		if err != nil {
			t.Fatal(err)
		}
		img, err := l.Image(slot)
		if err != nil {
			t.Fatal(err)
		}
		want("live", img, p.s.f.b, plan.UUID())
	}
}

// TestTreeUUIDRefuses: an image that shows no tree, or not the tree of a plan, has no UUID.
func TestTreeUUIDRefuses(t *testing.T) {
	sound := patient(t)
	for name, c := range map[string]struct {
		rule daxfs.Rule
		edit func(*surgeon) // nil: that of the corruption
	}{
		"directory with two names":   {daxfs.RuleDirLoop, nil},
		"directory below itself":     {daxfs.RuleDirLoop, nil},
		"root below itself":          {daxfs.RuleDirLoop, nil},
		"names that cross":           {daxfs.RuleDirBlock, nil},
		"inode after the end":        {daxfs.RuleNid, nil},
		"no file type":               {daxfs.RuleMode, nil},
		"NUL in a target":            {daxfs.RuleSymlink, nil},
		"xattr of another namespace": {daxfs.RuleXattrName, nil},
		"shared xattr after the end": {daxfs.RuleXattrBounds, nil},
		"space behind the last entry": {daxfs.RuleDirBlock, func(s *surgeon) {
			s.inode("dir", func(i *disk.ErofsInode) { i.Size++ })
		}},
	} {
		s := operate(t, bytes.Clone(sound))
		if c.edit != nil {
			c.edit(s)
		} else {
			s.corrupt(name)
		}
		b := s.close()
		var fe *daxfs.FormatError
		id, err := daxfs.TreeUUID(operate(t, b).f, dataOf(t, b))
		if !errors.As(err, &fe) || fe.Rule != c.rule || !errors.Is(err, daxfs.ErrCorrupt) &&
			!errors.Is(err, daxfs.ErrUnsupported) || id != [16]byte{} {
			t.Errorf("%s: UUID %x, %v; expected rule %s", name, id, err, c.rule)
		}
	}

	boom := errors.New("boom")
	_, err := daxfs.TreeUUID(operate(t, sound).f, func(daxfs.Inode) (daxfs.Data, error) { return daxfs.Data{}, boom })
	if !errors.Is(err, boom) {
		t.Errorf("error %v, expected that of the function", err)
	}
}

// TestTreeUUIDOfChanging: a directory that gets more entries between the two reads gives an error.
func TestTreeUUIDOfChanging(t *testing.T) {
	s := newStore(daxfs.BlockSize)
	_, b := s.fileImage(t, dir(map[string]*daxfs.Node{
		"a": file(s.put([]byte("a"))), "big": dir(map[string]*daxfs.Node{"1": dir(nil), "2": dir(nil)}),
		"d": dir(map[string]*daxfs.Node{"z": dir(nil)}),
	}), daxfs.Options{})
	o := operate(t, b)
	big := o.lookup("big").Nid
	data := dataOf(t, b)
	_, err := daxfs.TreeUUID(o.f, func(in daxfs.Inode) (daxfs.Data, error) {
		o.dirent("d", "z", func(d *disk.ErofsDirent) { d.Nid = big })
		return data(in)
	})
	var fe *daxfs.FormatError
	if !errors.As(err, &fe) || fe.Rule != daxfs.RuleDirBlock || !strings.Contains(err.Error(), "changed") {
		t.Errorf("error %v, expected that the directory changed", err)
	}
}
