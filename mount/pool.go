package mount

import (
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/daxfs/daxfs-snapshotter/mount/internal/sys"
)

// live is the mounted pool.
type live struct {
	driver Driver
	dir    string // the mount point
	root   sys.Root
	// block is the block device below the file system, or "". The kernel caches metadata of a device, and
	// that cache does not see writes to the pool.
	block string
	// dax is true if mapped files are the memory of the device.
	dax bool

	mu  sync.Mutex
	rec poolRecord // same as beside the mount point
}

// newLive describes the mount on dir; rec is its record.
func newLive(d Driver, dir string, rec poolRecord) (*live, error) {
	m, _, err := sys.Top(dir)
	if err != nil {
		return nil, err
	}
	if m == nil {
		return nil, fmt.Errorf("%q vanished from the mount table", dir)
	}
	root, ok, err := sys.MountRoot(dir)
	if err != nil {
		return nil, err
	}
	if !ok {
		return nil, fmt.Errorf("%q is no mount point", dir)
	}
	l := &live{driver: d, dir: dir, root: root, rec: rec}
	if m.Major != 0 { // file systems without a device have numbers of major 0
		l.block = m.Source
	}
	if v, _ := sys.MountOption(m, "dax"); v == "always" {
		l.dax = true
	}
	return l, nil
}

// answers returns nil if the pool is still mounted and its file system answers.
func (t *Table) answers(ctx context.Context, l *live) error {
	if err := sys.Alive(ctx, l.dir); err != nil {
		return err
	}
	root, ok, err := sys.MountRoot(l.dir)
	if err != nil {
		return err
	}
	if !ok || root != l.root {
		return fmt.Errorf("the pool is not mounted on %q any more", l.dir)
	}
	return nil
}

// lockPool takes the token for work on the mount of the pool.
func (t *Table) lockPool(ctx context.Context) (unlock func(), err error) {
	if err := ctx.Err(); err != nil { // select takes either if both are ready
		return nil, err
	}
	select {
	case t.poolWork <- struct{}{}:
		return func() { <-t.poolWork }, nil
	case <-ctx.Done():
		return nil, ctx.Err()
	}
}

func (t *Table) setLive(l *live) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.live = l
}

func (t *Table) getLive() *live {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.live
}

// ensurePool mounts the pool with d unless it is mounted. written are ranges that never change again.
func (t *Table) ensurePool(ctx context.Context, d Driver, written []Range) (*live, error) {
	unlock, err := t.lockPool(ctx)
	if err != nil {
		return nil, err
	}
	defer unlock()
	if l := t.getLive(); l != nil {
		err := t.answers(ctx, l)
		if err == nil {
			return l, nil
		}
		if hangs(ctx, err) {
			return nil, err
		}
		t.opts.Warn("the pool has to be mounted again: %v", err)
		t.setLive(nil)
	}
	if l := t.recoverPool(ctx); l != nil {
		t.setLive(l)
		return l, nil
	}
	l, err := t.mountPool(ctx, d, written)
	if err != nil {
		return nil, err
	}
	t.setLive(l)
	return l, nil
}

// mountPool mounts the pool anew. The caller has locked the pool.
func (t *Table) mountPool(ctx context.Context, d Driver, written []Range) (*live, error) {
	src := t.pool.source()
	if err := d.Probe(ctx, src.Region); err != nil {
		return nil, err
	}
	if err := t.opts.Check(ctx, src); err != nil {
		return nil, err
	}
	dir := t.liveDir()
	mnt := mountDir(dir)
	if err := os.MkdirAll(mnt, 0o700); err != nil {
		return nil, fmt.Errorf("mount %s: %w", src, err)
	}
	if err := sys.Detach(mnt); err != nil { // of a server that died
		return nil, err
	}
	// The record comes first: after a crash, the next process knows what may be mounted there.
	rec := t.pool.record(d.Name())
	if err := writeRecord(dir, poolRecordName, rec); err != nil {
		return nil, fmt.Errorf("mount %s: %w", src, err)
	}
	if err := d.Mount(ctx, src, mnt); err != nil {
		removeDir(dir)
		return nil, err
	}
	l, err := t.mountedPool(d, dir, rec)
	if err != nil {
		return nil, errors.Join(fmt.Errorf("mount %s: %w", src, err), d.Unmount(context.WithoutCancel(ctx), mnt))
	}
	if l.block != "" && src.Region.BlockDevice == "" {
		// The driver made a device for this mount, so nothing old is cached.
		l.setFresh(written)
	}
	return l, nil
}

// mountedPool completes the mount of the pool and its record.
func (t *Table) mountedPool(d Driver, dir string, rec poolRecord) (*live, error) {
	mnt := mountDir(dir)
	if err := sys.SetPrivate(mnt); err != nil {
		return nil, err
	}
	handle, err := sys.Handle(mnt)
	if err != nil {
		t.opts.Warn("the pool cannot be found again from its images if %q is unmounted: %v", mnt, err)
	}
	rec.RootHandle = hex.EncodeToString(handle)
	l, err := newLive(d, mnt, rec)
	if err != nil {
		return nil, err
	}
	return l, writeRecord(dir, poolRecordName, rec)
}

// recoverPool attaches the pool again if somebody unmounted it while images of it are bound. A bind
// keeps the superblock, and a handle leads from there to the root; a second superblock would cache
// everything again. It returns nil if there is no such bind. The caller has locked the pool.
func (t *Table) recoverPool(ctx context.Context) *live {
	dir := t.liveDir()
	var rec poolRecord
	if readRecord(dir, poolRecordName, &rec) != nil || rec.File != fileID(t.pool.Region) {
		return nil
	}
	d := t.byName(rec.Driver)
	handle, err := hex.DecodeString(rec.RootHandle)
	if d == nil || err != nil || len(handle) == 0 {
		return nil
	}
	for _, bound := range t.bindDirs() {
		if sys.Alive(ctx, bound) != nil {
			continue
		}
		if l, err := t.attachRoot(ctx, d, dir, rec, bound, handle); err == nil {
			t.opts.Warn("the pool was unmounted from %q and is mounted again from %q", l.dir, bound)
			return l
		}
	}
	return nil
}

func (t *Table) attachRoot(
	ctx context.Context, d Driver, dir string, rec poolRecord, bound string, handle []byte,
) (*live, error) {
	mnt := mountDir(dir)
	if err := errors.Join(os.MkdirAll(mnt, 0o700), sys.Detach(mnt)); err != nil {
		return nil, err
	}
	c, err := sys.CloneHandle(bound, handle)
	if err != nil {
		return nil, err
	}
	defer c.Close()
	if err := c.Attach(mnt, false); err != nil {
		return nil, err
	}
	if err := d.Match(ctx, rec.source(), mnt); err != nil {
		return nil, errors.Join(err, sys.Detach(mnt))
	}
	return t.mountedPool(d, dir, rec)
}

// bindDirs returns the mount points that may be binds of this pool, from the records.
func (t *Table) bindDirs() []string {
	dirs, err := os.ReadDir(filepath.Join(t.root, "images"))
	if err != nil {
		return nil
	}
	var out []string
	for _, de := range dirs {
		dir := filepath.Join(t.root, "images", de.Name())
		var rec imageRecord
		if readRecord(dir, recordName, &rec) != nil || rec.Pool != t.pool.uuid() || rec.Windowed {
			continue
		}
		if _, ok, err := sys.MountRoot(mountDir(dir)); ok && err == nil {
			out = append(out, mountDir(dir))
		}
	}
	return out
}

// bind binds the slot of img to dir.
func (l *live) bind(ctx context.Context, img Image, dir string) error {
	slot := filepath.Join(l.dir, img.Name)
	if err := l.visible(ctx, slot); err != nil {
		return err
	}
	if err := l.refresh(ctx, img.Tree); err != nil {
		return err
	}
	c, err := sys.OpenClone(slot)
	if err != nil {
		return err
	}
	defer c.Close()
	if st := c.Stat; st.Mode&unix.S_IFMT != unix.S_IFDIR || st.Ino != img.Nid {
		return fmt.Errorf("slot %q is inode %d of mode %#o, expected directory %d", slot, st.Ino, st.Mode, img.Nid)
	}
	if err := c.Attach(dir, false); err != nil {
		return err
	}
	if err := l.matchBind(dir, img); err != nil {
		return errors.Join(err, sys.Detach(dir))
	}
	return nil
}

// matchBind tells whether dir is a bind of the slot of img.
func (l *live) matchBind(dir string, img Image) error {
	root, ok, err := sys.MountRoot(dir)
	if err != nil {
		return err
	}
	want := l.slotRoot(img)
	if !ok || root != want {
		return fmt.Errorf("%q is inode %d of %d:%d, expected inode %d of the pool, %d:%d", dir,
			root.Ino, root.Major, root.Minor, want.Ino, want.Major, want.Minor)
	}
	return nil
}

// slotRoot is the root of a bind of the slot of img.
func (l *live) slotRoot(img Image) sys.Root {
	return sys.Root{Major: l.root.Major, Minor: l.root.Minor, Ino: img.Nid}
}

// flushes limits the cache flushes for one image. One is not enough while somebody reads the device.
const flushes = 200

// flush makes the file system read its metadata again. A FUSE server does so anyway.
func (l *live) flush(hard bool) error {
	if l.driver.Name() == "fuse" {
		return nil
	}
	var err error
	if l.block != "" {
		err = sys.FlushDevice(l.block)
	}
	return errors.Join(err, sys.DropMetadata(l.root.Major, l.root.Minor, hard))
}

// visible waits until this kernel sees the published slot as a directory.
func (l *live) visible(ctx context.Context, slot string) error {
	var st unix.Stat_t
	for i := range flushes {
		if err := l.flush(i > 2); err != nil {
			return err
		}
		err := unix.Lstat(slot, &st)
		if err == nil {
			return nil
		}
		if !errors.Is(err, unix.EUCLEAN) && !errors.Is(err, unix.EIO) {
			return fmt.Errorf("slot %q: %w", slot, err)
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(min(time.Duration(i)*time.Millisecond, 20*time.Millisecond)):
		}
	}
	return fmt.Errorf("slot %q is not visible after the metadata of the pool was read anew %d times: "+
		"was the image published?", slot, flushes)
}

// UnmountPool unmounts the pool after all of its images. It fails with ErrBusy while an image is
// mounted, and returns nil if the pool is not.
func (t *Table) UnmountPool(ctx context.Context) error {
	unlock, err := t.lockPool(ctx)
	if err != nil {
		return err
	}
	defer unlock()
	l := t.getLive()
	if l == nil {
		return nil
	}
	for _, m := range t.List() {
		if d := t.byName(m.Driver); d == nil || !d.Windows() {
			return fmt.Errorf("unmount the pool: image %q is mounted: %w", m.Key, ErrBusy)
		}
	}
	if err := l.driver.Unmount(ctx, l.dir); err != nil {
		return fmt.Errorf("unmount the pool: %w", err)
	}
	t.setLive(nil)
	if err := t.removeCopies(ctx, "live/"+filepath.Base(t.liveDir())+"/mnt"); err != nil {
		return fmt.Errorf("unmount the pool: %w", err)
	}
	t.awaitServer(ctx, l)
	removeDir(t.liveDir())
	return nil
}

// Healthy tells whether the mounts answer a question that the kernel cannot answer from a cache. EROFS
// has no server that could die, and always answers.
func (t *Table) Healthy(ctx context.Context) error {
	if l := t.getLive(); l != nil {
		if err := t.answers(ctx, l); err != nil {
			return fmt.Errorf("pool mounted with %s: %w", l.driver.Name(), err)
		}
	}
	for _, m := range t.List() {
		if d := t.byName(m.Driver); d != nil && d.Windows() {
			if err := sys.Alive(ctx, m.Dir); err != nil {
				return fmt.Errorf("image %q mounted with %s: %w", m.Key, m.Driver, err)
			}
		}
	}
	return nil
}
