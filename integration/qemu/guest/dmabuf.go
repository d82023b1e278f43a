//go:build linux

package main

import (
	"fmt"
	"os"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/daxfs/daxfs-snapshotter/integration/listing"
	"github.com/daxfs/daxfs-snapshotter/mount"
	"github.com/daxfs/daxfs-snapshotter/mount/kernel"
	"github.com/daxfs/daxfs-snapshotter/pool/region"
)

// dmabuf puts the image /image into a dma-buf and mounts it with the kernel module. When only the
// mount holds the buffer, it lists the tree and runs the program.
func (g *guest) dmabuf() error {
	if err := load(g.Module, ""); err != nil {
		return err
	}
	image, err := os.ReadFile("/image")
	if err != nil {
		return err
	}
	const dir = "/run/dmabuf"
	if err := g.mountBuffer(image, dir); err != nil {
		return err
	}
	if err := g.listTrees([]string{dir}, listing.Options{NoTimes: true, NoXattrs: true}); err != nil {
		return err
	}
	out, err := run(dir, g.Program)
	g.answer.Output = append(g.answer.Output, out)
	return err
}

func (g *guest) mountBuffer(image []byte, dir string) error {
	fd, err := newBuffer(len(image))
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	r, err := region.Open(region.Config{Kind: region.KindDMABuf, FD: fd})
	if err != nil {
		return err
	}
	defer r.Close()
	if _, err := r.WriteAt(image, 0); err != nil {
		return err
	}
	return g.mountSource(kernel.Driver{}, mount.Source{Key: "image", Region: r.Info(), Size: g.ImageSize}, dir)
}

// newBuffer gets a dma-buf from the virtual graphics driver: distribution kernels have no DMA heaps.
func newBuffer(size int) (int, error) {
	card, err := os.OpenFile("/dev/dri/card0", os.O_RDWR, 0)
	if err != nil {
		return 0, err
	}
	defer card.Close()
	// Requests and structures of the kernel's drm/drm.h and drm/drm_mode.h: a picture of 4096 bytes per
	// line, then a descriptor of its buffer.
	const createDumb, handleToFD = 0xc02064b2, 0xc00c642d
	picture := struct {
		height, width, bpp, flags, handle, pitch uint32
		size                                     uint64
	}{height: uint32(size / 4096), width: 1024, bpp: 32}
	if _, _, errno := unix.Syscall(unix.SYS_IOCTL, card.Fd(), createDumb,
		uintptr(unsafe.Pointer(&picture))); errno != 0 {
		return 0, fmt.Errorf("make a picture of %d bytes: %w", size, errno)
	}
	export := struct {
		handle, flags uint32
		fd            int32
	}{handle: picture.handle, flags: unix.O_RDWR | unix.O_CLOEXEC}
	if _, _, errno := unix.Syscall(unix.SYS_IOCTL, card.Fd(), handleToFD,
		uintptr(unsafe.Pointer(&export))); errno != 0 {
		return 0, fmt.Errorf("export the picture's buffer: %w", errno)
	}
	return int(export.fd), nil
}
