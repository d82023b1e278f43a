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

// CheckImage proves that the bytes of src are a sound image, by daxfs.Check on a mapping of the window. An error
// wraps ErrCheck and tells the first finding. A region that has no path cannot be checked here: its owner checks it
// and says so in Source.Checked.
func CheckImage(ctx context.Context, src Source) error {
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
		return fmt.Errorf("%w: %s has no path to read it from: check it with its owner and set Checked", ErrCheck, src)
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

// check is daxfs.Check of an image in memory that may vanish, as a mapped file does when it is truncated.
func check(b []byte, report func(daxfs.Finding) bool) (err error) {
	defer debug.SetPanicOnFault(debug.SetPanicOnFault(true))
	defer func() {
		if p := recover(); p != nil {
			fault, ok := p.(interface{ Addr() uintptr })
			if !ok {
				panic(p) // a defect of ours, not of the memory
			}
			err = fmt.Errorf("reading the image faulted at %#x: the file was truncated, or its memory or disk is broken", fault.Addr())
		}
	}()
	return daxfs.Check(daxfs.Mem(b), int64(len(b)), report)
}
