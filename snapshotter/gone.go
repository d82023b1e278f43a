package snapshotter

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"github.com/containerd/log"
	bolt "go.etcd.io/bbolt"
	"golang.org/x/sys/unix"

	"github.com/daxfs/daxfs-snapshotter/internal/overlay"
)

// A removed or committed snapshot may still be mounted: nothing forces a client to unmount first, and
// a detached mount lives as long as a process has a file or a directory in it. The bucket "gone" keeps
// the lower of such an overlay until the kernel reports that the overlay is dead.

// leave records that the overlay of a snapshot may stand on low although the snapshot's record no longer says so.
func leave(tx *bolt.Tx, id string, low *lower) error {
	if !low.stands() {
		return nil
	}
	return putJSON(own(tx, bucketGone), id, low)
}

// goneLowers returns the lowers of possibly living overlays of removed and committed snapshots, by snapshot id.
func goneLowers(tx *bolt.Tx) (map[string]*lower, error) {
	gone := map[string]*lower{}
	err := own(tx, bucketGone).ForEach(func(id, raw []byte) error {
		low := &lower{}
		if err := json.Unmarshal(raw, low); err != nil {
			return fmt.Errorf("record of the removed snapshot %s: %w", id, err)
		}
		gone[string(id)] = low
		return nil
	})
	return gone, err
}

// forgetDead removes the records of dead overlays. One call runs at a time: a second one could try an
// overlay on a directory whose record is gone, while the directory is being removed.
func (s *Snapshotter) forgetDead(ctx context.Context) error {
	s.trials.Lock()
	defer s.trials.Unlock()
	var gone map[string]*lower
	err := s.st.view(ctx, func(_ context.Context, tx *bolt.Tx) (err error) {
		gone, err = goneLowers(tx)
		return err
	})
	if err != nil || len(gone) == 0 {
		return err
	}
	var dead []string
	var errs []error
	for id := range gone {
		alive, err := s.alive(id)
		switch {
		case err != nil:
			errs = append(errs,
				fmt.Errorf("removed snapshot %s: cannot tell whether it is still mounted: %w", id, err))
		case alive:
			log.G(ctx).WithField("id", id).Debug("a removed snapshot is still mounted somewhere, keeping it")
		default:
			dead = append(dead, id)
		}
	}
	if len(dead) > 0 {
		errs = append(errs, s.st.update(ctx, func(_ context.Context, tx *bolt.Tx) error {
			for _, id := range dead {
				if err := own(tx, bucketGone).Delete([]byte(id)); err != nil {
					return err
				}
			}
			return nil
		}))
	}
	return errors.Join(errs...)
}

// alive reports whether an overlay with the upper directory of a snapshot exists, in any mount
// namespace, detached or not. The kernel refuses a second overlay with index=on over an upper
// directory in use. The trial leaves traces in the work directory, which is never used again, and on
// the upper directory itself, where nobody looks at them.
func (s *Snapshotter) alive(id string) (bool, error) {
	if _, err := os.Lstat(s.upper(id)); errors.Is(err, os.ErrNotExist) {
		return false, nil
	}
	options := []string{
		"lowerdir=" + s.emptyDir(), "upperdir=" + s.upper(id), "workdir=" + s.workdir(id), "index=on",
	}
	for _, o := range s.overlayOptions {
		if o == "userxattr" {
			options = append(options, o)
		}
	}
	err := overlay.Try(options)
	if errors.Is(err, unix.EINVAL) {
		// The kernel refuses the work directory of a volatile mount. It checks this after it found the upper
		// directory free; EINVAL can also mean wrong options, so try once more.
		if rerr := os.RemoveAll(filepath.Join(s.workdir(id), "work", "incompat")); rerr != nil {
			return false, rerr
		}
		err = overlay.Try(options)
	}
	switch {
	case errors.Is(err, unix.EBUSY):
		return true, nil
	case errors.Is(err, unix.ESTALE), // the index of another lower
		errors.Is(err, unix.ENOSPC), errors.Is(err, unix.EDQUOT): // no room for the index
		return false, nil // the upper directory was found free before
	}
	return false, err
}

// emptyDir is the lower directory of trials. New creates it, because a trial must succeed on a full disk.
func (s *Snapshotter) emptyDir() string { return filepath.Join(s.root, "empty") }
