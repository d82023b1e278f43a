package pool

import (
	"errors"
	"os"
	"path/filepath"
	"testing"

	"github.com/daxfs/daxfs-snapshotter/pool/region"
)

// forgetful accepts writes and drops them, like read-only memory of a virtual machine.
type forgetful struct{ region.Region }

func (forgetful) WriteAt(p []byte, _ int64) (int, error) { return len(p), nil }
func (forgetful) Punch(int64, int64) error               { return nil }

// No pool is made in memory that drops writes, whether or not it held one; an old pool's index stays.
func TestCreateReadOnly(t *testing.T) {
	dir := t.TempDir()
	r := openRegion(t, dir, 16<<20)
	index := filepath.Join(dir, "index")
	if _, err := Create(forgetful{r}, index, Options{}); !errors.Is(err, ErrReadOnly) {
		t.Fatalf("without a pool: %v, want ErrReadOnly", err)
	}
	if _, err := os.Stat(index); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("an index was made: %v", err)
	}
	p, err := Create(r, index, Options{})
	if err != nil {
		t.Fatal(err)
	}
	id := p.ID()
	if err := p.Close(); err != nil {
		t.Fatal(err)
	}
	if _, err := Create(forgetful{r}, index, Options{Force: true}); !errors.Is(err, ErrReadOnly) {
		t.Fatalf("with force: %v, want ErrReadOnly", err)
	}
	p, err = Open(r, index, Options{})
	if err != nil {
		t.Fatalf("the pool that was there: %v", err)
	}
	defer p.Close()
	if p.ID() != id {
		t.Errorf("pool %x, want %x", p.ID(), id)
	}
}
