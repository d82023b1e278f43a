package pool

import (
	"fmt"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/daxfs/daxfs-snapshotter/daxfs"
)

// BenchmarkAddImage adds images of 5,000 files in 250 directories: the first one brings its inodes, the others share them.
func BenchmarkAddImage(b *testing.B) {
	for _, what := range []string{"first", "another"} {
		b.Run(what, func(b *testing.B) {
			dir := b.TempDir()
			p, err := Create(openRegion(b, dir, 8<<30), filepath.Join(dir, "index"), Options{})
			if err != nil {
				b.Fatal(err)
			}
			defer p.Close()
			batch := p.Begin()
			defer batch.Discard()
			root := &daxfs.Node{Mode: unix.S_IFDIR | 0o755, Entries: map[string]*daxfs.Node{}}
			for i := range 250 {
				sub := &daxfs.Node{Mode: unix.S_IFDIR | 0o755, Entries: map[string]*daxfs.Node{}}
				for k := range 20 {
					d := put(b, batch, []byte(fmt.Sprint("contents ", i, k)))
					sub.Entries[fmt.Sprint("file", k)] = &daxfs.Node{Mode: unix.S_IFREG | 0o644, Data: d}
				}
				root.Entries[fmt.Sprint("dir", i)] = sub
			}
			n := 0
			for b.Loop() {
				if what == "first" {
					for _, sub := range root.Entries {
						for _, f := range sub.Entries {
							f.Mtime.Sec = int64(n + 1)
						}
					}
				}
				n++
				if _, err := p.AddImage(b.Context(), fmt.Sprint(n), root, daxfs.Options{}); err != nil {
					b.Fatal(err)
				}
			}
			b.ReportMetric(float64(p.Usage().Tree)/float64(n)/1024, "KiB-tree/op")
		})
	}
}
