package fusefs

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/daxfs/daxfs-snapshotter/mount"
	"github.com/daxfs/daxfs-snapshotter/mount/internal/sys"
	"github.com/daxfs/daxfs-snapshotter/pool/region"
)

// fsType is the type of these mounts in the mount table.
const fsType = "fuse.daxfs"

// startTimeout limits how long a server may take to mount its file system.
const startTimeout = 30 * time.Second

// Driver mounts by starting a server process. The zero value is ready to use.
type Driver struct {
	// Command is the start of the server's command line. Mount appends
	//
	//	--offset N --size N --name NAME --ready-fd 3 [--suid] FILE DIR
	//
	// If Command is empty it is "daxfs mount --driver fuse --foreground". The daxfs program is this
	// program if it has that name, else the one beside it, else the one in PATH.
	Command []string
	// Env is added to the environment of the server.
	Env []string
}

var _ mount.Driver = Driver{}

// Name returns "fuse".
func (Driver) Name() string { return "fuse" }

// Sharing implements mount.Driver.
func (Driver) Sharing() string {
	return "one page-cache copy of each distinct file on this host, shared by all containers, " +
		"beside the pool's own pages; one server process; full fidelity"
}

// Windows implements mount.Driver.
func (Driver) Windows() bool { return false }

func (d Driver) command() ([]string, error) {
	if len(d.Command) > 0 {
		return d.Command, nil
	}
	args := []string{"mount", "--driver", "fuse", "--foreground"}
	self, err := os.Executable()
	if err == nil {
		if filepath.Base(self) == "daxfs" {
			return append([]string{self}, args...), nil
		}
		beside := filepath.Join(filepath.Dir(self), "daxfs")
		if st, err := os.Stat(beside); err == nil && st.Mode().IsRegular() && st.Mode()&0o111 != 0 {
			return append([]string{beside}, args...), nil
		}
	}
	found, err := exec.LookPath("daxfs")
	if err != nil {
		return nil,
			fmt.Errorf("the FUSE server is the program daxfs: %w: install it beside this program or in PATH: %w", err,
				mount.ErrUnsupported)
	}
	return append([]string{found}, args...), nil
}

// file returns the path for the server to open or, for a dma-buf, a descriptor to inherit (else -1).
func file(r region.Info) (path string, fd int, err error) {
	switch {
	case r.Kind == region.KindDMABuf:
		if r.FD < 0 {
			return "", -1, fmt.Errorf("the dma-buf of %q is not open in this process: %w", r.Path, mount.ErrUnsupported)
		}
		return "/dev/fd/4", r.FD, nil
	case r.Kind == region.KindPhys:
		return "", -1,
			fmt.Errorf("a physical range is served by the daxfs driver; FUSE maps files and devices: %w",
				mount.ErrUnsupported)
	case r.Path != "":
		return r.Path, -1, nil
	case r.BlockDevice != "":
		return r.BlockDevice, -1, nil
	}
	return "", -1, fmt.Errorf("region of kind %q has no path: %w", r.Kind, mount.ErrUnsupported)
}

// Probe implements mount.Driver.
func (d Driver) Probe(_ context.Context, r region.Info) error {
	if _, _, err := file(r); err != nil {
		return err
	}
	f, err := os.OpenFile("/dev/fuse", os.O_RDWR|unix.O_CLOEXEC, 0)
	if err != nil {
		return explain(err)
	}
	f.Close()
	if os.Geteuid() != 0 {
		if _, err := exec.LookPath("fusermount3"); err != nil {
			return fmt.Errorf("%w: run as root, or install fuse3: %w", err, mount.ErrUnsupported)
		}
	}
	_, err = d.command()
	return err
}

func config(src mount.Source, dir string) (Config, int, error) {
	path, fd, err := file(src.Region)
	name := path
	if fd >= 0 {
		name = src.Region.Path
	}
	return Config{Path: path, Name: name, Off: src.Off, Size: src.Size, Dir: dir, Restrict: src.Restrict}, fd, err
}

// Mount implements mount.Driver. It starts the server and returns when the file system is mounted.
func (d Driver) Mount(ctx context.Context, src mount.Source, dir string) error {
	c, fd, err := config(src, dir)
	if err != nil {
		return err
	}
	if m, _, err := sys.Top(dir); err != nil {
		return err
	} else if m != nil {
		return fmt.Errorf("mount %s: %q is a mount point already", src, dir)
	}
	argv, err := d.command()
	if err != nil {
		return err
	}
	argv = append(argv[:len(argv):len(argv)], "--offset", strconv.FormatInt(c.Off, 10), "--size",
		strconv.FormatInt(c.Size, 10),
		"--name", c.Name, "--ready-fd", "3")
	if !c.Restrict {
		argv = append(argv, "--suid")
	}
	argv = append(argv, c.Path, dir)
	r, w, err := os.Pipe()
	if err != nil {
		return err
	}
	defer r.Close()
	defer w.Close()
	out, err := logFile(dir)
	if err != nil {
		return err
	}
	defer out.Close()
	cmd := exec.Command(argv[0], argv[1:]...) // not CommandContext: the server outlives the call
	cmd.Env = append(os.Environ(), d.Env...)
	cmd.Dir = "/"
	cmd.Stdout, cmd.Stderr = out, out
	cmd.ExtraFiles = []*os.File{w}
	if fd >= 0 {
		dup, err := unix.FcntlInt(uintptr(fd), unix.F_DUPFD_CLOEXEC, 0)
		if err != nil {
			return fmt.Errorf("dma-buf: %w", err)
		}
		buf := os.NewFile(uintptr(dup), "dma-buf")
		defer buf.Close()
		cmd.ExtraFiles = append(cmd.ExtraFiles, buf)
	}
	lock, err := lockFile(dir)
	if err != nil {
		return err
	}
	if lock != nil {
		defer lock.Close()
		cmd.ExtraFiles = append(cmd.ExtraFiles, lock) // the last one: the server does not know about it
	}
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	if err := cmd.Start(); err != nil {
		return fmt.Errorf("start the FUSE server: %w", err)
	}
	w.Close()
	go cmd.Wait() // reaps it whenever it ends
	if err := d.await(ctx, r, dir); err != nil {
		cmd.Process.Kill() // no effect if it has ended; its mount, if any, is dead then
		return errors.Join(fmt.Errorf("FUSE server: %w", err), sys.Detach(dir))
	}
	return nil
}

// Ready writes to the pipe that Mount waits on: "ok" or the error. It closes the pipe.
func Ready(pipe io.WriteCloser, err error) {
	msg := "ok"
	if errors.Is(err, mount.ErrUnsupported) {
		msg = "unsupported: " + strings.TrimSuffix(err.Error(), ": "+mount.ErrUnsupported.Error())
	} else if err != nil {
		msg = "error: " + err.Error()
	}
	fmt.Fprintln(pipe, strings.ReplaceAll(msg, "\n", "; "))
	pipe.Close()
}

// await waits until the server is ready, or returns its error.
func (d Driver) await(ctx context.Context, r *os.File, dir string) error {
	ctx, cancel := context.WithTimeout(ctx, startTimeout)
	defer cancel()
	stop := context.AfterFunc(ctx, func() { r.SetReadDeadline(time.Now()) })
	defer stop()
	line, err := bufio.NewReader(r).ReadString('\n')
	switch line = strings.TrimSpace(line); {
	case line == "ok":
		return nil
	case strings.HasPrefix(line, "unsupported: "):
		return fmt.Errorf("%s: %w", strings.TrimPrefix(line, "unsupported: "), mount.ErrUnsupported)
	case strings.HasPrefix(line, "error: "):
		return errors.New(strings.TrimPrefix(line, "error: "))
	case ctx.Err() != nil:
		return fmt.Errorf("not ready: %w", ctx.Err())
	case errors.Is(err, io.EOF):
		return fmt.Errorf("it ended before %q was mounted; its output is in %q", dir, logName(dir))
	}
	return fmt.Errorf("unexpected words %q: %w", line, err)
}

// tableDir returns the directory around the mount point of a table, or "". The directory around a mount
// point that a user chose is not ours to write to.
func tableDir(dir string) string {
	parent := filepath.Dir(dir)
	if filepath.Base(dir) != "mnt" {
		return ""
	}
	for _, record := range []string{"pool.json", "image.json"} {
		if _, err := os.Stat(filepath.Join(parent, record)); err == nil {
			return parent
		}
	}
	return ""
}

// lockFile takes mount.ServerLock, which the server inherits and holds as long as it lives. It returns
// nil if there is no place for the file.
func lockFile(dir string) (*os.File, error) {
	parent := tableDir(dir)
	if parent == "" {
		return nil, nil
	}
	const flags = os.O_RDWR | os.O_CREATE | unix.O_NOFOLLOW | unix.O_CLOEXEC
	f, err := os.OpenFile(filepath.Join(parent, mount.ServerLock), flags, 0o600)
	if err != nil {
		return nil, err
	}
	if err := unix.Flock(int(f.Fd()), unix.LOCK_SH|unix.LOCK_NB); err != nil {
		return nil, errors.Join(fmt.Errorf("lock %q: %w", f.Name(), err), f.Close())
	}
	return f, nil
}

// logName is the file for the server's output.
func logName(dir string) string {
	if parent := tableDir(dir); parent != "" {
		return filepath.Join(parent, "fuse.log")
	}
	return os.DevNull
}

func logFile(dir string) (*os.File, error) {
	return os.OpenFile(logName(dir), os.O_WRONLY|os.O_CREATE|os.O_APPEND|unix.O_CLOEXEC, 0o600)
}

// Match implements mount.Driver.
func (Driver) Match(ctx context.Context, src mount.Source, dir string) error {
	m, err := sys.MatchTop(dir, fsType, src.Restrict)
	if err != nil {
		return err
	}
	c, _, err := config(src, dir)
	if err != nil {
		return err
	}
	if m.Source != c.source() {
		return fmt.Errorf("%q is mounted from %q, expected %q", dir, m.Source, c.source())
	}
	if err := sys.Alive(ctx, dir); err != nil {
		if errors.Is(err, unix.ENOTCONN) {
			return fmt.Errorf("%w: the FUSE server is dead, its output is in %q", err, logName(dir))
		}
		return err
	}
	return nil
}

// Unmount implements mount.Driver. The server ends by itself once nothing uses the file system.
func (Driver) Unmount(ctx context.Context, dir string) error {
	m, _, err := sys.Top(dir)
	if err != nil || m == nil {
		return err
	}
	return sys.Unmount(ctx, dir)
}
