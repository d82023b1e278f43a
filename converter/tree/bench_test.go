package tree

import (
	"archive/tar"
	"bytes"
	"context"
	"crypto/sha256"
	"fmt"
	"io"
	"testing"

	"github.com/daxfs/daxfs-snapshotter/converter/layer"
	"github.com/daxfs/daxfs-snapshotter/internal/treetest"
)

// image returns layers shaped like a distribution and an application: many files of up to size bytes.
func image(entries, size int) stack {
	var s stack
	body := string(bytes.Repeat([]byte("x"), size))
	for l := range 3 {
		var files []treetest.File
		for i := range entries / 3 {
			dir := fmt.Sprintf("usr/lib/python3/dist-packages/package%d/part%d", i/200, i/20%10)
			if i%20 == 0 {
				files = append(files, treetest.Dir(dir+"/"))
			}
			name := fmt.Sprintf("%s/module_%d_%d.py", dir, i, l)
			switch {
			case i%50 == 0:
				files = append(files, treetest.Sym(name, "module.py"))
			case l > 0 && i%100 == 1:
				files = append(files, treetest.Reg(fmt.Sprintf("%s/.wh.module_%d_%d.py", dir, i, l-1), ""))
			default:
				files = append(files, treetest.Reg(name, body[:(i*7919)%len(body)]))
			}
		}
		s = append(s, files)
	}
	return s
}

// BenchmarkFromTar compares with the unavoidable work: reading the tar and hashing the stream.
func BenchmarkFromTar(b *testing.B) {
	stream := image(9000, 80_000).tars()[0]
	run := func(name string, f func() error) {
		b.Run(name, func(b *testing.B) {
			b.SetBytes(int64(len(stream)))
			b.ReportAllocs()
			for b.Loop() {
				if err := f(); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
	run("layer", func() error {
		_, err := layer.FromTar(context.Background(), bytes.NewReader(stream), &sumStore{}, layer.Limits{})
		return err
	})
	run("tar only", func() error {
		r := tar.NewReader(bytes.NewReader(stream))
		for {
			if _, err := r.Next(); err == io.EOF {
				return nil
			} else if err != nil {
				return err
			}
			if _, err := io.Copy(io.Discard, r); err != nil {
				return err
			}
		}
	})
	run("sha256 only", func() error {
		_, err := io.Copy(sha256.New(), bytes.NewReader(stream))
		return err
	})
}

func BenchmarkMerge(b *testing.B) {
	var layers []*layer.Layer
	s := image(60_000, 10)
	for _, stream := range s.tars() {
		l, err := layer.FromTar(context.Background(), bytes.NewReader(stream), &sumStore{}, layer.Limits{})
		if err != nil {
			b.Fatal(err)
		}
		layers = append(layers, l)
	}
	b.ReportAllocs()
	entries := 0
	for b.Loop() {
		if _, err := Merge(layers); err != nil {
			b.Fatal(err)
		}
		entries += len(s[0]) + len(s[1]) + len(s[2])
	}
	b.ReportMetric(float64(b.Elapsed().Nanoseconds())/float64(entries), "ns/entry")
}
