package pool

import (
	"errors"
	"os"
	"path/filepath"
	"testing"

	"github.com/daxfs/daxfs-snapshotter/pool/region"
)

// TestGrow: a grown pool keeps its contents, even if its owner dies at any point of the growth.
func TestGrow(t *testing.T) {
	const before, after = 16 << 20, 64 << 20
	body := random(1, 1<<20)
	for name, crash := range map[string]func(r region.Region, block0, header []byte){
		"no crash": func(region.Region, []byte, []byte) {},
		"before the superblock": func(r region.Region, block0, _ []byte) {
			write(t, r, block0, 0)
		},
		"before the header": func(r region.Region, block0, header []byte) {
			write(t, r, block0, 0)
			write(t, r, header, headerOff(0))
		},
	} {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			path, index := filepath.Join(dir, "pool"), filepath.Join(dir, "index")
			p, err := Create(openRegion(t, dir, before), index, Options{})
			noError(t, err)
			img := addImage(t, p, "a", body)
			noError(t, p.Close())
			noError(t, p.region.Close())

			noError(t, os.Truncate(path, after))
			r := openRegion(t, dir, 0)
			if _, err := Open(r, index, Options{}); !errors.Is(err, region.ErrSize) || errors.Is(err, ErrCorrupt) {
				t.Errorf("open of a pool in a file that was made larger: %v, expected %v", err, region.ErrSize)
			}
			block0, headers := make([]byte, 4096), make([]byte, 2*headerSize)
			_, err = r.ReadAt(block0, 0)
			noError(t, err)
			_, err = r.ReadAt(headers, headerOff(0))
			noError(t, err)
			p, err = Grow(r, index, Options{})
			noError(t, err)
			noError(t, p.Close())
			crash(r, block0, headers)
			if name == "before the header" {
				p, err = Grow(r, index, Options{})
			} else {
				p, err = Open(r, index, Options{})
			}
			noError(t, err)
			defer func() { noError(t, p.Close()) }()
			mustCheck(t, p)
			if u := p.Usage(); u.Size != after || u.Free < after-before {
				t.Errorf("after it has grown: %+v", u)
			}
			if now, err := p.Image("a"); err != nil || now.Slot != img.Slot || now.UUID != img.UUID {
				t.Errorf("image %+v, %v; expected %+v", now, err, img)
			}
			addImage(t, p, "b", random(2, 40<<20))
		})
	}
}

func write(t *testing.T, r region.Region, b []byte, off int64) {
	t.Helper()
	_, err := r.WriteAt(b, off)
	noError(t, err)
}

func noError(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}
