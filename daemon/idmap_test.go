package daemon

import (
	"os"
	"path/filepath"
	"syscall"
	"testing"

	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/containerd/v2/plugins/snapshots/overlay/overlayutils"

	"github.com/daxfs/daxfs-snapshotter/config"
)

// Containers of several user namespaces use one image, each with its own ids, beside other mounted images.
func TestIDMapped(t *testing.T) {
	for _, f := range flavours[:2] {
		t.Run(f.name, func(t *testing.T) {
			_, m := inside(t, f, func(*config.Config) {})
			if ok, err := overlayutils.SupportsIDMappedMounts(); err != nil || !ok {
				t.Skipf("the kernel has no idmapped mounts for overlayfs: %v", err)
			}
			ctx := namespaces.WithNamespace(t.Context(), "default")
			top, err := m.pull(ctx, true, []file{{"a", random(1, 5000)}})
			m.must(err)
			other, err := m.pull(ctx, false, []file{{"b", random(2, 5000)}})
			m.must(err)
			_, err = m.sn.Prepare(ctx, "default/99/other", other)
			m.must(err)
			for key, mapping := range map[string]string{
				"default/100/c": "0:100000:65536",
				"default/101/d": "0:300000:65536",
			} {
				mounts, err := m.sn.Prepare(ctx, key, top, snapshots.WithLabels(map[string]string{
					snapshots.LabelSnapshotUIDMapping: mapping, snapshots.LabelSnapshotGIDMapping: mapping,
				}))
				m.must(err)
				m.must(mount.WithTempMount(ctx, mounts, func(root string) error {
					want := uint32(100000)
					if key == "default/101/d" {
						want = 300000
					}
					for _, p := range []string{".", "a"} {
						var st syscall.Stat_t
						if err := syscall.Lstat(filepath.Join(root, p), &st); err != nil {
							return err
						}
						if st.Uid != want || st.Gid != want {
							t.Errorf("%s: %q belongs to %d:%d, expected %d", key, p, st.Uid, st.Gid, want)
						}
					}
					return os.WriteFile(filepath.Join(root, "new"), nil, 0o600)
				}))
			}
		})
	}
}
