// Package node runs virtual machines that are container hosts of their own: each boots a distribution's kernel, has an
// image made by "daxfs convert" as its root file system, and runs the containerd, runc and daxfs-snapshotter that package
// stack runs on the host. Files of the host become its persistent memory; commands are sent to its shell.
//
//	root, err := node.MakeRoot(dir)
//	n, err := node.Start(ctx, node.Options{Kernel: kernel, Root: root, Pool: pool}, dir)
//	out, err := n.Sh("ctr run --rm --snapshotter daxfs registry.example.com/web:latest c1 /bin/true")
//	err = n.Stop()
//
// Everything runs under emulation, so a node needs about ten seconds until its containerd answers.
package node
