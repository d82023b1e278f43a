package daemon

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"testing"

	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/containerd/v2/pkg/namespaces"

	"github.com/daxfs/daxfs-snapshotter/internal/slow"
)

// A container keeps file handles of the files that it copied up. In a pool of another epoch the same
// inode numbers belong to other files, so the handles must be stale. Otherwise overlayfs takes two
// files of the container for one, and opens neither.
func TestHandlesOfAnotherEpoch(t *testing.T) {
	const files, written = 300, 50 // more inodes than fit into one block, because each image begins a new block
	for _, f := range flavours {
		t.Run(f.name, func(t *testing.T) {
			if f != flavours[0] {
				slow.Skip(t, "starts daemons, for each pool and driver")
			}
			m := newMachine(t, f)
			m.boot()
			ctx := namespaces.WithNamespace(t.Context(), "default")
			image := func(seed int) (all []file) {
				for i := range files {
					all = append(all, file{fmt.Sprintf("f%03d", i), random(uint64(seed+i), 50)})
				}
				return all
			}
			// The first image takes inode numbers that the second gets after the reboot, without the first.
			first, err := m.pull(ctx, true, image(1)[:written])
			m.must(err)
			early, err := m.sn.Prepare(ctx, "default/99/early", first)
			m.must(err)
			m.compare(early, image(1)[:written]...)
			want := image(1000)
			top, err := m.pull(ctx, true, want)
			m.must(err)
			mounts, err := m.sn.Prepare(ctx, "default/100/c", top)
			m.must(err)
			m.must(mount.WithTempMount(ctx, mounts, func(root string) error {
				var errs []error
				for i := range written {
					want[i].body = []byte("changed")
					errs = append(errs, os.WriteFile(filepath.Join(root, want[i].name), want[i].body, 0o644))
				}
				return errors.Join(errs...)
			}))
			m.must(errors.Join(m.sn.Remove(ctx, "default/99/early"), m.sn.Remove(ctx, first)))
			m.reboot()
			mounts, err = m.sn.Mounts(ctx, "default/100/c")
			m.must(err)
			m.compare(mounts, want...)
		})
	}
}
