package daemon

import (
	"errors"
	"os"
	"path/filepath"
	"testing"

	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/errdefs"
	"github.com/moby/sys/mountinfo"
	"golang.org/x/sys/unix"

	"github.com/daxfs/daxfs-snapshotter/config"
)

// restart stops the daemon, calls change, and starts the daemon again.
func (c *client) restart(m *machine, change func()) {
	m.t.Helper()
	m.must(c.end())
	change()
	again, err := start(m.t.Context(), m.cfg, m.store)
	m.must(err)
	*c = *again
	m.sn, m.ap = c.remote, c.applier
}

// uncache makes the kernel read this file again. It leaves other files alone, because tests of other
// packages count what the kernel reads twice.
func uncache(t *testing.T, path string) {
	t.Helper()
	f, err := os.Open(path)
	if err == nil {
		err = unix.Fadvise(int(f.Fd()), 0, 0, unix.FADV_DONTNEED)
	}
	if err := errors.Join(err, f.Close()); err != nil {
		t.Fatal(err)
	}
}

// A volume made from an image outlives the view and the OCI image, and keeps its bytes.
func TestVolumeOutlivesItsView(t *testing.T) {
	cl, m := inside(t, flavours[0], func(*config.Config) {})
	ctx := namespaces.WithNamespace(t.Context(), "default")
	a := file{"a", random(1, 3_000_000)}
	top, err := m.pull(ctx, true, []file{a})
	m.must(err)
	mounts, err := m.sn.View(ctx, "default/100/view", top)
	m.must(err)
	volume := t.TempDir()
	m.must(mount.All(mounts, volume))
	defer mount.UnmountAll(volume, 0)
	m.must(cl.sn.Flush(ctx))
	m.must(m.sn.Remove(ctx, "default/100/view"))
	m.must(m.sn.Remove(ctx, top))
	m.must(cl.sn.Cleanup(ctx))
	uncache(t, filepath.Join(volume, "a"))
	uncache(t, filepath.Join(m.cfg.Root, "pool", "live"))
	m.must(compareTree(volume, []file{a}))
	m.must(mount.UnmountAll(volume, 0))
	m.must(cl.settle(ctx))
	if n := len(cl.pool().Images()); n != 0 {
		t.Errorf("%d images are left over", n)
	}
}

// A changed mount.driver applies to images that are not mounted yet.
func TestDriverChanged(t *testing.T) {
	flavours[1].need(t)
	cl, m := inside(t, flavours[0], func(*config.Config) {})
	ctx := namespaces.WithNamespace(t.Context(), "default")
	a := file{"a", random(1, 100_000)}
	top, err := m.pull(ctx, true, []file{a})
	m.must(err)
	_, err = m.sn.Prepare(ctx, "default/100/c", top)
	m.must(err)
	dir := cl.store.Mounted()[0].Dir
	id := func() int {
		info, err := mountinfo.GetMounts(mountinfo.SingleEntryFilter(dir))
		if err != nil || len(info) != 1 {
			t.Fatalf("mounts %v, %v", info, err)
		}
		return info[0].ID
	}
	before := id()
	cl.restart(m, func() { m.cfg.Mount.Driver = "erofs-loop" })
	mounts, err := m.sn.Mounts(ctx, "default/100/c")
	m.must(err)
	m.compare(mounts, a)
	if after := id(); after != before {
		t.Errorf("mount %d became %d", before, after)
	}
}

// A busy mount over freed parts of the pool does not keep the daemon from starting, and is never used.
// When its user is gone, the image can be mounted again.
func TestStaleMountIsBusy(t *testing.T) {
	cl, m := inside(t, flavours[0], func(*config.Config) {})
	ctx := namespaces.WithNamespace(t.Context(), "default")
	a := file{"a", random(1, 100_000)}
	top, err := m.pull(ctx, true, []file{a})
	m.must(err)
	m.must(cl.sn.Flush(ctx))
	_, err = m.sn.Prepare(ctx, "default/100/c", top)
	m.must(err)
	user, err := os.Open(filepath.Join(cl.store.Mounted()[0].Dir, "a"))
	m.must(err)
	defer user.Close()
	cl.restart(m, func() {
		p, done := openPool(t, m.cfg)
		defer done()
		m.must(p.RemoveImage(ctx, p.Images()[0].Key))
	})
	if mounts, err := m.sn.Mounts(ctx, "default/100/c"); !errdefs.IsFailedPrecondition(err) {
		t.Fatalf("while a removed image is in use: %v, %v", mounts, err)
	}
	m.must(user.Close())
	mounts, err := m.sn.Mounts(ctx, "default/100/c")
	m.must(err)
	m.compare(mounts, a)
}

// A new image in the slot of another is not mistaken for the other.
func TestSlotTellsImages(t *testing.T) {
	cl, m := inside(t, flavours[0], func(*config.Config) {})
	ctx := namespaces.WithNamespace(t.Context(), "default")
	a := file{"a", random(1, 100_000)}
	top, err := m.pull(ctx, true, []file{a})
	m.must(err)
	m.must(cl.sn.Flush(ctx))
	_, err = m.sn.Prepare(ctx, "default/100/c", top)
	m.must(err)
	old := cl.store.Mounted()[0]
	m.must(cl.pool().RemoveImage(ctx, old.Key))
	cl.restart(m, func() {})
	mounts, err := m.sn.Mounts(ctx, "default/100/c")
	m.must(err)
	m.compare(mounts, a)
	if now := cl.store.Mounted()[0]; now.Name == old.Name || now.Key != old.Key {
		t.Errorf("mounted %+v, before %+v", now, old)
	}
}
