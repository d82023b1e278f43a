package region

import (
	"errors"
	"fmt"
	"os"

	"golang.org/x/sys/unix"
)

// openHugetlbfs maps a file of huge pages. The mapping reserves all of them, so that no store can fail
// later. The filesystem has no write(2).
func openHugetlbfs(c Config) (_ Region, err error) {
	f, err := openPoolFile(c)
	if err != nil {
		return nil, err
	}
	r := &mapped{f: f, info: Info{
		Kind: c.Kind, Path: c.Path, Persistent: PersistsProcess, Sparse: true,
		ReadOnly: c.ReadOnly, FD: int(f.Fd()),
	}}
	defer func() {
		if err != nil {
			r.Close()
		}
	}()
	var fs unix.Statfs_t
	if err := unix.Fstatfs(int(f.Fd()), &fs); err != nil {
		return nil, fmt.Errorf("statfs: %w", err)
	}
	if fs.Type != unix.HUGETLBFS_MAGIC {
		return nil, fmt.Errorf("is not on hugetlbfs (filesystem type %#x): %w", fs.Type, ErrKind)
	}
	page := int64(fs.Bsize)
	st, err := f.Stat()
	if err != nil {
		return nil, err
	}
	if err := checkOwner(st, c); err != nil {
		return nil, err
	}
	size := st.Size()
	fresh := size == 0 && c.Create && !c.ReadOnly
	if fresh {
		size = c.Size
	} else if c.Size != 0 && c.Size/page != size/page {
		return nil, fmt.Errorf("the file has %d bytes, configured are %d: %w", size, c.Size, ErrSize)
	}
	if size, err = usable(size - size%page); err != nil {
		return nil, fmt.Errorf("in pages of %d bytes: %w", page, err)
	}
	if fresh {
		if err := f.Truncate(size); err != nil {
			return nil, err
		}
	}
	if r.m, err = mapFile(f, 0, size, c.ReadOnly); err != nil {
		if fresh {
			err = errors.Join(err, os.Remove(c.Path))
		}
		if errors.Is(err, unix.ENOMEM) {
			return nil,
				fmt.Errorf("%d huge pages of %d bytes are needed, raise /proc/sys/vm/nr_hugepages: %w",
					size/page, page, err)
		}
		return nil, err
	}
	r.all = r.m
	r.punch = func(off, n int64) error { return r.punchHuge(off, n, page) }
	return r, nil
}

// punchHuge gives whole huge pages back and clears the rest of the range.
func (r *mapped) punchHuge(off, n, page int64) error {
	lo, hi := (off+page-1)/page*page, (off+n)/page*page
	if lo >= hi {
		return r.store(off, n, func(to []byte) { clear(to) })
	}
	for _, edge := range [2][2]int64{{off, lo}, {hi, off + n}} {
		if err := r.store(edge[0], edge[1]-edge[0], func(to []byte) { clear(to) }); err != nil {
			return err
		}
	}
	if err := unix.Fallocate(int(r.f.Fd()), unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, lo, hi-lo); err != nil {
		return &os.PathError{Op: "punch hole", Path: r.info.Path, Err: err}
	}
	return nil
}
