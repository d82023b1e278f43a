package daxfs_test

import (
	"errors"
	"testing"

	"github.com/daxfs/daxfs-snapshotter/daxfs"
)

var errDisk = errors.New("disk is broken")

// TestWriteErrors fails each write of a plan in turn.
func TestWriteErrors(t *testing.T) {
	s := newStore(daxfs.BlockSize)
	p, _ := s.fileImage(t, randomTree(2, 4000, s), daxfs.Options{})
	for n := 0; ; n++ {
		f := &countdown{left: n}
		err := p.WriteTo(f)
		if f.left >= 0 {
			if err != nil || n < 2 {
				t.Errorf("%d writes, error %v", n, err)
			}
			break
		}
		if !errors.Is(err, errDisk) {
			t.Errorf("write %d fails: error %v", n, err)
		}
		if f.super {
			t.Errorf("write %d fails, and superblocks are written all the same", n)
		}
	}
}

type countdown struct {
	left  int
	super bool
}

func (c *countdown) WriteAt(p []byte, off int64) (int, error) {
	if c.left--; c.left < 0 {
		return 0, errDisk
	}
	c.super = c.super || off == 0
	return len(p), nil
}
