package packages

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/moby/sys/mountinfo"
	"golang.org/x/sys/unix"

	"github.com/daxfs/daxfs-snapshotter/integration/stack"
)

// root is the root directory of a clean Debian system.
type root struct {
	*testing.T
	dir string
	pid int // of PID 1 of the running system
}

// marker is a file that distinguishes a clean system from this machine.
const marker = "etc/daxfs-clean-system"

// newRoot unpacks a clean system of a suite. It is removed when the test ends.
func newRoot(t *testing.T, suite string) *root {
	t.Helper()
	cache, err := stack.CacheDir()
	if err != nil {
		t.Fatal(err)
	}
	if err := os.MkdirAll(filepath.Join(cache, "run"), 0o755); err != nil {
		t.Fatal(err)
	}
	dir, err := os.MkdirTemp(filepath.Join(cache, "run"), "root-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := os.RemoveAll(dir); err != nil {
			t.Error(err)
		}
	})
	if err := os.Chmod(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	r := &root{T: t, dir: dir}
	if err := os.MkdirAll(filepath.Join(dir, filepath.Dir(marker)), 0o755); err != nil {
		t.Fatal(err)
	}
	r.host("touch", filepath.Join(dir, marker))
	r.host("tar", "--extract", "--file", rootFile(cache, suite), "--directory", dir, "--numeric-owner", "--xattrs",
		"--xattrs-include=*")
	return r
}

// host runs a program outside the system.
func (r *root) host(name string, args ...string) string {
	r.Helper()
	out, err := exec.Command(name, args...).CombinedOutput()
	if err != nil {
		r.Fatalf("%s %s: %v\n%s", name, strings.Join(args, " "), err, out)
	}
	return string(out)
}

// try runs a script in the system, by bash -e, and returns its output. Before start nothing is mounted.
func (r *root) try(script string) (string, error) {
	argv := []string{"chroot", r.dir}
	if r.pid != 0 {
		argv = []string{
			"nsenter", "--target", fmt.Sprint(r.pid), "--mount", "--pid", "--ipc", "--uts", "--cgroup",
			"--root", "--wd",
		}
	}
	// While the system starts, its PID 1 is in this machine's root.
	script = "test -e /" + marker + " || { echo the system has not started; exit 99; }\n" + script
	cmd := exec.Command(argv[0],
		append(argv[1:], "/usr/bin/env", "-i", "HOME=/root", "LANG=C.UTF-8", "DEBIAN_FRONTEND=noninteractive",
			"PATH=/usr/local/go/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "/bin/bash", "-e",
			"-c", script)...)
	var out strings.Builder
	cmd.Stdout, cmd.Stderr = &out, &out
	// Do not wait for background programs of the script.
	cmd.WaitDelay = time.Second
	err := cmd.Run()
	return out.String(), err
}

// sh runs a script in the system that has to succeed.
func (r *root) sh(script string) string {
	r.Helper()
	out, err := r.try(script)
	if err != nil {
		r.Fatalf("%s\nfails: %v\n%s", script, err, out)
	}
	return out
}

// enter makes the usual mounts and changes the root to the directory. What follows is PID 1.
const enter = `
mount --make-rprivate /
mount --rbind "$0" "$0"
cd "$0"
mount -t proc proc proc
mount -t sysfs sysfs sys
mount -t cgroup2 cgroup2 sys/fs/cgroup
mount -t tmpfs -o mode=0755 dev dev
for node in null zero full random urandom tty fuse loop-control kmsg loop0 loop1 loop2 loop3; do
	[ -e /dev/$node ] || continue
	touch dev/$node
	mount --bind /dev/$node dev/$node
done
mkdir dev/pts dev/shm
mount -t devpts -o newinstance,ptmxmode=0666 devpts dev/pts
mount -t tmpfs -o mode=1777 shm dev/shm
ln -s pts/ptmx dev/ptmx
ln -s /proc/self/fd dev/fd
mount -t tmpfs -o mode=0755 run run
mount -t tmpfs -o mode=1777 tmp tmp
pivot_root . mnt
umount -l /mnt
mount --make-rshared /
exec env -i container=other PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin "$@"
`

// start starts the system: with systemd, or with a PID 1 that only waits for its children. It ends with the test.
func (r *root) start(systemd bool) {
	r.Helper()
	init := []string{"/bin/bash", "-c", "trap : CHLD; while :; do sleep 1000 & wait $!; done"}
	if systemd {
		init = []string{
			"/lib/systemd/systemd", "--unit=multi-user.target", "--show-status=no", "--log-target=console",
			"--log-level=warning",
		}
	}
	group := r.cgroup()
	f, err := os.Open(group)
	if err != nil {
		r.Fatal(err)
	}
	defer f.Close()
	log, err := os.Create(filepath.Join(r.TempDir(), "console"))
	if err != nil {
		r.Fatal(err)
	}
	defer log.Close()
	cmd := exec.Command("unshare", append([]string{"--cgroup", "bash", "-euc", enter, r.dir}, init...)...)
	cmd.Stdout, cmd.Stderr = log, log
	cmd.SysProcAttr = &syscall.SysProcAttr{
		Cloneflags:  unix.CLONE_NEWNS | unix.CLONE_NEWPID | unix.CLONE_NEWIPC | unix.CLONE_NEWUTS,
		UseCgroupFD: true, CgroupFD: int(f.Fd()), Setsid: true,
	}
	if err := cmd.Start(); err != nil {
		r.Fatal(err)
	}
	r.pid = cmd.Process.Pid
	ended := make(chan struct{})
	go func() { defer close(ended); _ = cmd.Wait() }() // it is killed
	r.Cleanup(func() {
		if r.Failed() {
			text, _ := os.ReadFile(log.Name())
			r.Logf("the console of the system:\n%s", text)
			out, _ := r.try("journalctl --no-pager -n 100 -u daxfs-snapshotter -u containerd 2>/dev/null; " +
				"tail -n 30 /var/log/containerd.log /var/log/daxfs-snapshotter.log 2>/dev/null")
			r.Log(out)
		}
		_ = cmd.Process.Kill()
		<-ended
		r.pid = 0
		removeCgroup(group)
	})
	ready := "true"
	if systemd {
		ready = "systemctl is-system-running | grep -E 'running|degraded'"
	}
	for deadline := time.Now().Add(2 * time.Minute); ; time.Sleep(100 * time.Millisecond) {
		select {
		case <-ended:
			text, _ := os.ReadFile(log.Name())
			r.Fatalf("the system ended: %v\n%s", cmd.ProcessState, text)
		default:
		}
		out, err := r.try(ready)
		if err == nil {
			return
		}
		if time.Now().After(deadline) {
			text, _ := os.ReadFile(log.Name())
			r.Fatalf("the system is not ready: %v\n%s\n%s", err, out, text)
		}
	}
}

// cgroup makes a control group of version 2 for the system, as the root of its view.
func (r *root) cgroup() string {
	r.Helper()
	mounts, err := mountinfo.GetMounts(mountinfo.FSTypeFilter("cgroup2"))
	if err != nil || len(mounts) == 0 {
		r.Fatalf("no cgroup2 is mounted, and systemd needs one: %v", err)
	}
	dir, err := os.MkdirTemp(mounts[0].Mountpoint, "daxfs-root-")
	if err != nil {
		r.Fatal(err)
	}
	return dir
}

// noController stands in for runc where the machine's controllers are in control groups of version 1,
// while systemd needs version 2: containers run without the CPU shares that clients request.
const noController = `#!/bin/sh
for a; do
	[ "$before" != --bundle ] || sed -i -e 's/,"cpu":{[^}]*}//' -e 's/"cpu":{[^}]*},\{0,1\}//' "$a/config.json"
	before=$a
done
exec /usr/sbin/runc "$@"
`

// giveRunc makes runc work in the system's control groups.
func (r *root) giveRunc() {
	r.Helper()
	if !strings.Contains(r.sh("cat /sys/fs/cgroup/cgroup.controllers"), "cpu") {
		r.Log("THIS MACHINE HAS NO CPU CONTROLLER IN CGROUP2: runc is told nothing of shares of the processor")
		r.sh("cat >/usr/local/sbin/runc <<'END'\n" + noController + "END\nchmod 0755 /usr/local/sbin/runc")
	}
}

// removeCgroup removes a control group and those below it, whose processes have ended.
func removeCgroup(dir string) {
	var dirs []string
	_ = filepath.WalkDir(dir, func(path string, d os.DirEntry, err error) error {
		if err == nil && d.IsDir() {
			dirs = append(dirs, path)
		}
		return nil
	})
	for range 100 {
		for i := len(dirs) - 1; i >= 0; i-- {
			_ = unix.Rmdir(dirs[i])
		}
		if _, err := os.Stat(dir); err != nil {
			return
		}
		time.Sleep(20 * time.Millisecond)
	}
}

// give copies a file into the system.
func (r *root) give(from, to string) {
	r.Helper()
	r.host("install", "-D", "-m", "0755", from, filepath.Join(r.dir, to))
}

// Scripts that start daemons and wait until they answer.
const (
	startDaemon = `mkdir -p /run/daxfs-snapshotter
		setsid daxfs-snapshotter >>/var/log/daxfs-snapshotter.log 2>&1 </dev/null &
		echo $! >/run/daxfs-snapshotter.pid
		for i in $(seq 600); do daxfs status >/dev/null 2>&1 && break; sleep 0.1; done; daxfs status >/dev/null
		`
	startContainerd = `setsid containerd >>/var/log/containerd.log 2>&1 </dev/null &
		echo $! >/run/containerd.pid
		for i in $(seq 600); do ctr snapshot --snapshotter daxfs ls >/dev/null 2>&1 && break; sleep 0.1; done
		ctr snapshot --snapshotter daxfs ls >/dev/null
		`
)
