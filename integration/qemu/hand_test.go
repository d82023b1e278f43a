package qemu

import (
	"fmt"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/daxfs/daxfs-snapshotter/integration/qemu/task"
	"github.com/daxfs/daxfs-snapshotter/integration/testimage"
)

// handSize is the size of a pool made by hand.
const handSize = 64 << 20

// hand is a user who makes a pool, adds directories, and mounts them, only with the program.
type hand struct {
	driver, kind string // of the mount
	pool         string
	before       string // makes the memory
	machine      Machine
}

// handMachine gives a machine empty memory, and busybox and daxfs in its initramfs.
func handMachine(t *testing.T, m Machine) Machine {
	t.Helper()
	m.RAM = ramMiB
	m.Memory = filepath.Join(t.TempDir(), "memory")
	if err := os.WriteFile(m.Memory, nil, 0o644); err != nil {
		t.Fatal(err)
	}
	if err := os.Truncate(m.Memory, handSize); err != nil {
		t.Fatal(err)
	}
	m.Files = maps.Clone(m.Files)
	if m.Files == nil {
		m.Files = map[string][]byte{}
	}
	busybox, err := testimage.Busybox()
	if err != nil {
		t.Skip(err)
	}
	for _, e := range busybox {
		if e.Name == "bin/busybox" {
			m.Files["bin/busybox"] = e.Body
		}
	}
	program := filepath.Join(t.TempDir(), "daxfs")
	build := exec.Command("go", "build", "-trimpath", "-ldflags", "-s -w", "-o", program,
		"github.com/daxfs/daxfs-snapshotter/cmd/daxfs")
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("build: %v\n%s", err, out)
	}
	if m.Files["bin/daxfs"], err = os.ReadFile(program); err != nil {
		t.Fatal(err)
	}
	return m
}

// do runs the commands in a guest.
func (h hand) do(t *testing.T) {
	t.Helper()
	m := handMachine(t, h.machine)
	m.Task.Name, m.Task.Program = "script", []string{"/bin/busybox", "sh", "-euc", `
		/bin/busybox --install -s /bin
		` + h.before + `
		mkdir -p /one/dir /two /mnt/one /mnt/two
		echo hello >/one/dir/file; ln -s dir/file /one/link; cp /bin/busybox /one/busybox
		echo two >/two/name; cp /bin/busybox /two/busybox
		pool="` + h.pool + `"
		daxfs pool init --index /tmp/index $pool
		daxfs pool put --index /tmp/index --name one $pool rootfs:/one
		daxfs pool put --index /tmp/index --name two $pool rootfs:/two
		daxfs pool check --index /tmp/index $pool
		for name in one two; do
			daxfs mount --index /tmp/index --driver ` + h.driver + ` --pool $pool $name /mnt/$name
			grep " /mnt/$name ` + h.kind + ` " /proc/mounts
		done
		cat /mnt/one/link /mnt/two/name
		cmp /mnt/one/busybox /bin/busybox && cmp /mnt/two/busybox /bin/busybox
		/mnt/one/busybox echo ran
		! touch /mnt/one/new
		daxfs umount /mnt/one /mnt/two
		! grep " ` + h.kind + ` " /proc/mounts
		echo the end`}
	answer, err := boot(t, m).Wait()
	if err != nil {
		t.Fatal(err)
	}
	out := answer.Output[0]
	t.Log(out)
	for _, want := range []string{
		"hello\ntwo\nran\n", "/mnt/one " + h.kind + " ro,nosuid,nodev",
		"/mnt/two " + h.kind + " ro,nosuid,nodev", "the end\n",
	} {
		if !strings.Contains(out, want) {
			t.Errorf("the output lacks %q", want)
		}
	}
}

// On persistent memory, with DAX.
func TestByHand(t *testing.T) {
	onEach(t, func(t *testing.T, k Kernel) {
		hand{driver: "auto", kind: "erofs", pool: "/dev/pmem0", machine: Machine{Kernel: k, Via: VirtioPmem}}.do(t)
	})
}

// In memory without a block device, with the kernel module: in a physical range, and in a DAX character device.
func TestKernelModuleByHand(t *testing.T) {
	k, files := kernelModule(t)
	for name, h := range map[string]hand{
		"physical range": {
			pool:    fmt.Sprintf("%#x+%d", behind, handSize),
			machine: Machine{Via: Reserved, Task: task.Task{Phys: behind}},
		},
		"DAX device": {
			pool:    "/dev/dax0.0",
			machine: Machine{Via: Memmap, Modules: []string{"dax_pmem", "device_dax"}},
			// The steps of ndctl create-namespace --force --mode devdax.
			before: `
				echo namespace0.0 >/sys/bus/nd/drivers/nd_pmem/unbind
				cd /sys/bus/nd/devices/dax0.0
				echo 2097152 >align
				echo ram >mode
				echo 01234567-89ab-cdef-0123-456789abcdef >uuid
				echo namespace0.0 >namespace
				echo dax0.0 >/sys/bus/nd/drivers/dax_pmem/bind
				cd /`,
		},
	} {
		t.Run(name, func(t *testing.T) {
			h.driver, h.kind = "daxfs", "daxfs"
			h.machine.Kernel, h.machine.Files, h.machine.Task.Module = k, files, "/daxfs.ko"
			h.do(t)
		})
	}
}

// No pool is made on memory that is read-only for the guest: the kernel accepts the writes, and they are lost.
func TestByHandReadOnly(t *testing.T) {
	m := handMachine(t, Machine{Kernel: need(t)[0], Via: VirtioPmem, ReadOnly: true})
	m.Task.Name, m.Task.Program = "script", []string{"/bin/busybox", "sh", "-euc", `
		/bin/busybox --install -s /bin
		dd if=/bin/busybox of=/dev/pmem0 bs=4096 count=1 conv=fsync
		! daxfs pool init --index /tmp/index --force /dev/pmem0
		! ls /tmp/index
		! daxfs pool ls /dev/pmem0`}
	answer, err := boot(t, m).Wait()
	if err != nil {
		t.Fatal(err)
	}
	out := answer.Output[0]
	t.Log(out)
	if !strings.Contains(out,
		"does not keep what is written at 4096: read-only memory; a virtual machine may have it read-only") {
		t.Error("the output does not say that the memory is read-only")
	}
	left, err := os.ReadFile(m.Memory)
	if err != nil {
		t.Fatal(err)
	}
	if slices.ContainsFunc(left, func(b byte) bool { return b != 0 }) {
		t.Error("the guest has changed the file")
	}
}
