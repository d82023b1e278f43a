package region

import (
	"errors"
	"fmt"
	"io"
	"os"
	"sync"
	"syscall"

	"golang.org/x/sys/unix"
)

// file is a region in a sparse file, on disk or on tmpfs. It writes with pwrite, which fills fresh
// pages without zeroing them first, takes no page fault, and reports a full filesystem as ENOSPC; a
// store to a mapping would raise SIGBUS.
type file struct {
	f    *os.File
	size int64
	info Info
	// behind is nil if the bytes never go to a disk.
	behind *behind

	fdatasync func() error // replaced in tests

	mu     sync.Mutex
	failed error // of the first sync that failed
}

// openPoolFile opens or creates the file of a pool.
func openPoolFile(c Config) (*os.File, error) {
	flags := os.O_RDWR
	if c.ReadOnly {
		flags = os.O_RDONLY
	} else if c.Create {
		flags |= os.O_CREATE
	}
	// O_NOFOLLOW: in a directory that others can write to, they could point a link anywhere.
	f, err := os.OpenFile(c.Path, flags|unix.O_NOFOLLOW, 0o600)
	if errors.Is(err, unix.ELOOP) {
		return nil, fmt.Errorf("%q is a symbolic link: name the file that it leads to: %w", c.Path, ErrForeign)
	}
	return f, err
}

func openFile(c Config) (Region, error) {
	f, err := openPoolFile(c)
	if err != nil {
		return nil, err
	}
	r := &file{f: f, info: Info{Kind: c.Kind, Path: c.Path, Sparse: true, ReadOnly: c.ReadOnly, FD: int(f.Fd())}}
	r.fdatasync = func() error { return unix.Fdatasync(int(f.Fd())) }
	if err := r.init(c); err != nil {
		r.Close()
		return nil, err
	}
	return r, nil
}

func (r *file) init(c Config) error {
	st, err := r.f.Stat()
	if err != nil {
		return err
	}
	if !st.Mode().IsRegular() {
		return fmt.Errorf("is %s, expected a regular file: %w", st.Mode().Type(), ErrKind)
	}
	if err := r.checkFilesystem(); err != nil {
		return err
	}
	if err := checkOwner(st, c); err != nil {
		return err
	}
	size := st.Size()
	switch {
	case size == 0 && c.Create && !c.ReadOnly:
		if size, err = usable(c.Size); err != nil {
			return fmt.Errorf("configured size: %w", err)
		}
		if err := r.f.Truncate(size); err != nil {
			return err
		}
		if err := r.f.Sync(); err != nil {
			return err
		}
	case c.Size != 0 && c.Size&^(Align-1) != size&^(Align-1):
		return fmt.Errorf("the file has %d bytes, configured are %d: %w", size, c.Size, ErrSize)
	}
	if r.size, err = usable(size); err != nil {
		return err
	}
	if r.info.Persistent == PersistsReboot {
		r.behind = &behind{f: r.f}
	}
	return nil
}

// checkOwner refuses a file that another user can write to or has another name for: its bytes reach
// the kernel and containers. Readers skip the check, because they verify the bytes themselves.
func checkOwner(st os.FileInfo, c Config) error {
	sys, ok := st.Sys().(*syscall.Stat_t)
	if !ok || c.ReadOnly {
		return nil
	}
	switch {
	case int(sys.Uid) != os.Geteuid():
		return fmt.Errorf("belongs to user %d, expected %d: %w; remove it, or choose another path", sys.Uid,
			os.Geteuid(), ErrForeign)
	case st.Mode().Perm()&0o022 != 0:
		return fmt.Errorf("has mode %#o, which lets others write to it: %w; take that away (chmod go-w) if nobody has",
			st.Mode().Perm(), ErrForeign)
	case sys.Nlink != 1:
		return fmt.Errorf("has %d names, expected one: %w; remove the others", sys.Nlink, ErrForeign)
	}
	return nil
}

// checkFilesystem tells "file" and "tmpfs" apart: they survive different events and mount differently.
func (r *file) checkFilesystem() error {
	var fs unix.Statfs_t
	if err := unix.Fstatfs(int(r.f.Fd()), &fs); err != nil {
		return fmt.Errorf("statfs: %w", err)
	}
	onTmpfs := fs.Type == unix.TMPFS_MAGIC || fs.Type == unix.RAMFS_MAGIC
	r.info.Persistent = PersistsReboot
	switch {
	case fs.Type == unix.HUGETLBFS_MAGIC:
		return fmt.Errorf("is on hugetlbfs, use kind %q: %w", KindHugetlbfs, ErrKind)
	case onTmpfs && r.info.Kind != KindTmpfs:
		return fmt.Errorf("is on tmpfs, use kind %q or a path on disk: %w", KindTmpfs, ErrKind)
	case !onTmpfs && r.info.Kind == KindTmpfs:
		return fmt.Errorf("is not on tmpfs (filesystem type %#x), mount one there or use kind %q: %w", fs.Type,
			KindFile, ErrKind)
	case onTmpfs:
		r.info.Persistent = PersistsProcess
	}
	return nil
}

func (r *file) ReadAt(p []byte, off int64) (int, error) {
	if off < 0 || off >= r.size {
		return 0, io.EOF
	}
	if int64(len(p)) > r.size-off {
		n, err := r.f.ReadAt(p[:r.size-off], off)
		if err == nil {
			err = io.EOF
		}
		return n, err
	}
	return r.f.ReadAt(p, off)
}

func (r *file) WriteAt(p []byte, off int64) (int, error) {
	if err := checkRange(off, int64(len(p)), r.size); err != nil {
		return 0, err
	}
	n, err := r.f.WriteAt(p, off)
	if r.behind != nil && n > 0 {
		r.behind.wrote(off, int64(n))
	}
	return n, err
}

func (r *file) Size() int64 { return r.size }
func (r *file) Info() Info  { return r.info }
func (r *file) Lock() error { return Flock(r.f) }

// Sync syncs the whole file: syncing a range does not make its newly allocated blocks durable.
//
// A failed sync is not retried: the kernel reports an error once, drops the unwritten pages and calls
// the next sync a success. Other pending writes may be lost, too, so every later Sync fails.
func (r *file) Sync(off, n int64) error {
	if err := checkRange(off, n, r.size); err != nil {
		return err
	}
	if r.info.Persistent != PersistsReboot {
		return nil
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.failed != nil {
		return fmt.Errorf("an earlier sync failed, what was written before it may be lost; look at the disk, then "+
			"open the pool anew: %w", r.failed)
	}
	for {
		err := r.fdatasync()
		if errors.Is(err, unix.EINTR) {
			continue
		}
		if err != nil {
			r.failed = &os.PathError{Op: "fdatasync", Path: r.info.Path, Err: err}
		}
		return r.failed
	}
}

func (r *file) Punch(off, n int64) error {
	if err := checkRange(off, n, r.size); err != nil || n == 0 {
		return err
	}
	err := unix.Fallocate(int(r.f.Fd()), unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, off, n)
	if errors.Is(err, unix.EOPNOTSUPP) {
		return writeZeros(r.f, off, n)
	}
	if err != nil {
		return &os.PathError{Op: "punch hole", Path: r.info.Path, Err: err}
	}
	return nil
}

func (r *file) Close() error {
	if r.behind != nil {
		r.behind.wait()
	}
	return r.f.Close()
}

var zeros = make([]byte, 1<<20)

// writeZeros writes n zero bytes, for memory that cannot be punched.
func writeZeros(w io.WriterAt, off, n int64) error {
	for n > 0 {
		k, err := w.WriteAt(zeros[:min(n, int64(len(zeros)))], off)
		if err != nil {
			return err
		}
		off += int64(k)
		n -= int64(k)
	}
	return nil
}
