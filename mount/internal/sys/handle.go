package sys

import (
	"encoding/binary"
	"errors"
	"fmt"
	"math"
	"os"

	"golang.org/x/sys/unix"
)

// Types of file handles, from include/linux/exportfs.h.
const (
	handle32 = 0x01 // FILEID_INO32_GEN: number and generation, in the byte order of the machine
	handle64 = 0x81 // FILEID_INO64_GEN, also of FUSE: upper half, lower half, generation
)

// Handles opens files of one mounted file system by their inode numbers, without a name.
type Handles struct {
	root *os.File
	kind int32
	gen  []byte // generation of all inodes, except a FUSE root
	bias uint64 // added to an inode number
}

// OpenHandles prepares dir, the root of a mounted pool. It proves that the root itself opens by a
// handle: if the kernel could not do that, every handle would look stale, and stale means that nobody
// has the file.
//
// A FUSE file handle holds the server's node number, which is the inode number plus bias, and a
// generation that the root does not have. A gen of 0 means the generation of the root.
func OpenHandles(dir string, bias uint64, gen uint32) (*Handles, error) {
	f, err := os.Open(dir)
	if err != nil {
		return nil, err
	}
	h := &Handles{root: f, bias: bias}
	if err := h.learn(dir); err != nil {
		return nil, errors.Join(fmt.Errorf("file handles of %q: %w", dir, err), f.Close())
	}
	if gen != 0 {
		h.gen = binary.NativeEndian.AppendUint32(nil, gen)
	}
	return h, nil
}

func (h *Handles) learn(dir string) error {
	fh, _, err := unix.NameToHandleAt(int(h.root.Fd()), "", unix.AT_EMPTY_PATH)
	if err != nil {
		return err
	}
	b := fh.Bytes()
	h.kind = fh.Type()
	switch {
	case h.kind == handle32 && len(b) == 8:
		h.gen = b[4:]
	case h.kind == handle64 && len(b) == 12:
		h.gen = b[8:]
	default:
		return fmt.Errorf("handle of type %#x with %d bytes, expected type 1 or 0x81: %w", h.kind,
			len(b), ErrUnsupported)
	}
	fd, err := unix.OpenByHandleAt(int(h.root.Fd()), fh, unix.O_PATH|unix.O_CLOEXEC)
	if err != nil {
		return fmt.Errorf("the root of the file system does not open by its own handle: %w", err)
	}
	return unix.Close(fd)
}

// Open opens an inode. The error is ESTALE if it is neither in memory nor readable from the disk.
func (h *Handles) Open(nid uint64, flags int) (fd int, err error) {
	nid += h.bias
	b := make([]byte, 0, 12)
	if h.kind == handle32 {
		if nid > math.MaxUint32 {
			return -1, fmt.Errorf("inode %d does not fit into a file handle of this kernel: %w", nid, ErrUnsupported)
		}
		b = binary.NativeEndian.AppendUint32(b, uint32(nid))
	} else {
		b = binary.NativeEndian.AppendUint32(b, uint32(nid>>32))
		b = binary.NativeEndian.AppendUint32(b, uint32(nid))
	}
	fh := unix.NewFileHandle(h.kind, append(b, h.gen...))
	if fd, err = unix.OpenByHandleAt(int(h.root.Fd()), fh, flags|unix.O_CLOEXEC); err != nil {
		return -1, fmt.Errorf("open inode %d by handle: %w", nid, err)
	}
	return fd, nil
}

// Close releases the file system.
func (h *Handles) Close() error { return h.root.Close() }

// Handle returns the file handle of a directory, for CloneHandle.
func Handle(dir string) ([]byte, error) {
	fh, _, err := unix.NameToHandleAt(unix.AT_FDCWD, dir, 0)
	if err != nil {
		return nil, fmt.Errorf("file handle of %q: %w", dir, err)
	}
	return append(binary.LittleEndian.AppendUint32(nil, uint32(fh.Type())), fh.Bytes()...), nil
}

// CloneHandle is OpenClone for a directory given by its Handle, in the file system that is mounted on
// dir. It also reaches directories above dir.
func CloneHandle(dir string, handle []byte) (*Clone, error) {
	if len(handle) < 4 {
		return nil, fmt.Errorf("file handle of %d bytes, expected at least 4", len(handle))
	}
	f, err := os.Open(dir)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	fh := unix.NewFileHandle(int32(binary.LittleEndian.Uint32(handle)), handle[4:])
	fd, err := unix.OpenByHandleAt(int(f.Fd()), fh, unix.O_DIRECTORY|unix.O_CLOEXEC)
	if err != nil {
		return nil, fmt.Errorf("open the root of the file system of %q by handle: %w", dir, err)
	}
	defer unix.Close(fd)
	return openClone(fd, "", unix.AT_EMPTY_PATH)
}

// OnlyUser tells whether fd is the only open file of its inode: no other descriptor, mapping or
// running program in any mount namespace, and no loop device or file-backed mount. It takes a write
// lease and gives it back. A process that opens the file meanwhile waits for that.
//
// The lease does not see O_PATH descriptors and working directories.
func OnlyUser(fd int) (bool, error) {
	_, err := unix.FcntlInt(uintptr(fd), unix.F_SETLEASE, unix.F_WRLCK)
	if errors.Is(err, unix.EAGAIN) {
		return false, nil
	}
	if err == nil {
		_, err = unix.FcntlInt(uintptr(fd), unix.F_SETLEASE, unix.F_UNLCK)
	}
	if err != nil {
		return false, fmt.Errorf("write lease: %w", err)
	}
	return true, nil
}

// ShrinkDentries drops the unused names of a mounted file system, a side effect of reconfiguring a
// superblock. Do not use it on a file system that takes options then.
func ShrinkDentries(dir string) error {
	fd, err := unix.Fspick(unix.AT_FDCWD, dir, unix.FSPICK_CLOEXEC|unix.FSPICK_NO_AUTOMOUNT)
	if err != nil {
		return explain(fmt.Errorf("fspick %q: %w", dir, err))
	}
	defer unix.Close(fd)
	if err := unix.FsconfigReconfigure(fd); err != nil {
		return explain(fmt.Errorf("reconfigure %q: %w%s", dir, err, words(fd)))
	}
	return nil
}
