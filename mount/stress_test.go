package mount_test

import (
	"fmt"
	"os"
	"path/filepath"
	"sync"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/daxfs/daxfs-snapshotter/mount"
	"github.com/daxfs/daxfs-snapshotter/mount/erofs"
)

// Images are published and removed through a block device while a process keeps filling its cache with
// data that is not there yet. Each image is complete as soon as Mount returns, and an erased one is
// never found again.
func TestPublishWhileDeviceIsRead(t *testing.T) {
	eachDriver(t, func(t *testing.T, b *bed, d mount.Driver) {
		tab := b.open(t, mount.Options{}, d)
		mustMount(t, tab, b.add(t, "first", "first"))
		dev := b.Path
		if _, ok := d.(erofs.Loop); ok {
			var st unix.Stat_t
			if err := unix.Stat(liveDir(t, b), &st); err != nil {
				t.Fatal(err)
			}
			dev = fmt.Sprint("/dev/loop", unix.Minor(st.Dev))
		}
		stop := make(chan struct{})
		var readers sync.WaitGroup
		for range 2 {
			readers.Go(func() {
				f, err := os.Open(dev)
				if err != nil {
					t.Error(err)
					return
				}
				defer f.Close()
				buf := make([]byte, 16<<20)
				for {
					select {
					case <-stop:
						return
					default:
						f.ReadAt(buf, 0) // slots and the beginning of the tree area
					}
				}
			})
		}
		rounds := 12
		if testing.Short() {
			rounds = 4
		}
		for i := range rounds {
			key := fmt.Sprint("image/", i)
			slot := b.Publish(t, map[string]string{"file": key, "sub/dir/file": key + "!", "same": "same"})
			m := mustMount(t, tab, image(key, slot))
			for name, want := range map[string]string{"file": key, "sub/dir/file": key + "!", "same": "same"} {
				got, err := os.ReadFile(filepath.Join(m.Dir, name))
				if err != nil || string(got) != want {
					t.Fatalf("round %d: %s is %q, %v; expected %q", i, name, got, err, want)
				}
			}
			if err := tab.Unmount(t.Context(), key); err != nil {
				t.Fatal(err)
			}
			b.Retract(t, slot)
			nids := []uint64{slot.Nids["file"], slot.Nids["sub/dir/file"]}
			free, err := tab.Unused(t.Context(), []mount.Extent{{Nids: nids}}, func() error { return b.Erase(nids...) })
			if err != nil || !free[0] && d.Name() != "erofs-dax" {
				t.Fatalf("round %d: unused %v, %v", i, free, err)
			}
		}
		close(stop)
		readers.Wait()
	})
}
