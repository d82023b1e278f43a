package fusefs

import (
	"encoding/binary"
	"errors"
	"log"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"unsafe"

	"github.com/hanwen/go-fuse/v2/fuse"
	"golang.org/x/sys/unix"

	"github.com/daxfs/daxfs-snapshotter/daxfs"
	"github.com/daxfs/daxfs-snapshotter/mount"
	"github.com/daxfs/daxfs-snapshotter/mount/internal/mounttest"
)

// liveServer answers for a pool, without a kernel.
func liveServer(t *testing.T) (*server, *mounttest.LivePool) {
	t.Helper()
	p := mounttest.NewLivePool(t, filepath.Join(t.TempDir(), "pool"), false)
	b, err := unix.Mmap(int(p.File.Fd()), 0, int(p.Size), unix.PROT_READ, unix.MAP_SHARED)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { unix.Munmap(b) })
	img, err := daxfs.OpenBytes(b)
	if err != nil {
		t.Fatal(err)
	}
	s := newServer(img, log.New(t.Output(), "", 0))
	s.live = true
	return s, p
}

func lookup(s *server, dir uint64, name string) (fuse.EntryOut, fuse.Status) {
	var out fuse.EntryOut
	st := s.Lookup(nil, &fuse.InHeader{NodeId: dir}, name, &out)
	return out, st
}

// A slot is missing until its image is published. The kernel must ask again: a reply OK with node 0 would
// make it remember that the name is missing.
func TestSlotAppears(t *testing.T) {
	s, p := liveServer(t)
	next := p.Prepare(t, map[string]string{"file": "x"})
	for _, name := range []string{next.Name, "no slot"} {
		if out, st := lookup(s, fuse.FUSE_ROOT_ID, name); st != fuse.ENOENT || out.EntryValid != 0 {
			t.Errorf("slot %q: %v, valid for %d seconds; expected ENOENT", name, st, out.EntryValid)
		}
	}
	p.Show(t, next)
	slot, st := lookup(s, fuse.FUSE_ROOT_ID, next.Name)
	if !st.Ok() || slot.NodeId != next.Nid+nodeBias || slot.Mode&unix.S_IFMT != unix.S_IFDIR ||
		slot.Generation != uint64(mount.Generation(p.G.UUID)) {
		t.Errorf("published slot: %v, %+v", st, slot)
	}
	// Inside of an image, names never change.
	if out, st := lookup(s, slot.NodeId, "missing"); !st.Ok() || out.NodeId != 0 || out.EntryValid != forever {
		t.Errorf("missing name in an image: %v, node %d, valid for %d seconds", st, out.NodeId, out.EntryValid)
	}
	// The kernel asks for "/" if it has an inode without a name.
	for _, node := range []uint64{fuse.FUSE_ROOT_ID, slot.NodeId} {
		if out, st := lookup(s, node, "/"); !st.Ok() || out.NodeId != node {
			t.Errorf("node %d by handle: %v, node %d", node, st, out.NodeId)
		}
	}
	// Listing the root names the slots but looks none up.
	list := fuse.NewDirEntryList(make([]byte, 4096), 0)
	if st := s.ReadDirPlus(nil, &fuse.ReadIn{InHeader: fuse.InHeader{NodeId: fuse.FUSE_ROOT_ID}}, list); !st.Ok() {
		t.Fatal(st)
	}
	slots := 0
	for b := list.Bytes(); len(b) > 0; slots++ {
		const entrySize, direntSize = int(unsafe.Sizeof(fuse.EntryOut{})), 24
		if node := binary.LittleEndian.Uint64(b); node != 0 {
			t.Errorf("entry %d of the listing of the root looks up node %d", slots, node)
		}
		nameLen := int(binary.LittleEndian.Uint32(b[entrySize+16:]))
		b = b[entrySize+direntSize+(nameLen+7)&^7:]
	}
	if slots < 3 {
		t.Errorf("the listing of the root has %d entries", slots)
	}
}

// Files of a removed image stay readable for processes that have them open, and nobody else gets them.
func TestErasedFile(t *testing.T) {
	s, p := liveServer(t)
	img := p.Publish(t, map[string]string{"file": "contents"})
	slot, st := lookup(s, fuse.FUSE_ROOT_ID, img.Name)
	if !st.Ok() {
		t.Fatal(st)
	}
	file, st := lookup(s, slot.NodeId, "file")
	if !st.Ok() {
		t.Fatal(st)
	}
	p.Retract(t, img)
	if err := p.Erase(img.Nids["file"]); err != nil {
		t.Fatal(err)
	}
	stale := fuse.Status(unix.ESTALE)
	h := fuse.InHeader{NodeId: file.NodeId}
	if st := s.GetAttr(nil, &fuse.GetAttrIn{InHeader: h}, new(fuse.AttrOut)); st != stale {
		t.Errorf("attributes: %v, expected ESTALE", st)
	}
	if _, st := lookup(s, file.NodeId, "/"); st != stale {
		t.Errorf("by handle: %v, expected ESTALE", st)
	}
	if got, st := readNode(s, file.NodeId, 0, 100); !st.Ok() || got != "contents" {
		t.Errorf("read %q, %v", got, st)
	}
	s.live = false // an image file has no removed files: its inode is damaged
	if _, st := readNode(s, file.NodeId, 0, 100); st == stale || st.Ok() {
		t.Errorf("read from an image file: %v", st)
	}
}

// readNode reads from a node as the kernel does.
func readNode(s *server, node, off uint64, size int) (string, fuse.Status) {
	buf := make([]byte, size)
	res, st := s.Read(nil, &fuse.ReadIn{InHeader: fuse.InHeader{NodeId: node}, Offset: off, Size: uint32(size)}, buf)
	if !st.Ok() {
		return "", st
	}
	defer res.Done()
	b, st := res.Bytes(buf)
	return string(b), st
}

// The end of a small file may lie beside its inode. A reply that stops there would be the end of the file.
func TestReadAcrossPieces(t *testing.T) {
	if _, err := exec.LookPath("mkfs.erofs"); err != nil {
		t.Skip("mkfs.erofs is not installed (erofs-utils)")
	}
	tree, path := t.TempDir(), filepath.Join(t.TempDir(), "image")
	want := strings.Repeat("0123456789", daxfs.BlockSize/10+20)
	if err := os.WriteFile(filepath.Join(tree, "f"), []byte(want), 0o644); err != nil {
		t.Fatal(err)
	}
	if out, err := exec.Command("mkfs.erofs", "--quiet", path, tree).CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	img, err := daxfs.OpenBytes(b)
	if err != nil {
		t.Fatal(err)
	}
	s := newServer(img, log.New(t.Output(), "", 0))
	file, st := lookup(s, fuse.FUSE_ROOT_ID, "f")
	if !st.Ok() {
		t.Fatal(st)
	}
	for _, off := range []int{0, 4000, daxfs.BlockSize, len(want) - 1, len(want)} {
		if got, st := readNode(s, file.NodeId, uint64(off), 8192); !st.Ok() || got != want[off:] {
			t.Errorf("read at %d: %d bytes, %v; expected %d", off, len(got), st, len(want)-off)
		}
	}
}

// Requests that do not fit the type of the inode, or the buffer of the caller.
func TestErrnos(t *testing.T) {
	s, p := liveServer(t)
	img := p.Publish(t, map[string]string{"file": "contents"})
	dir, st := lookup(s, fuse.FUSE_ROOT_ID, img.Name)
	if !st.Ok() {
		t.Fatal(st)
	}
	file := fuse.InHeader{NodeId: img.Nids["file"] + nodeBias}
	nothing := fuse.InHeader{NodeId: 1 << 50}
	list := func(h fuse.InHeader) fuse.Status {
		return s.ReadDir(nil, &fuse.ReadIn{InHeader: h}, fuse.NewDirEntryList(make([]byte, 4096), 0))
	}
	for name, tc := range map[string]struct {
		got  func() fuse.Status
		want unix.Errno
	}{
		"read a directory": {func() fuse.Status { _, st := readNode(s, dir.NodeId, 0, 10); return st }, unix.EINVAL},
		"readlink a file":  {func() fuse.Status { _, st := s.Readlink(nil, &file); return st }, unix.EINVAL},
		"list a file":      {func() fuse.Status { return list(file) }, unix.ENOTDIR},
		"look up in a file": {
			func() fuse.Status { _, st := lookup(s, file.NodeId, "x"); return st }, unix.ENOTDIR,
		},
		"no such attribute": {
			func() fuse.Status { _, st := s.GetXAttr(nil, &file, "user.x", nil); return st }, unix.ENODATA,
		},
		"no such inode": {
			func() fuse.Status { return s.GetAttr(nil, &fuse.GetAttrIn{InHeader: nothing}, new(fuse.AttrOut)) },
			unix.EUCLEAN,
		},
		"list no inode":     {func() fuse.Status { return list(nothing) }, unix.EUCLEAN},
		"readlink no inode": {func() fuse.Status { _, st := s.Readlink(nil, &nothing); return st }, unix.EUCLEAN},
		"a bug":             {func() fuse.Status { return s.panicked("a bug") }, unix.EIO},
		"an unknown error":  {func() fuse.Status { return s.errno(1, errors.New("unknown")) }, unix.EIO},
	} {
		if got := tc.got(); got != fuse.Status(tc.want) {
			t.Errorf("%s: %v, expected %v", name, got, tc.want)
		}
	}
}

// A listing goes on where the last reply was full, whatever the size of the replies.
func TestListingInParts(t *testing.T) {
	s, p := liveServer(t)
	files := map[string]string{}
	for _, name := range []string{"a", "b", "c", "long-name-of-a-file"} {
		files[name] = name
	}
	img := p.Publish(t, files)
	h := fuse.InHeader{NodeId: img.Nid + nodeBias}
	if st := s.ReadDir(nil, &fuse.ReadIn{InHeader: h}, fuse.NewDirEntryList(make([]byte, 8), 0)); !st.Ok() {
		t.Errorf("a buffer too small for any entry: %v", st)
	}
	got := map[string]string{}
	at := uint64(0)
	for range 20 {
		list := fuse.NewDirEntryList(make([]byte, 48), at) // one entry, the long name or a short one
		if st := s.ReadDir(nil, &fuse.ReadIn{InHeader: h, Offset: at}, list); !st.Ok() {
			t.Fatal(st)
		}
		entries, err := fuse.ParseDirEntries(list.Bytes())
		if err != nil {
			t.Fatal(err)
		}
		if len(entries) == 0 {
			break
		}
		for _, e := range entries {
			got[e.Name], at = e.Name, e.Off
		}
	}
	files["."], files[".."] = ".", ".."
	if !maps.Equal(got, files) {
		t.Errorf("listed %v, expected %v", got, files)
	}
}

// A kernel that cannot do without open and opendir is told to keep its cache.
func TestOpenReplies(t *testing.T) {
	s, _ := liveServer(t)
	for _, no := range []bool{false, true} {
		s.noOpen.Store(no)
		s.noOpendir.Store(no)
		var file, dir fuse.OpenOut
		st1, st2 := s.Open(nil, new(fuse.OpenIn), &file), s.OpenDir(nil, new(fuse.OpenIn), &dir)
		if no {
			if st1 != fuse.ENOSYS || st2 != fuse.ENOSYS {
				t.Errorf("open %v, opendir %v; expected ENOSYS", st1, st2)
			}
			continue
		}
		if !st1.Ok() || !st2.Ok() || file.OpenFlags != fuse.FOPEN_KEEP_CACHE ||
			dir.OpenFlags != fuse.FOPEN_KEEP_CACHE|fuse.FOPEN_CACHE_DIR {
			t.Errorf("open %v with %#x, opendir %v with %#x", st1, file.OpenFlags, st2, dir.OpenFlags)
		}
	}
}
