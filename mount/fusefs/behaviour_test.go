package fusefs

import (
	"bytes"
	"fmt"
	"log"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/hanwen/go-fuse/v2/fuse"
	"github.com/hanwen/go-fuse/v2/posixtest"
	"golang.org/x/sys/unix"

	"github.com/daxfs/daxfs-snapshotter/daxfs"
	"github.com/daxfs/daxfs-snapshotter/mount/internal/mounttest"
	"github.com/daxfs/daxfs-snapshotter/mount/internal/sys"
	"github.com/daxfs/daxfs-snapshotter/pool/region"
)

// A dma-buf cannot be opened by name: the server inherits its descriptor. Here a memfd stands for it.
func TestServesDescriptor(t *testing.T) {
	needFuse(t)
	tree := mounttest.Tree(t)
	src := source(t, tree)
	b, err := os.ReadFile(src.Region.Path)
	if err != nil {
		t.Fatal(err)
	}
	fd, err := unix.MemfdCreate("buffer", unix.MFD_CLOEXEC)
	if err != nil {
		t.Fatal(err)
	}
	f := os.NewFile(uintptr(fd), "buffer")
	if _, err := f.WriteAt(b, 0); err != nil {
		t.Fatal(err)
	}
	src.Region = region.Info{Kind: region.KindDMABuf, Path: "/dev/dma_heap/system", FD: fd}
	dir := t.TempDir()
	if err := driver().Probe(t.Context(), src.Region); err != nil {
		t.Fatal(err)
	}
	if err := driver().Mount(t.Context(), src, dir); err != nil {
		t.Fatal(err)
	}
	defer sys.Detach(dir)
	f.Close() // the server keeps the buffer
	mounttest.Same(t, tree, dir)
	if err := driver().Match(t.Context(), src, dir); err != nil {
		t.Error(err)
	}
	if err := driver().Unmount(t.Context(), dir); err != nil {
		t.Error(err)
	}
}

// idmapped is a helper that makes an idmapped clone of a mount, as for user namespaces.
func idmapped(args []string) error {
	lower, where := args[0], args[1]
	user := exec.Command("sleep", "60")
	user.SysProcAttr = &syscall.SysProcAttr{
		Cloneflags:  syscall.CLONE_NEWUSER,
		UidMappings: []syscall.SysProcIDMap{{HostID: 100000, Size: 65536}},
		GidMappings: []syscall.SysProcIDMap{{HostID: 100000, Size: 65536}},
	}
	if err := user.Start(); err != nil {
		return err
	}
	defer user.Wait()
	defer user.Process.Kill()
	ns, err := os.Open(fmt.Sprintf("/proc/%d/ns/user", user.Process.Pid))
	if err != nil {
		return err
	}
	defer ns.Close()
	tree, err := unix.OpenTree(unix.AT_FDCWD, lower, unix.OPEN_TREE_CLONE|unix.OPEN_TREE_CLOEXEC)
	if err != nil {
		return err
	}
	defer unix.Close(tree)
	attr := unix.MountAttr{Attr_set: unix.MOUNT_ATTR_IDMAP, Userns_fd: uint64(ns.Fd())}
	if err := unix.MountSetattr(tree, "", unix.AT_EMPTY_PATH, &attr); err != nil {
		return fmt.Errorf("mount_setattr: %w", err)
	}
	if err := unix.MoveMount(tree, "", unix.AT_FDCWD, where, unix.MOVE_MOUNT_F_EMPTY_PATH); err != nil {
		return err
	}
	defer unix.Unmount(where, unix.MNT_DETACH)
	var st unix.Stat_t
	if err := unix.Lstat(filepath.Join(where, "usr/bin/big"), &st); err != nil {
		return err
	}
	if st.Uid != 101000 || st.Gid != 102000 {
		return fmt.Errorf("owner %d:%d, expected 101000:102000", st.Uid, st.Gid)
	}
	_, err = os.ReadFile(filepath.Join(where, "usr/bin/big"))
	return err
}

func TestIDMapped(t *testing.T) {
	needFuse(t)
	_, dir := start(t, source(t, mounttest.Tree(t)))
	out, err := mounttest.Command("idmapped", dir, t.TempDir()).CombinedOutput()
	if strings.Contains(string(out), "mount_setattr: invalid argument") {
		t.Skip("this kernel cannot idmap FUSE (Linux 6.12 and later can)")
	}
	if err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
}

// Replies to reads cost no allocation and no copy.
func TestReadDoesNotAllocate(t *testing.T) {
	tree := t.TempDir()
	if err := os.WriteFile(filepath.Join(tree, "f"), bytes.Repeat([]byte("x"), 1<<20), 0o644); err != nil {
		t.Fatal(err)
	}
	src := source(t, tree)
	b, err := os.ReadFile(src.Region.Path)
	if err != nil {
		t.Fatal(err)
	}
	img, err := daxfs.OpenBytes(b)
	if err != nil {
		t.Fatal(err)
	}
	in, err := img.Lookup("f", false)
	if err != nil {
		t.Fatal(err)
	}
	s := newServer(img, log.New(t.Output(), "", 0))
	req := &fuse.ReadIn{Offset: 4096, Size: 128 << 10}
	req.NodeId = s.node(in.Nid)
	allocs := testing.AllocsPerRun(1000, func() {
		res, st := s.Read(nil, req, nil)
		if !st.Ok() || res.Size() != 128<<10 {
			t.Fatal(st)
		}
		data, _ := res.Bytes(nil)
		if off, _, _ := in.Data(); &data[0] != &b[off+4096] {
			t.Fatal("the reply is a copy")
		}
		res.Done()
	})
	if allocs != 0 {
		t.Errorf("%v allocations for a read", allocs)
	}
	attr := &fuse.GetAttrIn{}
	attr.NodeId = s.node(in.Nid)
	// One allocation is the reply made here.
	if allocs := testing.AllocsPerRun(1000, func() { s.GetAttr(nil, attr, new(fuse.AttrOut)) }); allocs > 1 {
		t.Errorf("%v allocations for attributes", allocs)
	}
}

// posix runs go-fuse's own tests in another process, on an overlay over our mount.
func TestPOSIXOnOverlay(t *testing.T) {
	if dir := os.Getenv("DAXFS_TEST_OVERLAY"); dir != "" {
		for name, f := range posixtest.All {
			if name == "FcntlFlockLocksFile" {
				// for FUSE file systems that keep locks themselves: locks of one process do not conflict elsewhere
				continue
			}
			t.Run(name, func(t *testing.T) {
				sub := filepath.Join(dir, name)
				if err := os.Mkdir(sub, 0o755); err != nil {
					t.Fatal(err)
				}
				f(t, sub)
			})
		}
		return
	}
	needFuse(t)
	_, lower := start(t, source(t, mounttest.Tree(t)))
	merged, err := mountOverlay(lower, t.TempDir(), "")
	if err != nil {
		t.Fatal(err)
	}
	defer sys.Detach(merged)
	cmd := exec.Command("/proc/self/exe", "-test.run=^TestPOSIXOnOverlay$", "-test.v")
	cmd.Env = append(os.Environ(), "DAXFS_TEST_OVERLAY="+merged)
	if out, err := cmd.CombinedOutput(); err != nil || !bytes.Contains(out, []byte("--- PASS: TestPOSIXOnOverlay/")) {
		t.Errorf("%v\n%s", err, out)
	}
}
