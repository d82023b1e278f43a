package qemu

import (
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/daxfs/daxfs-snapshotter/integration/qemu/task"
	"github.com/daxfs/daxfs-snapshotter/internal/vmm"
)

// Program is the emulator.
const Program = "qemu-system-x86_64"

// modules are the modules of every guest, in load order.
var modules = []string{
	"virtio_pci", "9pnet_virtio", "9p", // the directory shared with the host
	checksum, "overlay", "erofs", // for mounting images
	"libnvdimm", "nd_pmem", "nd_e820", "virtio_pmem", // the memory
}

// checksum is a dependency of erofs that modules.dep lacks; a plain function since Linux 6.15.
const checksum = "crc32c_generic"

// Via is the way in which the host's file becomes memory of the guest.
type Via string

const (
	// VirtioPmem is a paravirtual persistent memory device.
	VirtioPmem Via = "virtio-pmem"
	// Memmap makes the file a part of the guest's RAM that its kernel leaves alone (memmap=nn!ss).
	Memmap Via = "memmap"
	// Reserved is the same with memmap=nn$ss: a physical range without a driver or device.
	Reserved Via = "reserved"
)

// Machine is one virtual machine that runs one task.
type Machine struct {
	Kernel Kernel
	// Memory is the file shared with the guest, a multiple of 2 MiB, and Via how. Machines can share a file.
	Memory string
	Via    Via
	// Task is the task of /init; Files are further files of the initramfs, by path without a leading slash.
	Task  task.Task
	Files map[string][]byte
	// ReadOnly keeps the guest from changing Memory. Only for VirtioPmem.
	ReadOnly bool
	// More are further files for the guest's persistent memory, after Memory. Only for VirtioPmem.
	More []vmm.Device
	// Network lets the guest reach this machine's 127.0.0.1 as 10.0.2.2; the guest is 10.0.2.15.
	Network bool
	// Modules are loaded in addition to those of every machine.
	Modules []string
	// UUID is the machine's UUID in its firmware; empty gives it none.
	UUID string
	// CPUs is the number of the guest's CPUs; 0 means 2. With several CPUs, the emulator can fail on code
	// that the guest's kernel modifies at run time ("Oops: int3"), so long tests use one.
	CPUs int
	// RAM is the guest's RAM in MiB, without Memory; 0 means 512.
	RAM int
	// Launcher is a command that execs the emulator, given as its arguments. Empty starts the emulator directly.
	Launcher []string
}

// Running is a started machine.
type Running struct {
	dir    string // shared with the guest
	cmd    *exec.Cmd
	output bytes.Buffer
	done   chan struct{} // closed when the machine has ended and err is set
	err    error

	commands sync.Mutex // one Command at a time
	count    int        // of commands
}

// Start boots a machine. dir is an empty directory for the exchange of files; the guest program is
// built from this tree. The machine ends with ctx.
func Start(ctx context.Context, m Machine, dir string) (*Running, error) {
	info, err := os.Stat(m.Memory)
	if err != nil {
		return nil, fmt.Errorf("shared memory of the guest: %w", err)
	}
	if info.Size()%(2<<20) != 0 {
		return nil,
			fmt.Errorf("shared memory of the guest: %q has %d bytes, want a multiple of 2 MiB", m.Memory, info.Size())
	}
	share := filepath.Join(dir, "share")
	if err := os.Mkdir(share, 0o755); err != nil {
		return nil, err
	}
	initramfs := filepath.Join(dir, "initramfs")
	if err := m.writeInitramfs(initramfs); err != nil {
		return nil, fmt.Errorf("make the initramfs: %w", err)
	}
	ram := m.RAM
	if ram == 0 {
		ram = 512
	}
	// The log buffer holds everything that a task makes the kernel log: the guest reads warnings at its end.
	params := "console=ttyS0 quiet panic=-1 oops=panic nokaslr random.trust_cpu=on log_buf_len=4M rdinit=/init"
	memory, extra, err := m.memory(ram, info.Size())
	if err != nil {
		return nil, err
	}
	if m.UUID != "" {
		memory = append(memory, "-uuid", m.UUID)
	}
	if m.Network {
		memory = append(memory, "-nic", "user,model=virtio-net-pci")
	}
	args := append([]string{
		"-accel", "tcg,thread=multi", "-cpu", "max", "-smp", strconv.Itoa(cmp.Or(m.CPUs, 2)),
		"-nographic", "-no-reboot", "-nodefaults", "-serial", "file:" + filepath.Join(dir, "console"),
		"-monitor", "none",
		"-kernel", m.Kernel.Image, "-initrd", initramfs, "-append", params + extra,
		"-virtfs", "local,path=" + share + ",mount_tag=host,security_model=none,multidevs=remap",
	}, memory...)
	argv := slices.Concat(m.Launcher, []string{Program}, args)
	r := &Running{dir: dir, cmd: exec.CommandContext(ctx, argv[0], argv[1:]...), done: make(chan struct{})}
	r.cmd.Stdout, r.cmd.Stderr = &r.output, &r.output
	r.cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	if err := r.cmd.Start(); err != nil {
		return nil, fmt.Errorf("start the virtual machine: %w", err)
	}
	go func() {
		r.err = r.cmd.Wait()
		close(r.done)
	}()
	return r, nil
}

// memory returns the emulator's arguments for the guest's RAM and the shared file, and parameters for its kernel.
func (m Machine) memory(ram int, size int64) (args []string, params string, err error) {
	mib := size >> 20
	switch m.Via {
	case Memmap, Reserved:
		mark := map[Via]string{Memmap: "!", Reserved: "$"}[m.Via]
		// The file is a NUMA node right after the first. The firmware keeps tables at the very end of RAM, so
		// a last node of ordinary memory follows.
		const tail = 64
		return []string{
			"-machine", "q35", "-m", fmt.Sprintf("%dM", int64(ram)+mib+tail),
			"-object", fmt.Sprintf("memory-backend-ram,id=m0,size=%dM", ram),
			"-object", fmt.Sprintf("memory-backend-file,id=m1,share=on,mem-path=%s,size=%dM", m.Memory, mib),
			"-object", fmt.Sprintf("memory-backend-ram,id=m2,size=%dM", tail),
			"-numa", "node,nodeid=0,memdev=m0", "-numa", "node,nodeid=1,memdev=m1", "-numa", "node,nodeid=2,memdev=m2",
		}, fmt.Sprintf(" memmap=%dM%s%dM", mib, mark, ram), nil
	default:
		first := vmm.Device{ID: "memory", Path: m.Memory, Size: size, ReadOnly: m.ReadOnly}
		args, err = vmm.Args("qemu", int64(ram)<<20, append([]vmm.Device{first}, m.More...))
		return args, "", err
	}
}

// writeInitramfs makes the guest's initramfs: /init, its task, and the modules.
func (m Machine) writeInitramfs(path string) error {
	program, err := guestProgram()
	if err != nil {
		return err
	}
	t, err := json.Marshal(m.Task)
	if err != nil {
		return err
	}
	a := archive{}
	a.add("init", typeFile|0o755, program)
	a.add("task.json", typeFile|0o644, t)
	for name, body := range m.Files {
		a.add(name, typeFile|0o755, body)
	}
	for _, d := range []string{"proc", "sys", "dev", "tmp", "run", "host"} {
		a.add(d, typeDir|0o755, nil)
	}
	files, err := m.Kernel.order(slices.Concat(modules, m.Modules)...)
	if err != nil {
		return err
	}
	var order strings.Builder
	for _, f := range files {
		body, err := os.ReadFile(filepath.Join(m.Kernel.modules, f))
		if err != nil {
			return err
		}
		name := "modules/" + filepath.Base(f)
		a.add(name, typeFile|0o644, body)
		fmt.Fprintln(&order, "/"+name)
	}
	a.add("modules/order", typeFile|0o644, []byte(order.String()))

	// Not compressed, because an emulated processor takes seconds to unpack it.
	var packed bytes.Buffer
	if err := a.write(&packed); err != nil {
		return err
	}
	return os.WriteFile(path, packed.Bytes(), 0o644)
}

// guestProgram builds package main in guest/, once per process.
var guestProgram = sync.OnceValues(func() ([]byte, error) {
	dir, err := os.MkdirTemp("", "daxfs-guest-")
	if err != nil {
		return nil, err
	}
	defer os.RemoveAll(dir)
	program := filepath.Join(dir, "init")
	build := exec.Command("go", "build", "-trimpath", "-ldflags", "-s -w", "-o", program,
		"github.com/daxfs/daxfs-snapshotter/integration/qemu/guest")
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		return nil, fmt.Errorf("build the guest program: %w\n%s", err, out)
	}
	return os.ReadFile(program)
})

// AwaitReady waits until the task called Pause. Resume lets the task continue.
func (r *Running) AwaitReady() error {
	for {
		if _, err := os.Stat(filepath.Join(r.dir, "share", task.ReadyFile)); err == nil {
			return nil
		}
		select {
		case <-r.done:
			return fmt.Errorf("the guest ended before it was ready: %w", r.explain(r.err))
		case <-time.After(100 * time.Millisecond):
		}
	}
}

// Resume lets a task that called Pause continue.
func (r *Running) Resume() error {
	return os.WriteFile(filepath.Join(r.dir, "share", task.ResumeFile), nil, 0o644)
}

// Serve handles the requests of the guest until the machine ends.
func (r *Running) Serve(do func(task.Request) task.Reply) error {
	for n := 1; ; {
		b, err := os.ReadFile(filepath.Join(r.dir, "share", fmt.Sprintf("%s%d", task.RequestFile, n)))
		if errors.Is(err, os.ErrNotExist) {
			select {
			case <-r.done:
				return nil
			case <-time.After(time.Millisecond):
				continue
			}
		}
		if err != nil {
			return err
		}
		var q task.Request
		if err := json.Unmarshal(b, &q); err != nil {
			return fmt.Errorf("request %d of the guest: %w", n, err)
		}
		if b, err = json.Marshal(do(q)); err != nil {
			return err
		}
		reply := filepath.Join(r.dir, "share", fmt.Sprintf("%s%d", task.ReplyFile, n))
		if err := errors.Join(os.WriteFile(reply+".new", b, 0o644), os.Rename(reply+".new", reply)); err != nil {
			return err
		}
		n++
	}
}

// Wait waits for the end of the machine and returns the task's answer. It also fails if the guest's
// kernel warned. The error contains the end of the guest's console.
func (r *Running) Wait() (task.Answer, error) {
	<-r.done
	if r.err != nil {
		return task.Answer{}, r.explain(r.err)
	}
	b, err := os.ReadFile(filepath.Join(r.dir, "share", task.AnswerFile))
	if err != nil {
		return task.Answer{}, r.explain(err)
	}
	var a task.Answer
	if err := json.Unmarshal(b, &a); err != nil {
		return a, r.explain(err)
	}
	if a.Error != "" {
		return a, r.explain(errors.New(a.Error))
	}
	if len(a.Warnings) > 0 {
		return a, r.explain(fmt.Errorf("the kernel warned while the task ran:\n%s", strings.Join(a.Warnings, "\n")))
	}
	return a, nil
}

// Kill ends the machine at once, like a failure of the monitor.
func (r *Running) Kill() error {
	err := r.cmd.Process.Kill()
	<-r.done
	return err
}

// Run starts a machine and waits for its end.
func Run(ctx context.Context, m Machine, dir string) (task.Answer, error) {
	r, err := Start(ctx, m, dir)
	if err != nil {
		return task.Answer{}, err
	}
	return r.Wait()
}

func (r *Running) explain(err error) error {
	console, readErr := os.ReadFile(filepath.Join(r.dir, "console"))
	if readErr != nil {
		console = []byte(readErr.Error())
	}
	const most = 4000
	if len(console) > most {
		console = console[len(console)-most:]
	}
	return fmt.Errorf("guest: %w\n%s\n%s", err, r.output.String(), console)
}
