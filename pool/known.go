package pool

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"time"

	"github.com/daxfs/daxfs-snapshotter/pool/region"
)

// Known lists the digests of the contents that a pool had when ReadKnown read them.
type Known map[[32]byte]int64 // SHA-256 to size

// Find reports whether the pool had contents. The reader always fails.
func (k Known) Find(sum [32]byte, size int64) (io.ReaderAt, bool) {
	n, ok := k[sum]
	return bytes.NewReader(nil), ok && n == size
}

// ReadKnown lists the contents that layers and images of a pool hold, from its index, even while an
// owner has it open: it changes nothing and waits for nobody. size is the pool's, and id its expected
// ID. Errors: region.ErrBusy if the owner changed the index during every attempt to copy it.
func ReadKnown(path string, id [16]byte, size int64) (Known, error) {
	const attempts = 20
	for range attempts {
		k, err := readKnown(path, id, size)
		if !errors.Is(err, region.ErrBusy) {
			return k, err
		}
		time.Sleep(100 * time.Millisecond)
	}
	return nil, &region.BusyError{Path: path, PID: region.LockHolder(path)}
}

func readKnown(path string, id [16]byte, size int64) (Known, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, fmt.Errorf("index: %w", err)
	}
	defer f.Close()
	before, err := f.Stat()
	if err != nil {
		return nil, fmt.Errorf("index: %w", err)
	}
	k := Known{}
	db, err := openCopy(f)
	if err == nil {
		err = safely(path, func() error {
			c, err := (&index{db: db, path: path}).load(size)
			if err != nil {
				return err
			}
			if c.empty || c.id != id {
				return errors.New("it is not the index of this pool")
			}
			for _, lists := range []map[string][]extentID{c.layers, c.used} {
				for _, ids := range lists {
					for _, e := range ids {
						k[e.sum] = e.size
					}
				}
			}
			return nil
		})
		err = errors.Join(err, db.Close())
	}
	after, serr := f.Stat()
	if serr != nil {
		return nil, fmt.Errorf("index: %w", serr)
	}
	// A copy made during a write may be torn. Within one tick of the clock only the copy can show it.
	if !after.ModTime().Equal(before.ModTime()) || after.Size() != before.Size() {
		return nil, &region.BusyError{Path: path}
	}
	if err != nil {
		return nil, fmt.Errorf("index %q: %w: %w", path, ErrCorrupt, err)
	}
	return k, nil
}
