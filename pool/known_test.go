package pool

import (
	"bytes"
	"crypto/sha256"
	"errors"
	"os"
	"path/filepath"
	"sync"
	"testing"

	"github.com/daxfs/daxfs-snapshotter/pool/region"
)

// TestReadKnown lists the contents of a pool while its owner has it open and writes.
func TestReadKnown(t *testing.T) {
	dir := t.TempDir()
	index := filepath.Join(dir, "index")
	p, err := Create(openRegion(t, dir, 64<<20), index, Options{})
	if err != nil {
		t.Fatal(err)
	}
	defer p.Close()
	bodies := [][]byte{random(1, 100), random(2, 5<<20)}
	addImage(t, p, "a", bodies...)
	b := p.Begin()
	defer b.Discard()
	put(t, b, random(3, 1000)) // not held yet
	size := p.Usage().Size
	known, err := ReadKnown(index, p.ID(), size)
	if err != nil {
		t.Fatal(err)
	}
	for i, body := range append(bodies, random(3, 1000)) {
		_, ok := known.Find(sha256.Sum256(body), int64(len(body)))
		if want := i < 2; ok != want {
			t.Errorf("contents %d are known: %v, expected %v", i, ok, want)
		}
		if _, ok := known.Find(sha256.Sum256(body), 1); ok {
			t.Errorf("contents %d are known with another size", i)
		}
	}
	if _, err := ReadKnown(index, [16]byte{1}, size); err == nil {
		t.Error("the index of another pool is taken")
	}

	// Every answer is complete and true, whatever is written meanwhile.
	stop := make(chan struct{})
	var wg sync.WaitGroup
	wg.Go(func() {
		for i := uint64(10); ; i++ {
			select {
			case <-stop:
				return
			default:
				addImage(t, p, string(rune('b'+i)), random(i, 5000))
				if i == 40 {
					return
				}
			}
		}
	})
	for range 10 {
		known, err := ReadKnown(index, p.ID(), size)
		if errors.Is(err, region.ErrBusy) {
			continue
		}
		if err != nil {
			t.Error(err)
		} else if _, ok := known.Find(sha256.Sum256(bodies[1]), int64(len(bodies[1]))); !ok {
			t.Error("contents that were there are not known")
		}
	}
	close(stop)
	wg.Wait()
}

// TestReadKnownDamaged: a file that is no index is an error.
func TestReadKnownDamaged(t *testing.T) {
	file := filepath.Join(t.TempDir(), "index")
	for _, b := range [][]byte{nil, []byte("no index"), bytes.Repeat([]byte("no index"), 10_000)} {
		if err := os.WriteFile(file, b, 0o600); err != nil {
			t.Fatal(err)
		}
		if _, err := ReadKnown(file, [16]byte{}, 64<<20); err == nil {
			t.Errorf("an index of %d other bytes is taken", len(b))
		}
	}
}
