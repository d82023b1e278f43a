// Command demovm shows kernels that share a pool. The host's containerd pulls two images into a pool.
// Two virtual machines, each with its own kernel and containerd, have the pool as read-only memory and
// start containers from it. The demo prints what the machines copied and cached, and which memory they share.
//
//	make demo-vm
//
// It runs in its own namespaces, with state below DAXFS_TEST_CACHE (see package stack), and leaves
// only the programs there. It needs root, but no hardware virtualization: the machines are emulated, which is slow.
package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"

	"github.com/daxfs/daxfs-snapshotter/integration/stack"
)

func main() {
	if os.Getuid() != 0 {
		fmt.Fprintln(os.Stderr,
			`demo-vm: needs root, to mount and to run containers: sudo env "PATH=$PATH" make demo-vm`)
		os.Exit(2)
	}
	if stack.Outermost() {
		fmt.Printf("This runs a containerd of its own on this machine, and two virtual machines, "+
			"in namespaces of their own.\n"+
			"Programs that are missing are built first: %s. Emulation is slow: allow five minutes.\n\n",
			stack.Versions())
	}
	os.Exit(stack.Show("demo-vm", func(ctx context.Context) error {
		_, err := show(ctx, os.Stdout)
		return err
	}))
}

// show runs everything and prints the proof.
func show(ctx context.Context, out io.Writer) (_ *facts, err error) {
	s, err := stack.Start(stack.Options{Mode: stack.Streaming, Config: hostConfig})
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, s.Close()) }()
	// The machines end before the stack, whatever happens.
	ctx, cancel := context.WithCancel(ctx)
	d := &demo{Stack: s, ctx: ctx, out: out}
	defer func() {
		cancel()
		d.end()
	}()
	return d.run()
}
