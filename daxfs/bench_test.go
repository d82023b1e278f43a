package daxfs_test

import (
	"fmt"
	"testing"

	"github.com/daxfs/daxfs-snapshotter/daxfs"
	"golang.org/x/sys/unix"
)

// distroTree resembles the root of a Linux distribution with n inodes: directories of some 12 entries,
// files of 14 KiB on average, one symlink in ten, one time for two thirds of the files.
func distroTree(n int, s *store) *daxfs.Node {
	root := dir(map[string]*daxfs.Node{})
	dirs := []*daxfs.Node{root}
	for i := 1; i < n; i++ {
		parent := dirs[(i*7919)%len(dirs)]
		c := &daxfs.Node{Mode: unix.S_IFREG | 0o644, Mtime: daxfs.Time{Sec: 1_700_000_000}}
		switch {
		case i%3 == 0:
			c.Mtime = daxfs.Time{Sec: 1_650_000_000 + int64(i)*977%40_000_000, Nsec: uint32(i) % 1e9}
		}
		switch {
		case i%12 == 0:
			c.Mode, c.Entries = unix.S_IFDIR|0o755, map[string]*daxfs.Node{}
			dirs = append(dirs, c)
		case i%10 == 0:
			c.Mode, c.Target = unix.S_IFLNK|0o777, fmt.Sprintf("../lib/libsomething-%d.so.1", i)
		default:
			size := int64(i*7919%28_000) + 1
			c.Data = daxfs.Data{Off: s.next, Size: size, Sum: [32]byte{byte(i), byte(i >> 8), byte(i >> 16)}}
			s.next += (size + daxfs.BlockSize - 1) / daxfs.BlockSize * daxfs.BlockSize
		}
		parent.Entries[fmt.Sprintf("some-file-name-%d", i)] = c
	}
	return root
}

type discard struct{}

func (discard) WriteAt(p []byte, _ int64) (int, error) { return len(p), nil }

func benchTree(b *testing.B) (*daxfs.Node, *store) {
	s := &store{next: daxfs.BlockSize}
	return distroTree(60_000, s), s
}

// BenchmarkPlan, BenchmarkWriteTo and BenchmarkCopy share one tree; BenchmarkCopy only copies the metadata.
func BenchmarkPlan(b *testing.B) {
	root, _ := benchTree(b)
	b.Run("60000", func(b *testing.B) {
		b.ReportAllocs()
		for b.Loop() {
			if _, err := daxfs.NewPlan(root, daxfs.Options{}); err != nil {
				b.Fatal(err)
			}
		}
	})
}

func BenchmarkWriteTo(b *testing.B) {
	root, s := benchTree(b)
	p, err := daxfs.NewPlan(root, daxfs.Options{})
	if err != nil {
		b.Fatal(err)
	}
	b.Run("60000", func(b *testing.B) {
		b.SetBytes(p.MetaSize())
		b.ReportAllocs()
		for b.Loop() {
			if err := p.Place(daxfs.Placement{Meta: s.next, End: s.next + p.MetaSize()}); err != nil {
				b.Fatal(err)
			}
			if err := p.WriteTo(discard{}); err != nil {
				b.Fatal(err)
			}
		}
	})
}

func BenchmarkCopy(b *testing.B) {
	root, _ := benchTree(b)
	p, err := daxfs.NewPlan(root, daxfs.Options{})
	if err != nil {
		b.Fatal(err)
	}
	from, to := make([]byte, p.MetaSize()), make([]byte, 1<<20)
	b.Run("60000", func(b *testing.B) {
		b.SetBytes(p.MetaSize())
		for b.Loop() {
			for rest := from; len(rest) > 0; {
				n := copy(to, rest)
				rest = rest[n:]
			}
		}
	})
}

// TestSize: the size of an image of many files is at most 1.02 times the pages of its contents, plus
// 400 bytes for each entry.
func TestSize(t *testing.T) {
	for _, n := range []int{1000, 60_000} {
		s := &store{next: daxfs.BlockSize}
		p, err := daxfs.NewPlan(distroTree(n, s), daxfs.Options{})
		if err != nil {
			t.Fatal(err)
		}
		data, size := s.next-daxfs.BlockSize, s.next+p.MetaSize()
		bound := data + data/50 + 400*int64(p.Stats().Names)
		t.Logf("%d inodes: metadata %d bytes, %d for each entry; image %d bytes, bound %d",
			n, p.MetaSize(), p.MetaSize()/int64(p.Stats().Names), size, bound)
		if size > bound {
			t.Errorf("image of %d inodes has %d bytes, expected at most %d", n, size, bound)
		}
	}
}
