package qemu

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"testing"

	"github.com/daxfs/daxfs-snapshotter/integration/qemu/task"
	"github.com/daxfs/daxfs-snapshotter/integration/testimage"
)

// churnRounds is the number of images added in one run.
const churnRounds = 40

// The host adds and removes images while a guest, short of memory, has the pool mounted and verifies
// other images. No byte is ever wrong, an image appears whole, and space that the guest has forgotten is reused.
func TestPublishUnderLoad(t *testing.T) {
	onEach(t, func(t *testing.T, k Kernel) {
		p := newPool(t, 64<<20)
		r := boot(t, Machine{
			Kernel: k, Memory: p.path, Via: VirtioPmem, Task: task.Task{Name: "churn", Rounds: churnRounds},
		})
		freed := 0
		var freedBytes int64
		err := r.Serve(func(q task.Request) (reply task.Reply) {
			ctx := context.Background()
			var err error
			switch q.Op {
			case task.OpAdd:
				var entries []testimage.Entry
				reply.Key, entries = churnImage(q.Image)
				p.add(t, reply.Key, [][]testimage.Entry{entries})
			case task.OpRemove:
				err = p.RemoveImage(ctx, q.Key)
				reply.Dead = p.Dead()
			case task.OpErase:
				reply.Dead, err = p.Erase(ctx, q.Dead)
			case task.OpFree:
				err = p.Free(ctx, q.Dead)
				for _, d := range q.Dead {
					freed++
					freedBytes += d.Size
				}
			default:
				err = fmt.Errorf("operation %q: %w", q.Op, errors.ErrUnsupported)
			}
			if err != nil {
				reply.Error = err.Error()
			}
			return reply
		})
		if err != nil {
			t.Fatal(err)
		}
		answer, err := r.Wait()
		if err != nil {
			t.Fatal(err)
		}
		waiting := len(p.Dead())
		if _, err := p.NothingMounted(context.Background()); err != nil {
			t.Error(err)
		}
		if n := len(p.Dead()); n > 0 {
			t.Errorf("%d extents are dead and not free when no kernel has the pool mounted any more", n)
		}
		t.Logf("kernel %s, %d images, %d files verified, %d extents of %d KiB were freed, %d wait for the next epoch",
			answer.Kernel, churnRounds, answer.Verified, freed, freedBytes>>10, waiting)
		if answer.Verified < 20*churnRounds {
			t.Errorf("%d files were verified, want at least those of each image once", answer.Verified)
		}
		if freed < churnRounds {
			t.Errorf("space of %d files was freed, want that of one file for each image or more", freed)
		}
	})
}

// churnImage makes an image of common files and of its own files.
func churnImage(i int) (key string, entries []testimage.Entry) {
	random := rand.New(rand.NewPCG(uint64(i), 1))
	sizes := []int{1, 100, 4096, 20_000, 70_000}
	var names []string
	add := func(way string, seed uint64) {
		b := testimage.Noise(seed, sizes[seed%uint64(len(sizes))])
		names = append(names, task.NameOf(way, b))
		entries = append(entries, testimage.File(names[len(names)-1], 0o644, b))
	}
	for _, way := range task.Ways {
		entries = append(entries, testimage.Dir(way, 0o755))
		for _, n := range random.Perm(30)[:10] {
			add(way, uint64(n))
		}
		for n := range 3 {
			add(way, uint64(1000+10*i+n))
		}
	}
	return task.KeyOf(names), entries
}
