package fusefs

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log"
	"os"
	"os/signal"
	"strconv"
	"syscall"

	"github.com/hanwen/go-fuse/v2/fuse"
	"golang.org/x/sys/unix"

	"github.com/daxfs/daxfs-snapshotter/daxfs"
	"github.com/daxfs/daxfs-snapshotter/mount"
	"github.com/daxfs/daxfs-snapshotter/mount/internal/sys"
)

// Config says what a server serves and where.
type Config struct {
	// Path is the file or device that holds the pool or image; Off and Size are the range in it. Name, if
	// not empty, replaces Path in the mount table.
	Path      string
	Name      string
	Off, Size int64
	// Dir is the mount point.
	Dir string
	// Restrict mounts with nosuid and nodev.
	Restrict bool
	// Log receives reports of damage and other surprises; nil means standard error.
	Log io.Writer
}

// source is the device in the mount table; Match recognises it.
func (c Config) source() string {
	name := c.Name
	if name == "" {
		name = c.Path
	}
	return name + "@" + strconv.FormatInt(c.Off, 10) + "+" + strconv.FormatInt(c.Size, 10)
}

// Server is a mounted file system that this process serves.
type Server struct {
	fs    *server
	fuse  *fuse.Server
	image *sys.Mapping
	dir   string
	done  chan struct{}
}

// Start maps the pool or image, mounts it and serves it until somebody unmounts it. Start does not
// check it, but the reader trusts nothing. It recognises a pool by its superblock.
func Start(c Config) (*Server, error) {
	if c.Log == nil {
		c.Log = os.Stderr
	}
	l := log.New(c.Log, "daxfs fuse: ", log.LstdFlags)
	// Mounting on a missing directory fails like opening a missing /dev/fuse, which has another remedy. On a
	// file it works, but nobody can use the result.
	switch st, err := os.Stat(c.Dir); {
	case errors.Is(err, fs.ErrNotExist):
		return nil, fmt.Errorf("mount point: %w", err)
	case err == nil && !st.IsDir():
		return nil, fmt.Errorf("mount point %q: %w", c.Dir, unix.ENOTDIR)
	}
	m, err := sys.MapWindow(c.Path, c.Off, c.Size)
	if err != nil {
		return nil, err
	}
	img, err := daxfs.OpenBytes(m.Window)
	if err != nil {
		return nil, errors.Join(fmt.Errorf("image in %q at %d: %w", c.Path, c.Off, err), m.Close())
	}
	s := &Server{fs: newServer(img, l), image: m, dir: c.Dir, done: make(chan struct{})}
	if _, err := daxfs.OpenLive(daxfs.Mem(m.Window), int64(len(m.Window))); err == nil {
		s.fs.live = true
	}
	s.fuse, err = fuse.NewServer(s.fs, c.Dir, s.fs.options(c))
	if err != nil {
		return nil, errors.Join(fmt.Errorf("mount on %q: %w", c.Dir, explain(err)), m.Close())
	}
	if !s.fs.live { // images with attributes may come later
		go s.fs.lookForXattrs()
	}
	go func() {
		defer close(s.done)
		s.fuse.Serve()
	}()
	if err := setReadahead(c.Dir); err != nil {
		l.Printf("read-ahead stays at the kernel's default: %v", err)
	}
	return s, nil
}

func (s *server) options(c Config) *fuse.MountOptions {
	o := &fuse.MountOptions{
		FsName: c.source(), Name: "daxfs", Logger: s.log,
		MaxWrite: 1 << 20, MaxReadAhead: 1 << 20, MaxBackground: 64,
		EnableSymlinkCaching: true, ExplicitDataCacheControl: true, EnableAcl: true, IDMappedMount: true,
		// Replies come from the mapping. Splicing from the file through a pipe was slower: 128 MiB from a cold
		// cache took 1.2 to 1.9 times as long, 4 KiB reads 1.3 to 2.8 times.
		DisableSplice: true,
		// No CAP_EXPORT_SUPPORT: with it, an overlay looks up the origin of a changed file by a handle. Since
		// Linux 6.16 the kernel then calls the result stale at once, and the changed file becomes unreachable.
		// Without it a handle still opens inodes in memory, enough for Table.Unused; overlays do without the
		// origin.
		ExtraCapabilities: fuse.CAP_NO_OPENDIR_SUPPORT,
		Options:           []string{"default_permissions"},
		PanicHandler:      s.panicked,
	}
	if os.Geteuid() == 0 {
		o.DirectMountStrict, o.AllowOther = true, true
		o.DirectMountFlags = unix.MS_RDONLY
		if c.Restrict {
			o.DirectMountFlags |= unix.MS_NOSUID | unix.MS_NODEV
		}
		return o
	}
	// fusermount3 adds nosuid and nodev, and allow_other only with user_allow_other in /etc/fuse.conf.
	o.Options = append(o.Options, "ro")
	return o
}

// explain adds remedies to the errors of mounting.
func explain(err error) error {
	switch {
	case errors.Is(err, unix.ENOENT), errors.Is(err, unix.ENODEV), errors.Is(err, unix.ENXIO):
		return fmt.Errorf("%w: is /dev/fuse there? load the fuse module (modprobe fuse), "+
			"or give /dev/fuse to this container: %w", err, mount.ErrUnsupported)
	case errors.Is(err, unix.EPERM), errors.Is(err, unix.EACCES):
		return fmt.Errorf("%w: run as root, or install fuse3 (fusermount3) for other users: %w", err,
			mount.ErrUnsupported)
	}
	return err
}

// setReadahead sets the read-ahead of the device behind dir to 1 MiB. With the kernel's default of
// 128 KiB, eight trips to user space make up each read from a cold cache. FUSE limits a server's request
// to that default; only sysfs can raise it.
func setReadahead(dir string) error {
	dir, err := sys.Real(dir)
	if err != nil {
		return err
	}
	m, _, err := sys.Top(dir)
	if err != nil {
		return err
	}
	if m == nil {
		return fmt.Errorf("%q is not in the mount table", dir)
	}
	return os.WriteFile(fmt.Sprintf("/sys/class/bdi/%d:%d/read_ahead_kb", m.Major, m.Minor),
		[]byte("1024"), 0)
}

// Counters returns the counters of the server.
func (s *Server) Counters() *Counters { return &s.fs.count }

// Done is closed once the file system is unmounted and nothing uses it.
func (s *Server) Done() <-chan struct{} { return s.done }

// Unmount unmounts the file system, which ends the server, or fails with mount.ErrBusy.
func (s *Server) Unmount(ctx context.Context) error { return sys.Unmount(ctx, s.dir) }

// Run starts a server and returns when it has ended. It implements `daxfs mount --driver fuse
// --foreground`. It calls ready with nil once the file system is mounted, or with the error that it
// also returns.
//
// SIGINT and SIGTERM unmount the file system. While it is in use the server ignores them, because its
// users would lose their files. SIGUSR1 writes the counters to the log.
func Run(ctx context.Context, c Config, ready func(error)) error {
	sig := make(chan os.Signal, 4)
	signal.Notify(sig, syscall.SIGINT, syscall.SIGTERM, syscall.SIGUSR1, syscall.SIGHUP)
	defer signal.Stop(sig)
	// The out-of-memory killer must not pick the server first: many containers would lose their root, for
	// a few MiB. This needs privilege; without it the server is as likely a victim as any process.
	_ = os.WriteFile("/proc/self/oom_score_adj", []byte("-999"), 0)
	s, err := Start(c)
	ready(err)
	if err != nil {
		return err
	}
	stop := ctx.Done()
	for {
		select {
		case <-s.Done():
			return nil
		case <-stop:
			stop = nil // a closed channel would be chosen again and again
			if err := s.Unmount(context.WithoutCancel(ctx)); err != nil {
				s.fs.log.Printf("still serving %q: %v", c.Dir, err)
			}
		case got := <-sig:
			switch got {
			case syscall.SIGUSR1:
				s.fs.log.Print(s.Counters())
			case syscall.SIGINT, syscall.SIGTERM:
				if err := s.Unmount(ctx); err != nil {
					s.fs.log.Printf("%v: still serving %q: %v", got, c.Dir, err)
				}
			}
		}
	}
}
