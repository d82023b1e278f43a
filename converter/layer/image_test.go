package layer_test

import (
	"context"
	"errors"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/daxfs/daxfs-snapshotter/converter/layer"
	"github.com/daxfs/daxfs-snapshotter/converter/tree"
	"github.com/daxfs/daxfs-snapshotter/daxfs"
	. "github.com/daxfs/daxfs-snapshotter/internal/treetest"
)

// oddTree has features that a tar or a directory cannot have, or rarely has.
func oddTree(t *testing.T, s *Store) *daxfs.Node {
	t.Helper()
	put := func(text string) daxfs.Data {
		d, err := s.Put(t.Context(), int64(len(text)), strings.NewReader(text))
		if err != nil {
			t.Fatal(err)
		}
		return d
	}
	acl := daxfs.Xattr{Name: "system.posix_acl_default", Value: []byte(
		"\x02\x00\x00\x00\x01\x00\x07\x00\xff\xff\xff\xff\x04\x00\x05\x00\xff\xff\xff\xff" +
			"\x20\x00\x05\x00\xff\xff\xff\xff")}
	dir := func(entries map[string]*daxfs.Node) *daxfs.Node {
		return &daxfs.Node{Mode: unix.S_IFDIR | 0o755, Entries: entries, Mtime: daxfs.Time{Sec: 7, Nsec: 8}}
	}
	file := &daxfs.Node{
		Mode: unix.S_IFREG | 0o4751, UID: 1<<32 - 2, GID: 70_000, Data: put("text"),
		Mtime: daxfs.Time{Sec: -1, Nsec: 999_999_999},
	}
	null := &daxfs.Node{Mode: unix.S_IFCHR | 0o666, Rdev: unix.Mkdev(1, 3)}
	link := &daxfs.Node{Mode: unix.S_IFLNK | 0o777, Target: "../nowhere"}
	withACL := dir(map[string]*daxfs.Node{
		"inherits nothing": {Mode: unix.S_IFREG | 0o666, Data: put("text")},
		"subdirectory":     dir(nil),
	})
	withACL.Xattrs = []daxfs.Xattr{acl, {Name: "trusted.overlay.opaque", Value: []byte("y")}}
	withACL.Mode |= unix.S_ISGID
	return dir(map[string]*daxfs.Node{
		"a":             dir(map[string]*daxfs.Node{"file": file, "link": link, "null": null}),
		"acl":           withACL,
		"again":         file,
		"link again":    link,
		"null again":    null,
		"zero device":   {Mode: unix.S_IFCHR, Rdev: 0},
		".wh.no marker": {Mode: unix.S_IFREG | 0o600},
		"socket":        {Mode: unix.S_IFSOCK | 0o700},
		"fifo":          {Mode: unix.S_IFIFO | 0o700, Xattrs: []daxfs.Xattr{{Name: "trusted.empty"}}},
		"\xff\n":        {Mode: unix.S_IFREG | 0o600, Data: put(strings.Repeat("n", 10_000))},
	})
}

func open(t *testing.T, s *Store, root *daxfs.Node) *daxfs.FS {
	t.Helper()
	img, err := s.Image(root, daxfs.Options{})
	if err != nil {
		t.Fatal(err)
	}
	fsys, err := daxfs.OpenBytes(img)
	if err != nil {
		t.Fatal(err)
	}
	return fsys
}

// TestFromImage: the tree of an image gives an image with the same UUID, which covers everything visible.
func TestFromImage(t *testing.T) {
	s := &Store{}
	fsys := open(t, s, oddTree(t, s))
	again := &Store{}
	l, err := layer.FromImage(t.Context(), fsys, again, layer.Limits{})
	if err != nil {
		t.Fatal(err)
	}
	root, err := tree.Merge([]*layer.Layer{l})
	if err != nil {
		t.Fatal(err)
	}
	if got, want := open(t, again, root).Super(), fsys.Super(); got.UUID != want.UUID || got.Inodes != want.Inodes {
		t.Errorf("UUID %x and %d inodes, expected %x and %d", got.UUID, got.Inodes, want.UUID, want.Inodes)
	}
	a := root.Entries["a"].Entries
	if a["file"] != root.Entries["again"] || a["link"] != root.Entries["link again"] {
		t.Error("hard links have become files")
	}
	if l.Stats.Files != 3 || l.Stats.Bytes != 10_008 || l.Stats.Entries != 16 {
		t.Errorf("stats %+v", l.Stats)
	}
}

func TestFromImageErrors(t *testing.T) {
	s := &Store{}
	fsys := open(t, s, oddTree(t, s))
	full := errors.New("no space")
	ended, cancel := context.WithCancel(t.Context())
	cancel()
	for name, c := range map[string]struct {
		ctx   context.Context
		store layer.Store
		lim   layer.Limits
		is    error
	}{
		"full store": {t.Context(), brokenStore{full}, layer.Limits{}, full},
		"cancelled":  {ended, &Store{}, layer.Limits{}, context.Canceled},
		"entries":    {t.Context(), &Store{}, layer.Limits{MaxEntries: 3}, layer.ErrLimit},
		"bytes":      {t.Context(), &Store{}, layer.Limits{MaxBytes: 9_000}, layer.ErrLimit},
		"xattrs":     {t.Context(), &Store{}, layer.Limits{MaxXattrBytes: 10}, layer.ErrLimit},
		"names":      {t.Context(), &Store{}, layer.Limits{MaxMetaBytes: 10}, layer.ErrLimit},
		"depth":      {t.Context(), &Store{}, layer.Limits{MaxDepth: 1}, layer.ErrLimit},
	} {
		if _, err := layer.FromImage(c.ctx, fsys, c.store, c.lim); !errors.Is(err, c.is) {
			t.Errorf("%s: error %v, expected %v", name, err, c.is)
		}
	}
}
