package node

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"time"

	"github.com/daxfs/daxfs-snapshotter/integration/qemu"
	"github.com/daxfs/daxfs-snapshotter/integration/qemu/task"
	"github.com/daxfs/daxfs-snapshotter/internal/vmm"
)

// Options are the options of a node.
type Options struct {
	Kernel qemu.Kernel
	// Root is the image from MakeRoot. It is the node's /dev/pmem0.
	Root string
	// Devices become the node's /dev/pmem1, /dev/pmem2 and so on.
	Devices []vmm.Device
	// Disk is a file with an ext4 file system, of a multiple of 2 MiB. It is the last device and the
	// node's /var, which then survives a reboot. Without Disk, /var is in the node's memory.
	Disk string
	// Config is the configuration of the node's daxfs-snapshotter, as TOML.
	Config string
	// UUID is the machine's UUID in its firmware. It identifies a reader of a shared pool across reboots.
	UUID string
	// Network lets the node reach servers on this machine's 127.0.0.1, as 10.0.2.2.
	Network bool
	// RAM in MiB; 0 means 768.
	RAM int
	// Launcher is the machine's launcher.
	Launcher []string
}

// limit ends hanging commands. It allows for slow emulation and a busy machine.
const limit = 5 * time.Minute

// Node is a virtual machine whose containerd runs.
type Node struct {
	*qemu.Running
	ctx context.Context
}

// Start boots a node and waits until its containerd and its daxfs-snapshotter answer. dir is an empty
// directory for its files. The machine ends with ctx.
func Start(ctx context.Context, o Options, dir string) (*Node, error) {
	if o.RAM == 0 {
		o.RAM = 768
	}
	modules := []string{"loop"}
	if o.Network {
		modules = append(modules, "virtio_net")
	}
	devices := o.Devices
	if o.Disk != "" {
		info, err := os.Stat(o.Disk)
		if err != nil {
			return nil, fmt.Errorf("disk of the node: %w", err)
		}
		modules = append(modules, "ext4")
		devices = append(slices.Clone(devices), vmm.Device{ID: "disk", Path: o.Disk, Size: info.Size()})
	}
	r, err := qemu.Start(ctx, qemu.Machine{
		Kernel: o.Kernel, Memory: o.Root, ReadOnly: true, More: devices, Network: o.Network, Modules: modules,
		RAM: o.RAM, CPUs: 1, UUID: o.UUID,
		Task: task.Task{Name: "node"}, Launcher: o.Launcher,
	}, dir)
	if err != nil {
		return nil, err
	}
	n := &Node{Running: r, ctx: ctx}
	if err := os.WriteFile(filepath.Join(r.Share(), "daxfs.toml"), []byte(o.Config), 0o644); err != nil {
		return n, err
	}
	if o.Disk != "" {
		if _, err := n.Sh("mount -t ext4 /dev/pmem%d /var", len(devices)); err != nil {
			return n, err
		}
	}
	if _, err := n.Sh("hostname node; ip link set lo up; " +
		"mkdir -p /var/lib/containerd /run/containerd /run/daxfs-snapshotter"); err != nil {
		return n, err
	}
	if o.Network {
		if _, err := n.Sh("ip addr add 10.0.2.15/24 dev eth0; ip link set eth0 up; " +
			"ip route add default via 10.0.2.2"); err != nil {
			return n, err
		}
	}
	return n, errors.Join(n.StartDaemon(), n.StartContainerd())
}

// Sh runs a script in the node's shell and returns its output.
func (n *Node) Sh(format string, args ...any) (string, error) {
	ctx, cancel := context.WithTimeout(n.ctx, limit)
	defer cancel()
	return n.Command(ctx, fmt.Sprintf(format, args...))
}

// StartContainerd starts containerd and waits until it answers.
func (n *Node) StartContainerd() error {
	_, err := n.Sh(`containerd --log-level warn >>/host/containerd.log 2>&1 &
		echo $! >/run/containerd.pid
		until ctr version >/dev/null 2>&1; do kill -0 $!; sleep 0.1; done`)
	return n.withLog("containerd", err)
}

// StartDaemon starts daxfs-snapshotter and waits until it listens.
func (n *Node) StartDaemon() error {
	_, err := n.Sh(`rm -f %[1]s
		daxfs-snapshotter --config /host/daxfs.toml >>/host/daxfs-snapshotter.log 2>&1 &
		echo $! >/run/daxfs-snapshotter.pid
		until [ -S %[1]s ]; do kill -0 $!; sleep 0.1; done`, daemonSocket)
	return n.withLog("daxfs-snapshotter", err)
}

// KillDaemon kills daxfs-snapshotter with SIGKILL.
func (n *Node) KillDaemon() error {
	_, err := n.Sh("kill -9 $(cat /run/daxfs-snapshotter.pid)")
	return err
}

// Log returns the log of a node's program.
func (n *Node) Log(name string) string {
	b, err := os.ReadFile(filepath.Join(n.Share(), name+".log"))
	if err != nil {
		return err.Error()
	}
	return string(b)
}

func (n *Node) withLog(name string, err error) error {
	if err == nil {
		return nil
	}
	return fmt.Errorf("start %s in the virtual machine: %w\nits log:\n%s", name, err, n.Log(name))
}

// Stop turns the machine off at once. The error includes warnings of the kernel while the node ran.
func (n *Node) Stop() error {
	if err := n.Resume(); err != nil {
		return err
	}
	_, err := n.Wait()
	return err
}
