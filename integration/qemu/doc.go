// Package qemu tests with other kernels: a virtual machine boots a distribution's kernel with an
// initramfs made here, gets a host file as shared memory, runs one task of the guest program and returns its answer.
//
//	kernels, err := qemu.FindKernels()
//	answer, err := qemu.Run(ctx, qemu.Machine{Kernel: kernels[0], Memory: pool, Task: guest.Task{Name: "list"}})
//
// The package does not rely on hardware virtualization: everything is emulated, and a boot takes some
// seconds. The guest's /init is this project's own static program (package main in guest/), so that
// the guest runs the code under test: it reads the pool's catalogue and mounts with the drivers of package mount.
package qemu
