//go:build linux

package main

import (
	"errors"
	"fmt"
	"os"
	"time"

	"github.com/daxfs/daxfs-snapshotter/integration/qemu/task"
	"github.com/daxfs/daxfs-snapshotter/pool/lease"
)

// lease claims an image in a lease region, like a reader, and waits. The host ends the claim
// meanwhile; the second claim must fail, and the answer holds its error.
func (g *guest) lease() error {
	if g.DevDAX {
		if err := makeDevDAX(g.Lease); err != nil {
			return err
		}
	} else if g.Phys == 0 {
		if err := awaitDevice(); err != nil {
			return err
		}
	}
	l, err := lease.Open(g.Lease, lease.Reader{Name: task.LeaseReader, Machine: [16]byte{1}})
	if err != nil {
		return err
	}
	g.later("close the lease region", l.Close)
	if held, err := l.Claim(task.LeasePool, task.LeaseImage); err != nil || held {
		return fmt.Errorf("the first claim: held %v, %w", held, err)
	}
	if held, err := l.Claim(task.LeasePool, task.LeaseImage); err != nil || !held {
		return fmt.Errorf("the same claim: held %v, %w", held, err)
	}
	if err := pause(); err != nil {
		return err
	}
	if _, err := l.Claim(task.LeasePool, task.LeaseImage); err != nil {
		g.answer.Output = append(g.answer.Output, err.Error())
	}
	return nil
}

// makeDevDAX does the work of ndctl create-namespace --force --mode devdax, and waits for the device.
func makeDevDAX(path string) error {
	if err := awaitDevice(); err != nil {
		return err
	}
	const bus, seed = "/sys/bus/nd/", "/sys/bus/nd/devices/dax0.0/"
	for _, w := range []struct{ file, value string }{
		{bus + "drivers/nd_pmem/unbind", "namespace0.0"},
		{seed + "align", "2097152"},
		{seed + "mode", "ram"}, // the place of the page descriptors
		{seed + "uuid", "01234567-89ab-cdef-0123-456789abcdef"},
		{seed + "namespace", "namespace0.0"},
		{bus + "drivers/dax_pmem/bind", "dax0.0"},
	} {
		if err := os.WriteFile(w.file, []byte(w.value), 0); err != nil {
			return err
		}
	}
	for range 600 {
		if _, err := os.Stat(path); !errors.Is(err, os.ErrNotExist) {
			return err
		}
		time.Sleep(100 * time.Millisecond)
	}
	return fmt.Errorf("no %q after a minute", path)
}
