package daxfs_test

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io/fs"
	"runtime"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/daxfs/daxfs-snapshotter/daxfs"
	"github.com/daxfs/daxfs-snapshotter/daxfs/internal/disk"
)

// crowd is an image with a large directory, 300 small ones, a large xattr and an inode with many shared ones.
func crowd(t testing.TB) *surgeon {
	t.Helper()
	root := dir(map[string]*daxfs.Node{"big": dir(nil)})
	root.Entries["big"].Entries = map[string]*daxfs.Node{}
	for i := range 2000 {
		root.Entries["big"].Entries[fmt.Sprintf("%d-%s", i, strings.Repeat("b", 100))] = &daxfs.Node{Mode: unix.S_IFREG}
	}
	// Every four bytes of the value start an xattr of 64 KiB with a name of one byte in "user.".
	pattern := bytes.Repeat([]byte{1, disk.ErofsXattrUser, 0xff, 0xff}, 16380)
	root.Entries["big"].Xattrs = []daxfs.Xattr{{Name: "user.large", Value: pattern}}
	for i := range 300 {
		d := dir(map[string]*daxfs.Node{"x": dir(nil)})
		for k := range 255 { // larger than a reference, so they are shared
			d.Xattrs = append(d.Xattrs, daxfs.Xattr{Name: fmt.Sprintf("user.many-%d", k), Value: []byte("shared")})
		}
		root.Entries[fmt.Sprintf("dir-%d", i)] = d
	}
	_, b := newStore(daxfs.BlockSize).fileImage(t, root, daxfs.Options{})
	return operate(t, b)
}

// TestCheckHostile checks images whose overlapping structures have far more bytes than the image.
func TestCheckHostile(t *testing.T) {
	sound := crowd(t).b
	for _, c := range []struct {
		name string
		edit func(s *surgeon, path string)
	}{
		{"directories", func(s *surgeon, path string) {
			var big disk.ErofsInode
			big.Unmarshal(s.raw("big"))
			s.inode(path, func(i *disk.ErofsInode) {
				i.Layout, i.Size, i.Union = disk.ErofsLayoutPlain, big.Size&^4095, big.Union
			})
		}},
		{"DAXFS directories", func(s *surgeon, path string) {
			var big disk.V8Inode
			big.Unmarshal(s.rawV8("big"))
			s.inodeV8(path, func(i *disk.V8Inode) { i.Size, i.DataOff = big.Size, big.DataOff })
		}},
		{"xattrs", func(s *surgeon, path string) { s.inode(path, func(i *disk.ErofsInode) { i.XattrCount = 65535 }) }},
		{"shared xattrs", func(s *surgeon, path string) {
			at := bytes.Index(s.b, bytes.Repeat([]byte{1, disk.ErofsXattrUser, 0xff, 0xff}, 100))
			id := uint32(int64(at)-s.meta()+int64(s.lookup(path).Nid%64)*4*200) / 4
			for ids := s.xattrs(path)[disk.ErofsXattrHdrSize:][:255*4]; len(ids) > 0; ids = ids[4:] {
				binary.LittleEndian.PutUint32(ids, id)
				id++
			}
		}},
	} {
		t.Run(c.name, func(t *testing.T) {
			s := operate(t, bytes.Clone(sound))
			for i := range 300 {
				c.edit(s, fmt.Sprintf("dir-%d", i))
			}
			b := s.close()
			rules := map[daxfs.Rule]int{}
			var before, after runtime.MemStats
			runtime.ReadMemStats(&before)
			err := daxfs.Check(bytes.NewReader(b), int64(len(b)), func(f daxfs.Finding) bool {
				rules[f.Rule]++
				if f.Rule == daxfs.RuleMetaOverlap && strings.Contains(f.Msg, "than the image has") {
					rules["budget"]++
				}
				return true
			})
			runtime.ReadMemStats(&after)
			if err == nil || rules["budget"] == 0 {
				t.Errorf("got %v, %v", rules, err)
			}
			// Otherwise each of the 300 would be read completely.
			if n, limit := after.TotalAlloc-before.TotalAlloc, uint64(40*len(b)); n > limit {
				t.Errorf("%d bytes allocated for an image of %d, want at most %d", n, len(b), limit)
			}
		})
	}
}

// TestWalkLoops: walks by path end in images whose directories form loops.
func TestWalkLoops(t *testing.T) {
	sound := patient(t)
	for _, name := range []string{
		"directory with two names", "directory below itself", "root below itself",
		"DAXFS directory with two names", "DAXFS root below itself",
	} {
		s := operate(t, bytes.Clone(sound))
		s.corrupt(name)
		b := s.close()
		s = operate(t, b)
		if strings.HasPrefix(name, "DAXFS") {
			wantLoop(t, name, s.d.Walk, s.d, daxfs.RuleV8DirLoop)
		} else {
			wantLoop(t, name, s.f.Walk, s.f, daxfs.RuleDirLoop)
		}
	}
}

func wantLoop(t *testing.T, name string, walk func(func(string, daxfs.Inode) error) error, fsys fs.FS,
	rule daxfs.Rule,
) {
	t.Helper()
	var f *daxfs.FormatError
	if err := walk(func(string, daxfs.Inode) error { return nil }); !errors.As(err, &f) || f.Rule != rule {
		t.Errorf("%s: walk: got %v, want rule %s", name, err, rule)
	}
	bad := 0
	err := fs.WalkDir(fsys, ".", func(path string, _ fs.DirEntry, err error) error {
		if errors.As(err, &f) && (f.Rule == rule || f.Rule == daxfs.RuleDots) {
			bad++
		}
		return nil
	})
	if err != nil || bad == 0 {
		t.Errorf("%s: got %v and %d errors, want rule %s", name, err, bad, rule)
	}
}
