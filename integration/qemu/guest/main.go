//go:build linux

// Command guest is /init of the virtual machines that tests start: it loads the modules, does its task with the
// memory that the host shares, writes the answer into the directory shared with the host, and turns the machine off.
package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/daxfs/daxfs-snapshotter/integration/qemu/task"
)

const host = "/host/"

func main() {
	if os.Getpid() != 1 {
		fmt.Fprintln(os.Stderr, "guest: is /init of a test's virtual machine and nothing else")
		os.Exit(2)
	}
	var answer task.Answer
	if err := start(); err != nil {
		fmt.Println("guest:", err) // there is no other way to tell
	} else {
		if err := work(&answer); err != nil {
			answer.Error = err.Error()
		}
		b, err := json.Marshal(answer)
		if err == nil {
			err = os.WriteFile(host+task.AnswerFile, b, 0o644)
		}
		if err != nil {
			fmt.Println("guest: write the answer:", err)
		}
	}
	unix.Sync()
	if err := unix.Reboot(unix.LINUX_REBOOT_CMD_POWER_OFF); err != nil {
		fmt.Println("guest: power off:", err)
	}
}

// start mounts what programs expect, loads the modules and joins the host's directory.
func start() error {
	os.Setenv("PATH", "/bin:/sbin:/usr/bin:/usr/sbin")
	for _, m := range []struct{ kind, dir string }{
		{"proc", "/proc"}, {"sysfs", "/sys"}, {"devtmpfs", "/dev"}, {"tmpfs", "/tmp"}, {"tmpfs", "/run"},
	} {
		if err := unix.Mount(m.kind, m.dir, m.kind, 0, ""); err != nil && !errors.Is(err, unix.EBUSY) {
			return fmt.Errorf("mount %s: %w", m.dir, err)
		}
	}
	order, err := os.ReadFile("/modules/order")
	if err != nil {
		return err
	}
	for _, path := range strings.Fields(string(order)) {
		if err := load(path, ""); err != nil {
			return err
		}
	}
	if err := unix.Mount("host", host, "9p", 0, "trans=virtio,version=9p2000.L,cache=none,msize=262144"); err != nil {
		return fmt.Errorf("mount the host's directory: %w", err)
	}
	return nil
}

// load loads a kernel module, compressed or not.
func load(path, params string) error {
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	defer f.Close()
	const compressedFile = 4 // MODULE_INIT_COMPRESSED_FILE
	flags := 0
	if !strings.HasSuffix(path, ".ko") {
		flags = compressedFile
	}
	if err := unix.FinitModule(int(f.Fd()), params, flags); err != nil && !errors.Is(err, unix.EEXIST) {
		return fmt.Errorf("load %s: %w", path, err)
	}
	return nil
}

func work(answer *task.Answer) error {
	var t task.Task
	b, err := os.ReadFile("/task.json")
	if err != nil {
		return err
	}
	if err := json.Unmarshal(b, &t); err != nil {
		return err
	}
	release, err := os.ReadFile("/proc/sys/kernel/osrelease")
	if err != nil {
		return err
	}
	answer.Kernel = strings.TrimSpace(string(release))
	do, ok := tasks[t.Name]
	if !ok {
		return fmt.Errorf("no task %q", t.Name)
	}
	return do(t, answer)
}

// tasks by name.
var tasks = map[string]func(task.Task, *task.Answer) error{
	"list":   list,
	"share":  share,
	"large":  large,
	"daxfs":  module,
	"script": script,
	"dmabuf": dmabuf,
}

// pause tells the host that all is in place, and waits for it.
func pause() error {
	if err := os.WriteFile(host+task.ReadyFile, nil, 0o644); err != nil {
		return err
	}
	for {
		if _, err := os.Stat(host + task.ResumeFile); err == nil {
			return nil
		}
		time.Sleep(100 * time.Millisecond)
	}
}
