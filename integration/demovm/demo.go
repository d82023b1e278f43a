package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	v1 "github.com/google/go-containerregistry/pkg/v1"

	"github.com/daxfs/daxfs-snapshotter/integration/node"
	"github.com/daxfs/daxfs-snapshotter/integration/qemu"
	"github.com/daxfs/daxfs-snapshotter/integration/stack"
	"github.com/daxfs/daxfs-snapshotter/integration/testimage"
	"github.com/daxfs/daxfs-snapshotter/internal/vmm"
)

const (
	poolSize  = 256 << 20
	leaseSize = 2 << 20

	// hostConfig makes a pool that the machines can mount with DAX, and names the lease regions.
	hostConfig = `[pool]
size = "256MiB"
dax = "yes"
readers = "leases"
leases = ["{{run}}"]
`

	// nodeConfig makes the machine a reader of the host's pool.
	nodeConfig = `[pool]
kind = "tmpfs"
path = "/run/pool"
size = "64MiB"

[shared]
pools = ["/dev/pmem1"]
leases = { "/dev/pmem1" = "/dev/pmem2" }
`
)

// machines are the names of the virtual machines.
var machines = []string{"one", "two"}

type demo struct {
	*stack.Stack
	ctx   context.Context
	out   io.Writer
	nodes []*machine
}

type machine struct {
	*node.Node
	name   string
	before memory // with containerd running, before the first image
}

// facts are the findings of a run, for the test.
type facts struct {
	after    []memory // of each machine, with the containers of both images running
	before   []memory
	mapped   []int64 // KiB of the pool mapped by each machine
	together int64   // KiB of memory behind all of them
	late     []string
	kept     bool // an image in use by a machine survived its removal on the host
	freed    bool // its space came back after the machine's last use
}

func (d *demo) say(format string, args ...any) { fmt.Fprintf(d.out, format+"\n", args...) }

// end waits for machines whose context was cancelled.
func (d *demo) end() {
	for _, m := range d.nodes {
		m.Wait() // it was killed, or ended before
	}
}

func (d *demo) run() (*facts, error) {
	images, err := d.push()
	if err != nil {
		return nil, err
	}
	for _, ref := range images[:2] {
		if err := d.pull(ref); err != nil {
			return nil, err
		}
	}
	d.say("The host's containerd has pulled two images into a pool of %d MiB, a file.\n", poolSize>>20)
	if err := d.boot(); err != nil {
		return nil, err
	}
	f := &facts{}
	for _, step := range []func(*facts, []string) error{d.start, d.prove, d.addLate, d.remove} {
		if err := errors.Join(d.ctx.Err(), step(f, images)); err != nil {
			return nil, err
		}
	}
	for _, m := range d.nodes {
		if err := m.Stop(); err != nil {
			return nil, fmt.Errorf("machine %q: %w", m.name, err)
		}
	}
	return f, nil
}

// push makes the images web, jobs and late, and uploads them.
func (d *demo) push() (refs []string, err error) {
	web, jobs, err := testimage.Twins()
	if err != nil {
		return nil, err
	}
	late, err := testimage.Tiny()
	if err != nil {
		return nil, err
	}
	for _, p := range []struct {
		name string
		img  v1.Image
	}{{"web", web}, {"jobs", jobs}, {"late", late}} {
		ref, err := d.Push(p.name, p.img)
		if err != nil {
			return nil, err
		}
		refs = append(refs, ref)
	}
	return refs, d.ctx.Err()
}

// pull makes the host's containerd pull an image.
func (d *demo) pull(ref string) error {
	began := time.Now()
	if _, err := d.Try("ctr", "image", "pull", "--plain-http", "--snapshotter", "daxfs", ref); err != nil {
		return err
	}
	d.say("host$ ctr image pull --snapshotter daxfs %s    # %.1f s", shortName(ref), time.Since(began).Seconds())
	return nil
}

// shortName returns the repository of a reference.
func shortName(ref string) string {
	_, name, _ := strings.Cut(ref, "/")
	name, _, _ = strings.Cut(name, ":")
	return name
}

// boot starts both machines at once.
func (d *demo) boot() error {
	kernels, err := qemu.FindKernels()
	if err != nil {
		return err
	}
	root, err := node.MakeRoot(d.Dir)
	if err != nil {
		return err
	}
	began := time.Now()
	type started struct {
		m   *machine
		err error
	}
	all := make(chan started)
	for i, name := range machines {
		go func() {
			dir := filepath.Join(d.Dir, name)
			lease := filepath.Join(d.Run, name+".lease")
			err := errors.Join(os.Mkdir(dir, 0o755), os.WriteFile(lease, nil, 0o600), os.Truncate(lease, leaseSize))
			m := &machine{name: name}
			if err == nil {
				m.Node, err = node.Start(d.ctx, node.Options{
					Kernel: kernels[i%len(kernels)], Root: root, Config: nodeConfig, Devices: []vmm.Device{
						{ID: "pool", Path: d.PoolFile(), Size: poolSize, ReadOnly: true},
						{ID: "lease", Path: lease, Size: leaseSize},
					},
				}, dir)
			}
			all <- started{m, err}
		}()
	}
	var errs []error
	for range machines {
		s := <-all
		if s.m.Node != nil {
			d.nodes = append(d.nodes, s.m)
		}
		errs = append(errs, s.err)
	}
	if err := errors.Join(errs...); err != nil {
		return err
	}
	for _, m := range d.nodes {
		if m.before, err = m.memory(); err != nil {
			return err
		}
		kernel, err := m.Sh("uname -r; ls /sys/class/net")
		if err != nil {
			return err
		}
		f := strings.Fields(kernel)
		d.say("Machine %q runs Linux %s and its own containerd; network devices: %s; disks: none.", m.name, f[0],
			strings.Join(f[1:], " "))
	}
	d.say("They started together in %.1f s, emulated.\n", time.Since(began).Seconds())
	return nil
}

// start attaches the images in each machine and starts a container of each.
func (d *demo) start(_ *facts, refs []string) error {
	d.say("In each machine:\n$ daxfs attach web jobs")
	return d.each(func(m *machine) error {
		// The owner publishes images some time after they were pulled.
		for _, ref := range refs[:2] {
			if err := m.attach(ref); err != nil {
				return err
			}
		}
		for _, ref := range refs[:2] {
			began := time.Now()
			id := shortName(ref)
			_, err := m.Sh(`ctr run --detach --snapshotter daxfs %[1]s %[2]s /usr/bin/python3 -B /app/main.py
				until [ -s /run/containerd/state/io.containerd.runtime.v2.task/default/%[2]s/rootfs/tmp/ready ]
				do sleep 0.1; done`, ref, id)
			if err != nil {
				return err
			}
			d.say("%s$ ctr run --detach --snapshotter daxfs ... %s python3 /app/main.py    # %.1f s until it is ready",
				m.name, id, time.Since(began).Seconds())
		}
		return nil
	})
}

// attach makes an image of the host known to the machine's containerd.
func (m *machine) attach(ref string) error {
	_, err := m.Sh(`i=0; until daxfs attach %s >/tmp/attach 2>&1; do
			i=$((i+1)); [ $i -lt 60 ] || { cat /tmp/attach; exit 1; }; sleep 0.5
		done`, ref)
	return err
}

// each runs do on one machine after the other, so that times are those of one machine.
func (d *demo) each(do func(*machine) error) error {
	for _, m := range d.nodes {
		if err := errors.Join(d.ctx.Err(), do(m)); err != nil {
			return fmt.Errorf("machine %q: %w", m.name, err)
		}
	}
	return nil
}

// memory counts a machine's copied and cached bytes.
type memory struct {
	content   int64 // in containerd's content store
	snapshots int64 // files of images outside the shared pool
	cached    int64 // page cache
	pulled    int64 // received by its network devices
}

func (m *machine) memory() (out memory, err error) {
	text, err := m.Sh(`sync
		blobs=/var/lib/containerd/root/io.containerd.content.v1.content/blobs
		echo $(($(find $blobs -type f 2>/dev/null | xargs -r cat | wc -c)))
		echo $(($(du -skx /var/lib/daxfs-snapshotter /run/pool | awk '{n += $1} END {print n}') * 1024))
		awk '/^Cached:|^Buffers:/ {n += $2} END {print n * 1024}' /proc/meminfo
		for d in /sys/class/net/*; do [ $d = /sys/class/net/lo ] || cat $d/statistics/rx_bytes; done |
			awk '{n += $1} END {print n + 0}'`)
	if err != nil {
		return out, err
	}
	f := strings.Fields(text)
	for i, v := range []*int64{&out.content, &out.snapshots, &out.cached, &out.pulled} {
		if i >= len(f) {
			return out, fmt.Errorf("the machine printed %q", text)
		}
		if *v, err = strconv.ParseInt(f[i], 10, 64); err != nil {
			return out, fmt.Errorf("the machine printed %q: %w", text, err)
		}
	}
	return out, nil
}
