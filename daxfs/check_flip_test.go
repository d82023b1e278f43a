package daxfs_test

import (
	"bytes"
	"encoding/binary"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/daxfs/daxfs-snapshotter/daxfs"
	"github.com/daxfs/daxfs-snapshotter/daxfs/internal/disk"
)

// TestCheckFlips flips single bits of the metadata. A flip that Check does not find must not change
// anything that both halves store. Times, device numbers and attributes are in one half only and may
// have any value, and so may owner, permissions and names of special files. Targets are stored once
// for both halves. NULs may follow the last name of a directory.
func TestCheckFlips(t *testing.T) {
	sound := fuzzImage(t)
	o := operate(t, bytes.Clone(sound))
	all, err := readAll(o.f.Walk)
	if err != nil {
		t.Fatal(err)
	}
	v8, err := readAll(o.d.Walk)
	if err != nil {
		t.Fatal(err)
	}
	step := int64(11)
	if testing.Short() {
		step = 97
	}
	silent := 0
	eachFlip(o, step, func(off int64, b []byte) {
		if daxfs.Check(daxfs.Mem(b), int64(len(b)), nil) == nil {
			silent++
			sameTree(t, b, off, all, v8)
		}
	})
	t.Logf("%d flips are not found and change nothing that counts", silent)
}

// eachFlip calls fn for the image with one bit flipped: in every byte of the superblocks and every
// step'th byte of the metadata. The checksum is correct.
func eachFlip(o *surgeon, step int64, fn func(off int64, b []byte)) {
	offsets := []int64{}
	for off := int64(0); off < disk.V8SuperSize; off++ {
		offsets = append(offsets, off)
	}
	for off := int64(disk.ErofsSuperOff); off < disk.ErofsSuperOff+disk.ErofsSuperSize; off++ {
		offsets = append(offsets, off)
	}
	for off := o.meta(); off < int64(len(o.b)); off += step {
		offsets = append(offsets, off)
	}
	b := bytes.Clone(o.b)
	for _, off := range offsets {
		b[off] ^= 1 << (off / step % 8)
		binary.LittleEndian.PutUint32(b[disk.ErofsSuperOff+4:], disk.ErofsChecksum(b))
		fn(off, b)
		copy(b, o.b[:daxfs.BlockSize])
		b[off] = o.b[off]
	}
}

// sameTree compares the view of an image with that before a bit at off was flipped.
func sameTree(t *testing.T, b []byte, off int64, all, v8 map[string]entry) {
	t.Helper()
	mustAgree(t, b)
	o := operate(t, b)
	got, err := readAll(o.f.Walk)
	if err != nil {
		t.Fatalf("flip at %d: %v", off, err)
	}
	got8, err := readAll(o.d.Walk)
	if err != nil {
		t.Fatalf("flip at %d: %v", off, err)
	}
	for path, e := range got {
		if holdable(e) && !same(e, all[path]) {
			t.Errorf("flip at %d: %q is %.300v, was %.300v", off, path, e, all[path])
		}
	}
	if len(got) != len(all) || len(got8) != len(v8) {
		t.Errorf("flip at %d: %d and %d paths, were %d and %d", off, len(got), len(got8), len(all), len(v8))
	}
	for path, e := range got8 {
		if !same(e, v8[path]) {
			t.Errorf("flip at %d: %q of the DAXFS half is %.300v, was %.300v", off, path, e, v8[path])
		}
	}
}

func holdable(e entry) bool {
	switch e.st.Mode & unix.S_IFMT {
	case unix.S_IFREG, unix.S_IFDIR, unix.S_IFLNK:
		return true
	}
	return false
}

// same compares what both halves store, each separately.
func same(a, b entry) bool {
	if a.st.Mode&unix.S_IFMT == unix.S_IFDIR {
		a.st.Size = b.st.Size
	}
	return a.st.Nid == b.st.Nid && a.st.Mode == b.st.Mode && a.st.Nlink == b.st.Nlink && a.st.UID == b.st.UID &&
		a.st.GID == b.st.GID &&
		a.st.Size == b.st.Size && a.st.Off == b.st.Off && a.sum == b.sum
}
