package node

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"

	"github.com/daxfs/daxfs-snapshotter/integration/stack"
	"github.com/daxfs/daxfs-snapshotter/integration/testimage"
	"github.com/daxfs/daxfs-snapshotter/internal/vmm"
)

// The paths of a node's state and sockets are the defaults, so that commands need no flags.
const (
	containerdRun = "/run/containerd"
	daemonSocket  = "/run/daxfs-snapshotter/daxfs.sock"
	daemonRoot    = "/var/lib/daxfs-snapshotter"
)

// MakeRoot makes the root file system of nodes below dir, and returns the path of its image, which
// nodes can share: busybox, containerd with its shim and ctr, runc with its libraries, and the programs of this tree.
func MakeRoot(dir string) (image string, err error) {
	busybox, err := testimage.Busybox()
	if err != nil {
		return "", err
	}
	runc, err := exec.LookPath("runc")
	if err != nil {
		return "", fmt.Errorf("no runc (Debian: runc): %w", err)
	}
	libraries, err := testimage.Programs(runc)
	if err != nil {
		return "", err
	}
	config, err := stack.Options{Mode: stack.Streaming}.ContainerdConfig("/var/lib", containerdRun,
		daemonSocket, daemonRoot)
	if err != nil {
		return "", err
	}
	entries := append(busybox, libraries...)
	for _, name := range []string{"containerd", "containerd-shim-runc-v2", "ctr", "daxfs", "daxfs-snapshotter"} {
		path, err := stack.Program(name)
		if err != nil {
			return "", err
		}
		body, err := os.ReadFile(path)
		if err != nil {
			return "", err
		}
		entries = append(entries, testimage.File("usr/bin/"+name, 0o755, body))
	}
	entries = append(entries,
		testimage.Dir("host", 0o755), testimage.Dir("var", 0o755), testimage.Dir("etc/containerd", 0o755),
		testimage.File("etc/containerd/config.toml", 0o644, config),
	)
	return convert(dir, entries)
}

// convert makes an image file of entries with daxfs convert, and pads it to a size valid for a machine.
func convert(dir string, entries []testimage.Entry) (image string, err error) {
	tree := filepath.Join(dir, "root")
	if err := os.Mkdir(tree, 0o755); err != nil {
		return "", err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(tree)) }()
	if err := unpack(tree, entries); err != nil {
		return "", err
	}
	daxfs, err := stack.Program("daxfs")
	if err != nil {
		return "", err
	}
	image = filepath.Join(dir, "root.daxfs")
	if out, err := exec.Command(daxfs, "convert", "--quiet", "rootfs:"+tree, "-o", image).CombinedOutput(); err != nil {
		return "", fmt.Errorf("convert the root of nodes: %w\n%s", err, out)
	}
	st, err := os.Stat(image)
	if err != nil {
		return "", err
	}
	return image, os.Truncate(image, (st.Size()+vmm.Align-1)&^(vmm.Align-1))
}

// unpack makes a tree of entries with tar(1).
func unpack(dir string, entries []testimage.Entry) (err error) {
	cmd := exec.Command("tar", "--extract", "--preserve-permissions", "--same-owner", "--numeric-owner",
		"--directory", dir)
	in, err := cmd.StdinPipe()
	if err != nil {
		return err
	}
	if err := cmd.Start(); err != nil {
		return err
	}
	return errors.Join(testimage.Tar(in, entries), in.Close(), cmd.Wait())
}
