//go:build linux

// Command guest is /init of the virtual machines that tests start. It loads the modules, runs its task
// on the memory shared by the host, unmounts everything, writes the answer into the directory shared
// with the host, and turns the machine off.
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

// guest is a task at work.
type guest struct {
	task.Task
	answer task.Answer
	// undo undoes the steps of the task, in reverse order.
	undo []step
}

func main() {
	if os.Getpid() != 1 {
		fmt.Fprintln(os.Stderr, "guest: is /init of a test's virtual machine and nothing else")
		os.Exit(2)
	}
	err := start()
	if err == nil {
		err = answerTask()
	}
	if err != nil {
		fmt.Println("guest:", err) // there is no other way to report it
	}
	// Not an orderly shutdown, because it would hang if an unmount hangs. The host's directory has no cache.
	if err := os.WriteFile("/proc/sysrq-trigger", []byte("b"), 0); err != nil {
		fmt.Println("guest: end the machine:", err)
	}
}

// answerTask runs the task and writes the answer for the host.
func answerTask() error {
	var g guest
	if err := g.watched(g.work); err != nil {
		g.answer.Error = err.Error()
	}
	b, err := json.Marshal(g.answer)
	if err != nil {
		return err
	}
	return os.WriteFile(host+task.AnswerFile, b, 0o644)
}

// start makes the usual mounts, loads the modules and mounts the host's directory.
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

// work runs the task and undoes its steps.
func (g *guest) work() error {
	b, err := os.ReadFile("/task.json")
	if err != nil {
		return err
	}
	if err := json.Unmarshal(b, &g.Task); err != nil {
		return err
	}
	release, err := os.ReadFile("/proc/sys/kernel/osrelease")
	if err != nil {
		return err
	}
	g.answer.Kernel = strings.TrimSpace(string(release))
	do, ok := tasks[g.Name]
	if !ok {
		return fmt.Errorf("no task %q", g.Name)
	}
	return errors.Join(do(g), g.end())
}

var tasks = map[string]func(*guest) error{
	"list":   (*guest).list,
	"share":  (*guest).share,
	"churn":  (*guest).churn,
	"flips":  (*guest).flips,
	"large":  (*guest).large,
	"daxfs":  (*guest).module,
	"script": (*guest).script,
	"dmabuf": (*guest).dmabuf,
	"node":   (*guest).node,
	"lease":  (*guest).lease,
}

// step undoes one step of a task.
type step struct {
	what string
	do   func() error
}

// later registers a step for the end of the task.
func (g *guest) later(what string, do func() error) { g.undo = append(g.undo, step{what, do}) }

// end undoes the steps of the task. A kernel with wrong counts of used pages lets an unmount wait for
// ever, so each step has a generous time limit.
func (g *guest) end() error {
	for i := len(g.undo) - 1; i >= 0; i-- {
		s := g.undo[i]
		done := make(chan error, 1)
		go func() { done <- s.do() }()
		select {
		case err := <-done:
			if err != nil {
				return fmt.Errorf("%s: %w", s.what, err)
			}
		case <-time.After(time.Minute):
			return fmt.Errorf("%s: has not returned after a minute", s.what)
		}
	}
	return nil
}

// pause tells the host that everything is ready, and waits for it.
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
