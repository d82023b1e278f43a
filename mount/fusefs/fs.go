package fusefs

import (
	"errors"
	"io/fs"
	"log"
	"runtime/debug"
	"sync"
	"sync/atomic"
	"syscall"

	"github.com/hanwen/go-fuse/v2/fuse"
	"golang.org/x/sys/unix"

	"github.com/daxfs/daxfs-snapshotter/daxfs"
	"github.com/daxfs/daxfs-snapshotter/mount"
)

// forever is a timeout in seconds, the longest that the kernel does not cut off.
const forever = 1 << 40

// server answers requests from an image. All of its methods are safe for concurrent use.
type server struct {
	fuse.RawFileSystem // methods not defined here return ENOSYS, and the kernel asks only once

	img *daxfs.FS
	// live is true if img is a live tree: images appear in its root directory while it is served.
	live bool
	log  *log.Logger
	// count holds the counters of this server.
	count Counters
	// After ENOSYS the kernel never asks again and keeps its cache.
	noOpen, noOpendir atomic.Bool
	// noXattrs is set once it is certain that no inode has attributes. Then one getxattr(2) is answered
	// with ENOSYS, and the kernel asks no more; every exec, ACL check and overlay lookup would ask
	// otherwise. Listing is rare, and programs cope better with an empty list than with EOPNOTSUPP.
	noXattrs atomic.Bool

	logged  sync.Map // nid of inodes whose damage was logged
	faulted sync.Once
}

func newServer(img *daxfs.FS, l *log.Logger) *server {
	return &server{RawFileSystem: fuse.NewDefaultRawFileSystem(), img: img, log: l}
}

// String returns the file system type without "fuse.".
func (s *server) String() string { return "daxfs" }

// Init reads the capabilities of the kernel.
func (s *server) Init(srv *fuse.Server) {
	flags := srv.KernelSettings().Flags64()
	s.noOpen.Store(flags&fuse.CAP_NO_OPEN_SUPPORT != 0)
	s.noOpendir.Store(flags&fuse.CAP_NO_OPENDIR_SUPPORT != 0)
}

// A node number is nid + 2: 0 means "no such name" and 1 is the root.
const nodeBias = mount.NodeBias

func (s *server) node(nid uint64) uint64 {
	if nid == s.img.Root() {
		return fuse.FUSE_ROOT_ID
	}
	return nid + nodeBias
}

func (s *server) nid(node uint64) uint64 {
	if node == fuse.FUSE_ROOT_ID {
		return s.img.Root()
	}
	return node - nodeBias
}

func (s *server) inode(node uint64) (daxfs.Inode, fuse.Status) {
	// A truncated file below the mapping, or failed memory, causes a fault. It becomes a panic, which
	// go-fuse turns into EIO; otherwise the process would end, with every container on it.
	debug.SetPanicOnFault(true)
	nid := s.nid(node)
	in, err := s.img.Inode(nid)
	if err != nil && s.live {
		// A file of a removed image. Another type would make the kernel drop the inode, which may be open.
		if _, eerr := s.img.Erased(nid); eerr == nil {
			return in, fuse.Status(unix.ESTALE)
		}
	}
	if err != nil {
		return in, s.errno(nid, err)
	}
	return in, fuse.OK
}

// errno translates an error, and logs damage once per inode.
func (s *server) errno(nid uint64, err error) fuse.Status {
	var e syscall.Errno
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return fuse.ENOENT
	case errors.As(err, &e):
		return fuse.Status(e)
	}
	if _, dup := s.logged.LoadOrStore(nid, struct{}{}); !dup {
		s.log.Printf("inode %d: %v", nid, err)
	}
	if errors.Is(err, daxfs.ErrCorrupt) {
		return fuse.Status(unix.EUCLEAN)
	}
	return fuse.EIO
}

// panicked handles a panic while a request is served. It logs the first fault of the mapping, and
// anything else, which is a bug, with its stack.
func (s *server) panicked(p any) fuse.Status {
	if fault, ok := p.(interface{ Addr() uintptr }); ok {
		s.faulted.Do(func() {
			s.log.Printf("reading the image faulted at %#x: its file was truncated, or its memory or disk is broken",
				fault.Addr())
		})
	} else {
		s.log.Printf("panic: %v\n%s", p, debug.Stack())
	}
	return fuse.EIO
}

func fill(a *fuse.Attr, in *daxfs.Inode) {
	*a = fuse.Attr{
		Ino: in.Nid, Size: uint64(in.Size), Blocks: uint64(in.Size+511) / 512, Mode: in.Mode, Nlink: in.Nlink,
		Owner: fuse.Owner{Uid: in.UID, Gid: in.GID}, Rdev: uint32(in.Rdev), Blksize: daxfs.BlockSize,
		// The image has one time, which EROFS shows as all three.
		Mtime: uint64(in.Mtime.Sec), Mtimensec: in.Mtime.Nsec, Atime: uint64(in.Mtime.Sec), Atimensec: in.Mtime.Nsec,
		Ctime: uint64(in.Mtime.Sec), Ctimensec: in.Mtime.Nsec,
	}
}

func (s *server) entry(out *fuse.EntryOut, in *daxfs.Inode) {
	out.NodeId, out.EntryValid, out.AttrValid = s.node(in.Nid), forever, forever
	if out.NodeId != fuse.FUSE_ROOT_ID { // the kernel gives the root generation 0, and takes any other for another file
		out.Generation = uint64(mount.Generation(s.img.Super().UUID))
	}
	fill(&out.Attr, in)
}

// Lookup implements fuse.RawFileSystem.
func (s *server) Lookup(_ <-chan struct{}, h *fuse.InHeader, name string, out *fuse.EntryOut) fuse.Status {
	s.count.Lookup.Add(1)
	dir, st := s.inode(h.NodeId)
	if !st.Ok() {
		return st
	}
	switch {
	case name == "/":
		// The kernel found the inode by a handle, without a name: an overlay looks for a file's origin.
		s.entry(out, &dir)
		return fuse.OK
	case s.live && h.NodeId == fuse.FUSE_ROOT_ID:
		return s.slot(&dir, name, out)
	}
	nid, err := dir.Lookup(name)
	if errors.Is(err, fs.ErrNotExist) {
		out.NodeId, out.EntryValid = 0, forever // the kernel remembers that the name is missing
		return fuse.OK
	}
	if err != nil {
		return s.errno(dir.Nid, err)
	}
	in, st := s.inode(nid + nodeBias)
	if !st.Ok() {
		return st
	}
	s.entry(out, &in)
	return fuse.OK
}

// slot looks up an image of a live tree. The kernel must not remember a missing slot.
func (s *server) slot(root *daxfs.Inode, name string, out *fuse.EntryOut) fuse.Status {
	nid, err := root.Lookup(name)
	if err != nil {
		return s.errno(root.Nid, err)
	}
	in, err := s.img.Inode(nid)
	if err != nil {
		return fuse.ENOENT
	}
	s.entry(out, &in)
	return fuse.OK
}

// GetAttr implements fuse.RawFileSystem.
func (s *server) GetAttr(_ <-chan struct{}, in *fuse.GetAttrIn, out *fuse.AttrOut) fuse.Status {
	s.count.GetAttr.Add(1)
	i, st := s.inode(in.NodeId)
	if !st.Ok() {
		return st
	}
	out.AttrValid = forever
	fill(&out.Attr, &i)
	return fuse.OK
}

// Forget implements fuse.RawFileSystem; there is no state to forget.
func (s *server) Forget(uint64, uint64) {}

// Readlink implements fuse.RawFileSystem.
func (s *server) Readlink(_ <-chan struct{}, h *fuse.InHeader) ([]byte, fuse.Status) {
	s.count.Readlink.Add(1)
	in, st := s.inode(h.NodeId)
	if !st.Ok() {
		return nil, st
	}
	target, err := in.Target()
	if err != nil {
		return nil, s.errno(in.Nid, err)
	}
	return []byte(target), fuse.OK
}

// Open implements fuse.RawFileSystem.
func (s *server) Open(_ <-chan struct{}, _ *fuse.OpenIn, out *fuse.OpenOut) fuse.Status {
	s.count.Open.Add(1)
	if s.noOpen.Load() {
		return fuse.ENOSYS
	}
	out.OpenFlags = fuse.FOPEN_KEEP_CACHE
	return fuse.OK
}

// OpenDir implements fuse.RawFileSystem.
func (s *server) OpenDir(_ <-chan struct{}, _ *fuse.OpenIn, out *fuse.OpenOut) fuse.Status {
	s.count.OpenDir.Add(1)
	if s.noOpendir.Load() {
		return fuse.ENOSYS
	}
	out.OpenFlags = fuse.FOPEN_KEEP_CACHE | fuse.FOPEN_CACHE_DIR
	return fuse.OK
}

// view is the reply to a read: bytes of the mapped image. go-fuse asks for them once, then calls Done.
type view struct{ b []byte }

var views = sync.Pool{New: func() any { return new(view) }}

func (v *view) Bytes([]byte) ([]byte, fuse.Status) { return v.b, fuse.OK }
func (v *view) Size() int                          { return len(v.b) }
func (v *view) Done()                              { v.b = nil; views.Put(v) }

// Read implements fuse.RawFileSystem.
func (s *server) Read(_ <-chan struct{}, r *fuse.ReadIn, buf []byte) (fuse.ReadResult, fuse.Status) {
	s.count.Read.Add(1)
	in, st := s.inode(r.NodeId)
	var err error
	if st == fuse.Status(unix.ESTALE) {
		// Open files stay open.
		if in, err = s.img.Erased(s.nid(r.NodeId)); err == nil {
			st = fuse.OK
		}
	}
	if !st.Ok() {
		return nil, st
	}
	if !in.IsRegular() {
		return nil, fuse.EINVAL
	}
	v := views.Get().(*view)
	v.b, err = in.View(int64(r.Offset), int(r.Size))
	if err == nil && len(v.b) < int(r.Size) && int64(r.Offset)+int64(len(v.b)) < in.Size {
		// The contents are in pieces, and the kernel takes a short reply for the end of the file.
		var n int
		n, err = in.ReadAt(buf[:min(int64(r.Size), in.Size-int64(r.Offset))], int64(r.Offset))
		v.b = buf[:n]
	}
	if err != nil {
		v.Done()
		return nil, s.errno(in.Nid, err)
	}
	s.count.ReadBytes.Add(uint64(len(v.b)))
	return v, fuse.OK
}

// Directory offsets: 0 is ".", 1 is "..", then cursors of the image (never 0 after an entry) plus 2.

// ReadDir implements fuse.RawFileSystem.
func (s *server) ReadDir(_ <-chan struct{}, r *fuse.ReadIn, out *fuse.DirEntryList) fuse.Status {
	return s.readDir(r, out.AddDirEntry)
}

// ReadDirPlus implements fuse.RawFileSystem.
func (s *server) ReadDirPlus(_ <-chan struct{}, r *fuse.ReadIn, out *fuse.DirEntryList) fuse.Status {
	return s.readDir(r, func(e fuse.DirEntry) bool {
		o := out.AddDirLookupEntry(e)
		if o == nil {
			return false
		}
		if e.Name == "." || e.Name == ".." || s.live && r.NodeId == fuse.FUSE_ROOT_ID {
			// Return no node, so that the kernel makes no entry: it must look up no slot before Mount does.
			return true
		}
		in, st := s.inode(e.Ino + nodeBias)
		if st.Ok() {
			s.entry(o, &in)
		} // otherwise the name is listed, and looking it up returns the error
		return true
	})
}

func (s *server) readDir(r *fuse.ReadIn, add func(fuse.DirEntry) bool) fuse.Status {
	s.count.ReadDir.Add(1)
	dir, st := s.inode(r.NodeId)
	if !st.Ok() {
		return st
	}
	off := r.Offset
	if off == 0 {
		if !add(fuse.DirEntry{Name: ".", Mode: unix.S_IFDIR, Ino: dir.Nid, Off: 1}) {
			return fuse.OK
		}
		off = 1
	}
	if off == 1 {
		// The kernel knows the parent; no program can rely on the inode number of ".." in a listing.
		if !add(fuse.DirEntry{Name: "..", Mode: unix.S_IFDIR, Ino: fuse.FUSE_UNKNOWN_INO, Off: 2}) {
			return fuse.OK
		}
		off = 2
	}
	err := dir.Entries(int64(off-2), func(e daxfs.Dirent) bool {
		return add(fuse.DirEntry{Name: e.Name, Mode: e.Type, Ino: e.Nid, Off: uint64(e.Next) + 2})
	})
	if err != nil {
		return s.errno(dir.Nid, err)
	}
	return fuse.OK
}

// GetXAttr implements fuse.RawFileSystem.
func (s *server) GetXAttr(_ <-chan struct{}, h *fuse.InHeader, name string, dest []byte) (uint32, fuse.Status) {
	s.count.GetXattr.Add(1)
	if s.noXattrs.Load() {
		return 0, fuse.ENOSYS
	}
	in, st := s.inode(h.NodeId)
	if !st.Ok() {
		return 0, st
	}
	val, ok, err := in.Xattr(name)
	switch {
	case err != nil:
		return 0, s.errno(in.Nid, err)
	case !ok:
		return 0, fuse.ENODATA
	case len(val) > len(dest):
		return uint32(len(val)), fuse.ERANGE
	}
	return uint32(copy(dest, val)), fuse.OK
}

// ListXAttr implements fuse.RawFileSystem.
func (s *server) ListXAttr(_ <-chan struct{}, h *fuse.InHeader, dest []byte) (uint32, fuse.Status) {
	s.count.ListXattr.Add(1)
	in, st := s.inode(h.NodeId)
	if !st.Ok() {
		return 0, st
	}
	xs, err := in.Xattrs()
	if err != nil {
		return 0, s.errno(in.Nid, err)
	}
	var list []byte
	for _, x := range xs {
		list = append(append(list, x.Name...), 0)
	}
	if len(list) > len(dest) {
		return uint32(len(list)), fuse.ERANGE
	}
	return uint32(copy(dest, list)), fuse.OK
}

// StatFs implements fuse.RawFileSystem. Like EROFS it shows all blocks as used.
func (s *server) StatFs(_ <-chan struct{}, _ *fuse.InHeader, out *fuse.StatfsOut) fuse.Status {
	s.count.StatFS.Add(1)
	sb := s.img.Super()
	*out = fuse.StatfsOut{
		Blocks: uint64(sb.Blocks), Files: sb.Inodes, Bsize: daxfs.BlockSize, Frsize: daxfs.BlockSize,
		NameLen: daxfs.MaxName,
	}
	return fuse.OK
}

// lookForXattrs reads all metadata once and sets noXattrs if no inode has an attribute.
func (s *server) lookForXattrs() {
	debug.SetPanicOnFault(true)
	defer func() {
		if p := recover(); p != nil {
			s.log.Printf("while looking for xattrs: %v", p)
		}
	}()
	found := errors.New("found")
	err := s.img.Walk(func(_ string, in daxfs.Inode) error {
		xs, err := in.Xattrs()
		if err != nil {
			return err
		}
		if len(xs) > 0 {
			return found
		}
		return nil
	})
	s.noXattrs.Store(err == nil)
}
