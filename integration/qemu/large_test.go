package qemu

import (
	"slices"
	"testing"

	"github.com/daxfs/daxfs-snapshotter/integration/qemu/task"
	"github.com/daxfs/daxfs-snapshotter/integration/testimage"
)

// A large file, such as a model's weights, is mapped with huge pages: it is contiguous from a multiple
// of 2 MiB, and reading it costs one page fault per 2 MiB. Both images with the file map the same memory.
func TestLargeFile(t *testing.T) {
	need(t)
	const size, file = 64 << 20, "models/weights.safetensors"
	weights := testimage.File(file, 0o644, testimage.Noise(7, size))
	pool := poolOf(t, 128<<20, map[string][][]testimage.Entry{
		// Small files beside it, so that nothing is aligned by chance.
		"serve": {{testimage.File("bin/serve", 0o755, testimage.Noise(1, 5000))}, {weights}},
		"tune": {{
			weights, testimage.File("models/config.json", 0o644, testimage.Noise(2, 300)),
			testimage.File("bin/tune", 0o755, testimage.Noise(3, 70_000)),
		}},
	})
	onEach(t, func(t *testing.T, k Kernel) {
		answer, err := boot(t, Machine{
			Kernel: k, Memory: pool.path, Via: VirtioPmem,
			Task: task.Task{Name: "large", Images: []string{"serve", "tune"}, File: file},
		}).Wait()
		if err != nil {
			t.Fatal(err)
		}
		t.Logf("kernel %s, page faults of reading %d MiB: %v", answer.Kernel, size>>20, answer.Faults)
		const perHuge = 2 << 20 >> 12
		for i, frames := range answer.Frames {
			if len(frames) != size>>12 || frames[0]%perHuge != 0 {
				t.Errorf("image %d: %d pages from frame %#x on, want %d from a multiple of %#x on", i, len(frames),
					frames[0], size>>12, perHuge)
			}
			for n, frame := range frames {
				if frame != frames[0]+uint64(n) {
					t.Fatalf("image %d: page %d is frame %#x, want one piece from %#x on", i, n, frame, frames[0])
				}
			}
			// Some faults are for the Go runtime's own memory.
			if f := answer.Faults[i]; f < size>>21 || f > 2*size>>21 {
				t.Errorf("image %d: %d page faults, want about %d, one for each huge page (with small pages: %d)", i, f,
					size>>21, size>>12)
			}
		}
		if len(answer.Frames) != 2 || !slices.Equal(answer.Frames[0], answer.Frames[1]) {
			t.Error("the two images hold the file in different memory")
		}
	})
}
