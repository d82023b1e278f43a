package daemon

import (
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// acts are all actions of a container on files, each in a directory of its own. In a view each must fail with EROFS.
var acts = []struct {
	name string
	do   func(a *acting)
}{
	{"write", func(a *acting) {
		a.identity("x", func() { a.write("x", os.O_RDWR, "changed") })
		a.identity("h1", func() { a.write("h1", os.O_WRONLY, "changed") })
		a.write("empty1", os.O_WRONLY, "filled")
		a.write("sub/deep/z", os.O_WRONLY, "changed")
		a.write("sym", os.O_WRONLY, "twice") // through the link
		a.write("owned", os.O_WRONLY, "takes the set-uid bit")
	}},
	{"append", func(a *acting) {
		a.write("x", os.O_APPEND|os.O_WRONLY, "end 1")
		a.write("x", os.O_APPEND|os.O_RDWR, "end 2")
		a.write("h2", os.O_APPEND|os.O_WRONLY, "end")
		a.write("empty2", os.O_APPEND|os.O_WRONLY, "end")
		a.open("y", os.O_APPEND|os.O_RDWR, func(f *os.File) {
			_, err := unix.Pwrite(int(f.Fd()), []byte("at the end all the same"), 0)
			a.note("pwrite", err)
		})
	}},
	{"truncate", func(a *acting) {
		a.identity("x", func() { a.note("shorter", os.Truncate(a.path("x"), 5000)) })
		a.note("longer", os.Truncate(a.path("y"), 50_000))
		a.note("to nothing", os.Truncate(a.path("h1"), 0))
		a.note("of nothing", os.Truncate(a.path("empty1"), 10_000))
		a.open("sub/z", os.O_TRUNC|os.O_WRONLY, func(*os.File) {})
	}},
	{"create", func(a *acting) {
		a.write("new", os.O_CREATE|os.O_EXCL|os.O_WRONLY, contents)
		a.write("x", os.O_CREATE|os.O_EXCL|os.O_WRONLY, "never")
		a.write("y", os.O_CREATE|os.O_TRUNC|os.O_WRONLY, "short")
		a.note("mkdir", os.Mkdir(a.path("dir"), 0o700))
		a.note("mkdir over", os.Mkdir(a.path("sub"), 0o700))
		a.note("symlink", os.Symlink("y", a.path("link")))
		a.note("mkfifo", unix.Mkfifo(a.path("pipe"), 0o600))
		a.note("mknod", unix.Mknod(a.path("null"), unix.S_IFCHR|0o666, int(unix.Mkdev(1, 3))))
		a.note("no whiteout", unix.Mknod(a.path("white"), unix.S_IFCHR, 0))
	}},
	{"unlink", func(a *acting) {
		for _, name := range []string{"x", "h1", "empty1", "dev", "fifo", "sym", "sub/z"} {
			a.note(name, os.Remove(a.path(name)))
		}
		a.note("full directory", unix.Rmdir(a.path("sub")))
		a.write("x", os.O_CREATE|os.O_EXCL|os.O_WRONLY, "another")
		a.note("tree", os.RemoveAll(a.path("sub")))
		a.note("opaque", os.Mkdir(a.path("sub"), 0o755))
	}},
	{"unlinked", func(a *acting) { // an open file works without its name
		a.open("x", os.O_RDWR, func(f *os.File) {
			a.note("unlink", os.Remove(a.path("x")))
			_, err := f.WriteString("changed")
			a.note("write", err)
			body, err := readAt(f)
			a.note("read", err, body)
		})
		a.open("h1", os.O_RDONLY, func(f *os.File) {
			a.note("unlink", os.Remove(a.path("h1")))
			var st unix.Stat_t
			a.note("fstat", unix.Fstat(int(f.Fd()), &st), st.Nlink)
		})
	}},
	{"rename", func(a *acting) {
		rename := func(from, to string) { a.note(from+" to "+to, os.Rename(a.path(from), a.path(to))) }
		rename("x", "moved")
		rename("y", "tagged") // over an equal file
		rename("h1", "h2")    // over itself, a no-op
		rename("empty1", "sub/empty")
		rename("sub/deep", "deep") // EXDEV: overlayfs would have to copy a directory of an image
		rename("sub", "owned")
		rename("dev", "device")
		rename("sym", "symbol")
	}},
	{"exchange", func(a *acting) {
		rename := func(from, to string, flags uint) {
			a.note(from+" to "+to, unix.Renameat2(unix.AT_FDCWD, a.path(from), unix.AT_FDCWD, a.path(to), flags))
		}
		rename("x", "empty1", unix.RENAME_EXCHANGE)
		rename("y", "sub/z", unix.RENAME_EXCHANGE) // equal files
		rename("tagged", "owned", unix.RENAME_NOREPLACE)
		rename("tagged", "free", unix.RENAME_NOREPLACE)
		rename("acl", "white", unix.RENAME_WHITEOUT)
	}},
	{"link", func(a *acting) {
		a.identity("x", func() { a.note("x", os.Link(a.path("x"), a.path("x2"))) })
		a.write("x2", os.O_WRONLY, "changed")
		a.note("h1", os.Link(a.path("h1"), a.path("h3")))
		a.write("h3", os.O_WRONLY, "changed")
		a.note("onto an equal file", os.Link(a.path("x"), a.path("y")))
		a.note("empty", os.Link(a.path("empty1"), a.path("empty3")))
		a.note("device", os.Link(a.path("dev"), a.path("device")))
	}},
	{"tmpfile", func(a *acting) {
		a.open(".", unix.O_TMPFILE|os.O_RDWR, func(f *os.File) {
			_, err := f.WriteString("appears")
			a.note("write", err)
			a.note("link", unix.Linkat(int(f.Fd()), "", unix.AT_FDCWD, a.path("new"), unix.AT_EMPTY_PATH))
		})
	}},
	{"chmod", func(a *acting) {
		a.identity("x", func() { a.note("x", unix.Chmod(a.path("x"), 0o4755)) })
		a.note("h1", unix.Chmod(a.path("h1"), 0o600))
		a.note("empty1", unix.Chmod(a.path("empty1"), 0))
		a.note("acl", unix.Chmod(a.path("acl"), 0o640))
		a.note("sub", unix.Chmod(a.path("sub"), 0o1777))
	}},
	{"chown", func(a *acting) {
		a.identity("x", func() { a.note("x", os.Lchown(a.path("x"), 1000, 1001)) })
		a.note("h2", os.Lchown(a.path("h2"), 1000, -1))
		a.note("owned", os.Lchown(a.path("owned"), 1000, -1)) // clears the set-uid bit
		a.note("sym", os.Lchown(a.path("sym"), 1000, 1001))
		a.note("sub", os.Lchown(a.path("sub"), -1, 1001))
	}},
	{"utimes", func(a *acting) {
		set := []unix.Timespec{{Sec: 1}, {Sec: 1_000_000_000, Nsec: 999_999_999}}
		for _, name := range []string{"x", "h1", "empty1", "sym", "sub", "fifo"} {
			a.note(name, unix.UtimesNanoAt(unix.AT_FDCWD, a.path(name), set, unix.AT_SYMLINK_NOFOLLOW))
		}
	}},
	{"xattr", func(a *acting) {
		set := func(name, attr string, flags int) {
			a.note(attr+" of "+name, unix.Lsetxattr(a.path(name), attr, []byte("container"), flags))
		}
		a.identity("x", func() { set("x", "user.new", 0) })
		set("h1", "user.new", unix.XATTR_CREATE)
		set("tagged", "user.base", unix.XATTR_CREATE)
		set("tagged", "user.base", unix.XATTR_REPLACE)
		set("y", "user.base", unix.XATTR_REPLACE)
		set("sub", "user.new", 0)
		set("empty1", "trusted.new", 0)
		set("sym", "user.new", 0)
		a.note("remove", unix.Lremovexattr(a.path("tagged"), "user.base"))
		a.note("remove none", unix.Lremovexattr(a.path("y"), "user.base"))
	}},
	{"acl", func(a *acting) {
		other := []byte(aclAccess)
		other[aclUserByte+2] = 6
		for _, name := range []string{"x", "acl", "h1", "sub"} {
			a.aclOfLower(name, func() error { return unix.Setxattr(a.path(name), aclName, other, 0) })
		}
		a.aclOfLower("sub", func() error { return unix.Setxattr(a.path("sub"), aclDefault, other, 0) })
		a.write("sub/inherits", os.O_CREATE|os.O_EXCL|os.O_WRONLY, "")
		a.aclOfLower("acl", func() error { return unix.Removexattr(a.path("acl"), aclName) })
		a.write("y", os.O_WRONLY, "copied up")
		a.note("set it then", unix.Setxattr(a.path("y"), aclName, other, 0))
	}},
	{"copy", func(a *acting) {
		cp := func(args ...string) {
			cmd := exec.Command("cp", args...)
			cmd.Dir = a.dir
			out, err := cmd.CombinedOutput()
			a.note("cp "+strings.Join(args, " "), err, string(out))
		}
		cp("x", "copy")
		cp("--reflink=auto", "-a", "x", "again")
		cp("x", "y") // equal before and after
		cp("-a", "h1", "h2", "sub/deep")
		a.write("copy", os.O_WRONLY, "the copy")
		a.write("y", os.O_WRONLY, "the other")
		cp("-a", "acl", "tagged", "owned", "sym", "dev", "sub")
	}},
	{"copy in the kernel", func(a *acting) {
		a.open("x", os.O_RDONLY, func(from *os.File) {
			a.open("new", os.O_CREATE|os.O_WRONLY, func(to *os.File) {
				n, err := unix.CopyFileRange(int(from.Fd()), nil, int(to.Fd()), nil, 10_000, 0)
				if err == unix.EXDEV { // as for any lower directory on another file system than the upper one
					a.unlike = append(a.unlike, "copy_file_range")
					n, err = unix.Sendfile(int(to.Fd()), int(from.Fd()), nil, 10_000)
				}
				a.note("copy_file_range", err, n)
				n, err = unix.Sendfile(int(to.Fd()), int(from.Fd()), nil, len(contents))
				a.note("sendfile", err, n)
			})
		})
		direct, err := unix.Open(a.path("y"), unix.O_RDONLY|unix.O_DIRECT|unix.O_CLOEXEC, 0)
		if err == unix.EINVAL { // for a file that is read through another file
			a.unlike = append(a.unlike, "O_DIRECT")
			direct, err = unix.Open(a.path("y"), unix.O_RDONLY|unix.O_CLOEXEC, 0)
		}
		a.note("O_DIRECT", errors.Join(err, unix.Close(direct)))
	}},
	{"descriptors", func(a *acting) { // one opened before a copy-up continues to read the image's file
		a.open("x", os.O_RDONLY, func(before *os.File) {
			a.write("x", os.O_WRONLY, "changed")
			body, err := readAt(before)
			a.note("read", err, body)
			var st unix.Stat_t
			a.note("fstat", unix.Fstat(int(before.Fd()), &st), st.Size, st.Nlink)
			a.note("fchmod", before.Chmod(0o600))
			a.open("x", os.O_RDONLY, func(after *os.File) {
				body, err := readAt(after)
				a.note("read", err, body)
			})
		})
		path, err := unix.Open(a.path("y"), unix.O_PATH, 0)
		a.note("O_PATH", err)
		a.write("y", os.O_WRONLY, "changed")
		again, err := os.Open(procFD(path))
		a.note("open again", err)
		body, err := readAt(again)
		a.note("read", err, body)
		a.note("close", errors.Join(again.Close(), unix.Close(path)))
	}},
	{"mmap", func(a *acting) {
		size := len(contents)
		a.open("x", os.O_RDONLY, func(before *os.File) {
			old, err := unix.Mmap(int(before.Fd()), 0, size, unix.PROT_READ, unix.MAP_SHARED)
			a.note("map", err)
			a.change("x", size)
			a.note("old mapping", nil, string(old[:20]))
			a.note("unmap", unix.Munmap(old))
			_, err = unix.Mmap(int(before.Fd()), 0, size, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
			a.note("write through a reader", err)
		})
		a.change("h1", size)
		a.change("sub/deep/z", size)
		a.open("y", os.O_RDONLY, func(f *os.File) {
			private, err := unix.Mmap(int(f.Fd()), 0, size, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE)
			a.note("private", err)
			copy(private, "nobody else sees")
			a.note("unmap", unix.Munmap(private))
		})
	}},
	{"fallocate", func(a *acting) {
		a.open("x", os.O_RDWR, func(f *os.File) {
			a.note("extend", unix.Fallocate(int(f.Fd()), 0, 0, 40_000))
		})
		a.open("y", os.O_RDWR, func(f *os.File) {
			a.note("punch", unix.Fallocate(int(f.Fd()), unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, 0, 8192))
			a.note("fsync", f.Sync())
		})
		a.open("h1", os.O_RDONLY, func(f *os.File) {
			off, err := f.Seek(0, unix.SEEK_HOLE)
			a.note("hole", err, off)
			_, err = f.Seek(int64(len(contents)), unix.SEEK_DATA)
			a.note("data", err)
		})
	}},
	{"access", func(a *acting) {
		for _, name := range []string{"x", "owned", "sub", "dev"} {
			for _, mode := range []uint32{unix.R_OK, unix.W_OK, unix.X_OK} {
				a.note("access "+name, unix.Access(a.path(name), mode), mode)
			}
		}
		for _, name := range []string{"x", "h1", "sub/deep/z"} {
			var st unix.Stat_t
			a.note("stat "+name, unix.Stat(a.path(name), &st), st.Nlink, st.Size)
		}
		a.note("fifo", unix.Mkfifo(a.path("fifo"), 0o600))
		a.write("x/y", os.O_WRONLY, "")
		a.write("nothing", os.O_WRONLY, "")
		a.write("sub", os.O_WRONLY, "")
		a.note("rmdir of a file", unix.Rmdir(a.path("x")))
		a.note("unlink of a directory", unix.Unlink(a.path("sub")))
	}},
}

// aclOfLower changes the ACL of a file of the image. overlayfs asks the lower file system whether it
// can set ACLs, not that of its upper directory, and EROFS cannot: the result is EOPNOTSUPP until
// something else copies the file up. Only the kernel can change that. So aclOfLower copies the file up and retries.
func (a *acting) aclOfLower(name string, set func() error) {
	err := set()
	if errors.Is(err, unix.EOPNOTSUPP) {
		a.unlike = append(a.unlike, "setfacl "+name)
		var st unix.Stat_t
		err = errors.Join(unix.Stat(a.path(name), &st), unix.Chmod(a.path(name), st.Mode&0o7777))
		if err == nil {
			err = set()
		}
	}
	a.note("acl of "+name, err)
}

// change writes through a shared mapping of a file.
func (a *acting) change(name string, size int) {
	a.open(name, os.O_RDWR, func(f *os.File) {
		m, err := unix.Mmap(int(f.Fd()), 0, size, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
		a.note("map "+name, err)
		if err != nil {
			return
		}
		copy(m[5000:], "through the mapping")
		body := make([]byte, 19)
		_, err = f.ReadAt(body, 5000)
		a.note("read", err, string(body))
		a.note("sync", unix.Msync(m, unix.MS_SYNC))
		a.note("unmap", unix.Munmap(m))
	})
}

// readAt returns the beginning of a file's contents.
func readAt(f *os.File) (string, error) {
	body := make([]byte, 20)
	n, err := f.ReadAt(body, 0)
	return string(body[:n]), err
}

func procFD(fd int) string { return filepath.Join("/proc/self/fd", strconv.Itoa(fd)) }
