// Package qemu runs other kernels for tests: a virtual machine boots a distribution's kernel with an initramfs made
// here, gets a host file as shared memory, runs one task of the guest program and hands its answer back.
//
//	kernels, err := qemu.FindKernels()
//	answer, err := qemu.Run(ctx, qemu.Machine{Kernel: kernels[0], Memory: pool, Task: guest.Task{Name: "list"}})
//
// There is no hardware virtualization to rely on: everything runs under emulation, and a boot takes some seconds.
// /init of the guest is this project's own static program (package main in guest/), so that the guest uses the very
// code under test: it reads the pool's catalogue and mounts with the drivers of package mount.
package qemu
