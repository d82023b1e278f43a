package mount

import (
	"context"
	"fmt"
	"runtime/debug"
	"strconv"

	"github.com/daxfs/daxfs-snapshotter/daxfs"
	"github.com/daxfs/daxfs-snapshotter/mount/internal/sys"
	"github.com/daxfs/daxfs-snapshotter/pool/region"
)

// CheckImage proves that the bytes of src are a sound image, by daxfs.Check on a mapping of the
// window. An error wraps ErrCheck and names the first finding. The region needs a path.
func CheckImage(ctx context.Context, src Source) error {
	return eachFinding(ctx, src, func(b []byte, report func(daxfs.Finding) bool) error {
		return guard(func() error { return daxfs.Check(daxfs.Mem(b), int64(len(b)), report) })
	})
}

// ProveImage proves by daxfs.Prove that src is, byte for byte, the image with a root hash. Errors are
// those of CheckImage.
func ProveImage(ctx context.Context, src Source, root daxfs.RootHash) error {
	return eachFinding(ctx, src, func(b []byte, report func(daxfs.Finding) bool) error {
		return daxfs.Prove(ctx, guarded(b), int64(len(b)), daxfs.ProveOptions{Root: &root}, report)
	})
}

// eachFinding maps the window of src and turns the findings of check into one error.
func eachFinding(ctx context.Context, src Source, check func(b []byte, report func(daxfs.Finding) bool) error) error {
	path, off := src.Region.Path, src.Off
	switch r := src.Region; {
	case r.Kind == region.KindDMABuf && r.FD >= 0: // the path is that of the heap
		path = "/dev/fd/" + strconv.Itoa(r.FD)
	case r.Kind == region.KindPhys && r.HasPhys && r.Phys <= 1<<62:
		path, off = "/dev/mem", off+int64(r.Phys)
	case path == "":
		path = r.BlockDevice
	}
	if path == "" {
		return fmt.Errorf("%w: %s has no path to read it from", ErrCheck, src)
	}
	m, err := sys.MapWindow(path, off, src.Size)
	if err != nil {
		return fmt.Errorf("%w: %s: %w", ErrCheck, src, err)
	}
	defer m.Close()
	var first *daxfs.Finding
	n := 0
	err = check(m.Window, func(found daxfs.Finding) bool {
		if first == nil {
			first = &found
		}
		n++
		return n < 100 && ctx.Err() == nil
	})
	switch {
	case ctx.Err() != nil:
		return ctx.Err()
	case first != nil:
		return fmt.Errorf("%w: %s: rule %s at offset %d, path %q: %s (%d findings; `daxfs verify` prints all)",
			ErrCheck, src, first.Rule, first.Off, first.Path, first.Msg, n)
	case err != nil:
		return fmt.Errorf("%w: %s: %w", ErrCheck, src, err)
	}
	return nil
}

// guarded reads memory that may vanish. It never hands out the memory itself, so it may be shared.
type guarded []byte

func (g guarded) ReadAt(p []byte, off int64) (n int, err error) {
	err = guard(func() (err error) {
		n, err = daxfs.Mem(g).ReadAt(p, off)
		return err
	})
	return n, err
}

// guard calls f, which reads memory that may vanish, such as a mapped file that is truncated.
func guard(f func() error) (err error) {
	defer debug.SetPanicOnFault(debug.SetPanicOnFault(true))
	defer func() {
		if p := recover(); p != nil {
			fault, ok := p.(interface{ Addr() uintptr })
			if !ok {
				panic(p) // our bug, not a fault of the memory
			}
			err = fmt.Errorf("reading the image faulted at %#x: the file was truncated, or its memory or disk is "+
				"broken", fault.Addr())
		}
	}()
	return f()
}
