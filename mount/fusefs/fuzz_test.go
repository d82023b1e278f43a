package fusefs

import (
	"encoding/binary"
	"io"
	"log"
	"os"
	"path/filepath"
	"testing"

	"github.com/hanwen/go-fuse/v2/fuse"

	"github.com/daxfs/daxfs-snapshotter/daxfs"
	"github.com/daxfs/daxfs-snapshotter/mount/internal/mounttest"
)

// FuzzServer changes bytes of an image, as an attacker who can write the pool may do after its check,
// and makes every request that a kernel can make. The server must answer: no panic, and no endless
// listing. The input is offsets and values, three bytes each.
func FuzzServer(f *testing.F) {
	tree := mounttest.Tree(f)
	if err := os.Remove(filepath.Join(tree, "usr/bin/big")); err != nil { // would hide the metadata from the fuzzer
		f.Fatal(err)
	}
	path := filepath.Join(f.TempDir(), "image")
	mounttest.Mkfs(f, tree, path)
	base, err := os.ReadFile(path)
	if err != nil {
		f.Fatal(err)
	}
	f.Add([]byte{}, uint64(3), uint64(4096))
	for _, off := range []uint16{1024, 1024 + 14, 1024 + 16, 1024 + 36, 1024 + 40, 4096, 4100, 4104, 4112, 8192, 8200} {
		f.Add(binary.LittleEndian.AppendUint16(nil, off)[:2:2], uint64(off), uint64(off)<<32)
		f.Add(append(binary.LittleEndian.AppendUint16(nil, off), 0xff), uint64(off), uint64(1)<<63)
	}
	f.Fuzz(func(t *testing.T, patch []byte, node, off uint64) {
		b := append([]byte(nil), base...)
		for ; len(patch) >= 3; patch = patch[3:] {
			at := int(binary.LittleEndian.Uint16(patch))
			b[at%len(b)] = patch[2]
		}
		img, err := daxfs.OpenBytes(b)
		if err != nil {
			return
		}
		s := newServer(img, log.New(io.Discard, "", 0))
		s.lookForXattrs()
		s.noXattrs.Store(false)
		seen := map[uint64]bool{}
		todo := []uint64{fuse.FUSE_ROOT_ID, node}
		for len(todo) > 0 && len(seen) < 64 {
			node := todo[0]
			todo = todo[1:]
			if !seen[node] {
				seen[node] = true
				todo = append(todo, askAll(t, s, node, off)...)
			}
		}
	})
}

// askAll makes every request about one node, and returns the nodes that listings named.
func askAll(t *testing.T, s *server, node, off uint64) (found []uint64) {
	h := fuse.InHeader{NodeId: node}
	s.GetAttr(nil, &fuse.GetAttrIn{InHeader: h}, new(fuse.AttrOut))
	s.StatFs(nil, &h, new(fuse.StatfsOut))
	s.Readlink(nil, &h)
	buf := make([]byte, 64<<10)
	s.ListXAttr(nil, &h, buf)
	s.GetXAttr(nil, &h, "user.x", buf)
	for _, name := range []string{"hello", ".", "..", "", "usr"} {
		out := new(fuse.EntryOut)
		if s.Lookup(nil, &h, name, out).Ok() {
			found = append(found, out.NodeId)
		}
	}
	for _, at := range []uint64{0, 4096, off} {
		res, st := s.Read(nil, &fuse.ReadIn{InHeader: h, Offset: at, Size: uint32(len(buf))}, buf)
		if st.Ok() {
			if b, st := res.Bytes(buf); len(b) > len(buf) || !st.Ok() {
				t.Fatalf("reply of %d bytes, asked were %d, %v", len(b), len(buf), st)
			}
			res.Done()
		}
	}
	s.ReadDirPlus(nil, &fuse.ReadIn{InHeader: h, Offset: off}, fuse.NewDirEntryList(buf, off))
	at := uint64(0)
	for range 10_000 {
		var last, n uint64
		st := s.readDir(&fuse.ReadIn{InHeader: h, Offset: at}, func(e fuse.DirEntry) bool {
			if n == 16 {
				return false
			}
			n, last = n+1, e.Off
			found = append(found, e.Ino+nodeBias)
			return true
		})
		if !st.Ok() || n == 0 {
			return found
		}
		if last <= at {
			t.Fatalf("a listing goes on at %d after %d", last, at)
		}
		at = last
	}
	t.Fatal("a listing has no end")
	return nil
}
