package main

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/daxfs/daxfs-snapshotter/config"
	"github.com/daxfs/daxfs-snapshotter/daemon/api"
	"github.com/daxfs/daxfs-snapshotter/internal/overlay"
	"github.com/daxfs/daxfs-snapshotter/mount"
	"github.com/daxfs/daxfs-snapshotter/mount/drivers"
	"github.com/daxfs/daxfs-snapshotter/pool/region"
	"github.com/daxfs/daxfs-snapshotter/store"
)

type daemonReport struct {
	Config string    `json:"config"`
	Checks []support `json:"checks"`
}

// checkDaemon checks the daemon: its configuration, whether it runs, its user and its mount namespace.
// listener is the process that listens on containerd's socket, or 0.
func checkDaemon(ctx context.Context, files containerdFiles, listener int) *daemonReport {
	r := &daemonReport{Config: files.daemonConfig}
	add := func(name string, ok bool, format string, args ...any) bool {
		r.Checks = append(r.Checks, need(name, ok, fmt.Sprintf(format, args...)))
		return ok
	}
	c, err := loadDaemonConfig(files.daemonConfig)
	if !add("configuration "+files.daemonConfig, err == nil, "%v; correct it and restart daxfs-snapshotter", err) {
		return r
	}
	if listener != 0 {
		add("containerd.address", sameFile(c.Containerd.Address, files.socket),
			"%s says %q, and containerd answers at %q: layers cannot be read from it; "+
				"correct it and restart daxfs-snapshotter",
			files.daemonConfig, c.Containerd.Address, files.socket)
	}
	checkOverlayOptions(c, add)
	pid, uid, err := socketOwner(c.Address)
	checkLeases(c, add)
	if !add("daxfs-snapshotter runs", err == nil, "%v; start it: systemctl start daxfs-snapshotter", err) {
		checkPool(ctx, c, add)
		checkIdentity(c, add)
		checkSharedFiles(c, add)
		return r
	}
	err = askDaemon(ctx, c.Address)
	add("daxfs-snapshotter answers", err == nil, "%v; its log says why", err)
	add("daxfs-snapshotter is root", uid == 0, "process %d runs as user %d and cannot mount; run it as root", pid, uid)
	if listener != 0 && pid != 0 {
		ours, theirs, err := mountNamespaces(pid, listener)
		add("one mount namespace", err != nil || ours == theirs,
			"daxfs-snapshotter (process %d) is in %s and containerd (process %d) in %s: containers would get an empty "+
				"root, so they are refused; take away what separates them, such as PrivateMounts= of a unit",
			pid, ours, listener, theirs)
	}
	checkIdentity(c, add)
	status, err := dialControl(api.Socket(c.Address)).status(ctx)
	if err != nil {
		checkPool(ctx, c, add)
		checkSharedFiles(c, add)
		return r
	}
	picked := false
	var why []string
	for _, d := range status.Drivers {
		picked = picked || d.Picked
		why = append(why, d.Driver+": "+d.Why)
	}
	add("driver for the daemon's pool", picked, "mount.driver = %q, pool %s %q: %s", c.Mount.Driver, status.Pool.Kind,
		status.Pool.Path, strings.Join(why, "; "))
	checkWriters(status.Pool.Path, status.PID, add)
	add("daemon is healthy", status.Health == "", "%s", status.Health)
	if status.Readers.Mode == store.ReadersLeases {
		add("lease regions can be read", status.Readers.Error == "",
			"%s; until then nothing is freed that a reader may use",
			status.Readers.Error)
	}
	for _, p := range status.Shared {
		if p.Error == "" && p.Lost != "" {
			add("shared pool "+p.Name, false, "%s", p.Lost)
		} else {
			add("shared pool "+p.Name, p.Error == "", "%s; its images cannot be used, %d are claimed",
				p.Error, p.Claimed)
		}
		if p.Lease == "" { // fine if the owner keeps all images
			const note = "none: its owner has to say readers = \"keep\""
			r.Checks = append(r.Checks, support{"lease for shared pool " + p.Name, true, note})
		}
	}
	return r
}

func loadDaemonConfig(file string) (*config.Config, error) {
	c, err := config.Load(file)
	if errors.Is(err, fs.ErrNotExist) {
		return config.Default(), nil
	}
	return c, err
}

// checkPool tries the configured driver on the configured pool while the daemon does not run.
func checkPool(ctx context.Context, c *config.Config, add adder) {
	list, err := mount.Select(drivers.All(), c.Mount.Driver)
	if !add("mount.driver", err == nil, "%v", err) {
		return
	}
	path := store.Pool{Kind: c.Pool.Kind, Path: c.Pool.Path}.File(c.Root)
	info := region.Info{
		Kind: c.Pool.Kind, Path: path, Phys: c.Pool.Phys,
		HasPhys: c.Pool.Kind == region.KindPhys, FD: -1,
	}
	if path != "" {
		if info, err = describe("/", path); errors.Is(err, fs.ErrNotExist) {
			// A pool that does not exist yet will have the kind of its directory.
			info, err = fileRegion(existing(filepath.Dir(path)))
		}
	}
	if err == nil && path != "" && info.Kind != c.Pool.Kind {
		err = fmt.Errorf("%q is of kind %q; set pool.kind or pool.path", path, info.Kind)
	}
	if !add("pool of the daemon", err == nil, "pool.kind = %q, pool.path = %q: %v", c.Pool.Kind, c.Pool.Path, err) {
		return
	}
	picked := false
	var why []string
	for _, d := range explainWith(ctx, list, info) {
		picked = picked || d.Picked
		why = append(why, d.Driver+": "+d.Why)
	}
	add("driver for the daemon's pool", picked, "mount.driver = %q, pool %s %q: %s", c.Mount.Driver, c.Pool.Kind, path,
		strings.Join(why, "; "))
}

// checkOverlayOptions tries the configured options in the kernel. Only root can do that.
func checkOverlayOptions(c *config.Config, add adder) {
	if len(c.Mount.OverlayOptions) == 0 || os.Geteuid() != 0 {
		return
	}
	dir, err := os.MkdirTemp("", "daxfs-doctor-")
	if err != nil {
		return
	}
	defer os.RemoveAll(dir)
	for _, name := range []string{"lower", "upper", "work"} {
		if os.Mkdir(filepath.Join(dir, name), 0o700) != nil {
			return
		}
	}
	places := []string{"lowerdir=" + dir + "/lower", "upperdir=" + dir + "/upper", "workdir=" + dir + "/work"}
	if overlay.Try(places) != nil {
		return // the options are not the cause
	}
	err = overlay.Try(append(places, c.Mount.OverlayOptions...))
	add("mount.overlay_options", err == nil, "the kernel refuses %q: %v; correct them in the daemon's configuration",
		c.Mount.OverlayOptions, err)
}

// sameFile reports whether two paths lead to the same file, for instance the same socket.
func sameFile(a, b string) bool {
	sa, err := os.Stat(a)
	if err != nil {
		return false
	}
	sb, err := os.Stat(b)
	return err == nil && os.SameFile(sa, sb)
}

// socketOwner returns the process and the user that listen on a unix socket; 0 for an invisible process.
func socketOwner(path string) (pid, uid int, err error) {
	conn, err := net.DialTimeout("unix", path, time.Second)
	if err != nil {
		return 0, 0, err
	}
	defer conn.Close()
	raw, err := conn.(*net.UnixConn).SyscallConn()
	if err != nil {
		return 0, 0, err
	}
	var cred *unix.Ucred
	cerr := raw.Control(func(fd uintptr) {
		cred,
			err = unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED)
	})
	if err = errors.Join(cerr, err); err != nil {
		return 0, 0, err
	}
	return int(cred.Pid), int(cred.Uid), nil
}

func mountNamespaces(a, b int) (ofA, ofB string, err error) {
	ofA, erra := os.Readlink(fmt.Sprintf("/proc/%d/ns/mnt", a))
	ofB, errb := os.Readlink(fmt.Sprintf("/proc/%d/ns/mnt", b))
	return ofA, ofB, errors.Join(erra, errb)
}
