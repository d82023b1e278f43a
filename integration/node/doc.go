// Package node runs virtual machines that are container hosts of their own. Each boots a
// distribution's kernel, has an image made by "daxfs convert" as its root file system, and runs the
// same containerd, runc and daxfs-snapshotter as package stack. Files of the host become its
// persistent memory; its shell executes commands from the test.
//
//	root, err := node.MakeRoot(dir)
//	n, err := node.Start(ctx, node.Options{Kernel: kernel, Root: root, Pool: pool}, dir)
//	out, err := n.Sh("ctr run --rm --snapshotter daxfs registry.example.com/web:latest c1 /bin/true")
//	err = n.Stop()
//
// Everything runs under emulation, so a node takes about ten seconds until its containerd answers.
package node
