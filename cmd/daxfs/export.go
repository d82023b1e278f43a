package main

import (
	"archive/tar"
	"bufio"
	"errors"
	"fmt"
	"io"
	"strings"
	"time"

	"github.com/google/renameio/v2"
	"github.com/urfave/cli/v2"
	"golang.org/x/sys/unix"

	"github.com/daxfs/daxfs-snapshotter/daxfs"
)

func init() { register(60, exportCommand) }

func exportCommand(e *env) *cli.Command {
	return &cli.Command{
		Name:      "export",
		Usage:     "write the tree of an image as a tar archive",
		ArgsUsage: "IMAGE",
		Description: `
The archive goes to standard output, or to the file after -o, which appears when it is complete. Its
format is PAX, with times in nanoseconds, extended attributes, hard links and devices. A tar cannot
hold sockets, or attributes with a "=" in their name; they are named on standard error. The same
image gives the same archive.

Examples:
   daxfs export -o debian.tar debian.daxfs
   daxfs export debian.daxfs | tar -tv
   daxfs export debian.daxfs | docker import - debian:again`,
		Flags: []cli.Flag{&cli.StringFlag{
			Name: "o", Aliases: []string{"output"},
			Usage: "write the archive to `FILE`",
		}},
		Action: e.export,
	}
}

func (e *env) export(c *cli.Context) error {
	if err := needArgs(c, "IMAGE"); err != nil {
		return err
	}
	if file := c.String("o"); file != "" {
		out, err := renameio.NewPendingFile(file, renameio.WithPermissions(0o644))
		if err != nil {
			return err
		}
		err = e.exportTo(c, out)
		if err == nil {
			err = out.CloseAtomicallyReplace()
		}
		return errors.Join(err, out.Cleanup()) // does nothing after the file is complete
	}
	if isTerminal(e.stdout) {
		return wrongUse(c, "standard output is a terminal, expected a file, a pipe or -o FILE")
	}
	return e.exportTo(c, e.stdout)
}

func (e *env) exportTo(c *cli.Context, out io.Writer) error {
	img, f, err := openImageFS(c.Args().First())
	if err != nil {
		return err
	}
	defer img.Close()
	w := bufio.NewWriterSize(out, 256<<10)
	x := exporter{
		ctx: c, w: tar.NewWriter(w), warn: e.stderr, first: map[uint64]string{}, buf: make([]byte, copyBuffer),
	}
	err = f.Walk(func(path string, in daxfs.Inode) error {
		if err := c.Context.Err(); err != nil {
			return err
		}
		if in.Mode&unix.S_IFMT == unix.S_IFSOCK {
			fmt.Fprintf(e.stderr, "daxfs: /%s is a socket, which a tar cannot hold\n", printable(path))
			return nil
		}
		return x.entry(path, in)
	})
	if err != nil {
		return fmt.Errorf("%s: %w", img.Name(), err)
	}
	if err := x.w.Close(); err != nil {
		return err
	}
	return w.Flush()
}

type exporter struct {
	ctx   *cli.Context
	w     *tar.Writer
	warn  io.Writer
	first map[uint64]string // the first name of each inode with several names
	buf   []byte            // for contents: clearing a new buffer for each file would take longer than all the rest
}

func (x *exporter) entry(path string, in daxfs.Inode) error {
	h := &tar.Header{
		Name: path, Mode: int64(in.Mode & 0o7777), Uid: int(in.UID), Gid: int(in.GID),
		ModTime: time.Unix(in.Mtime.Sec, int64(in.Mtime.Nsec)), Format: tar.FormatPAX,
	}
	if path == "." {
		h.Name = "./"
	}
	if !in.IsDir() && in.Nlink > 1 {
		if first, ok := x.first[in.Nid]; ok {
			h.Typeflag, h.Linkname = tar.TypeLink, first
			return x.header(h, in)
		}
		x.first[in.Nid] = path
	}
	switch in.Mode & unix.S_IFMT {
	case unix.S_IFREG:
		h.Typeflag, h.Size = tar.TypeReg, in.Size
	case unix.S_IFDIR:
		h.Typeflag = tar.TypeDir
		if path != "." {
			h.Name += "/"
		}
	case unix.S_IFLNK:
		target, err := in.Target()
		if err != nil {
			return err
		}
		h.Typeflag, h.Linkname = tar.TypeSymlink, target
	case unix.S_IFCHR, unix.S_IFBLK:
		h.Typeflag = tar.TypeChar
		if in.Mode&unix.S_IFMT == unix.S_IFBLK {
			h.Typeflag = tar.TypeBlock
		}
		h.Devmajor, h.Devminor = int64(unix.Major(in.Rdev)), int64(unix.Minor(in.Rdev))
	case unix.S_IFIFO:
		h.Typeflag = tar.TypeFifo
	default:
		return fmt.Errorf("%q: file type %#o cannot be in a tar", path, in.Mode&unix.S_IFMT)
	}
	if err := x.header(h, in); err != nil {
		return err
	}
	if h.Typeflag != tar.TypeReg {
		return nil
	}
	return copyContents(x.ctx, x.w, in, x.buf)
}

// header writes a header with the extended attributes. Hard links repeat them: an unpacker may need them.
func (x *exporter) header(h *tar.Header, in daxfs.Inode) error {
	xs, err := in.Xattrs()
	if err != nil {
		return err
	}
	for _, a := range xs {
		if strings.Contains(a.Name, "=") {
			fmt.Fprintf(x.warn, "daxfs: /%s has the attribute %q, which a tar cannot hold\n", printable(h.Name), a.Name)
			continue
		}
		if h.PAXRecords == nil {
			h.PAXRecords = map[string]string{}
		}
		h.PAXRecords["SCHILY.xattr."+a.Name] = string(a.Value)
	}
	if err := x.w.WriteHeader(h); err != nil {
		return fmt.Errorf("%q: %w", h.Name, err)
	}
	return nil
}
