package main

import (
	"errors"
	"fmt"
	"io"
	"time"

	"github.com/urfave/cli/v2"
	"golang.org/x/sys/unix"

	"github.com/daxfs/daxfs-snapshotter/daxfs"
)

func init() { register(20, inspectCommand) }

func inspectCommand(e *env) *cli.Command {
	return &cli.Command{
		Name:      "inspect",
		Usage:     "show what an image holds, and what its DAXFS half cannot",
		ArgsUsage: "IMAGE",
		Description: `
Examples:
   daxfs inspect debian.daxfs
   daxfs inspect --json debian.daxfs | jq .leftOutOfDAXFS`,
		Flags:  []cli.Flag{&cli.BoolFlag{Name: "json", Usage: "write JSON"}},
		Action: e.inspect,
	}
}

// maxLeftOut bounds the bytes of the listed names: a crafted image may have very many long ones.
const maxLeftOut = 16 << 20

// inspection is the output of inspect --json. All sizes and offsets are bytes.
type inspection struct {
	Image string `json:"image"`
	Size  int64  `json:"size"`
	UUID  string `json:"uuid"`
	// RootHash is the root hash stored in the image; empty without a digest table.
	RootHash string `json:"rootHash,omitempty"`
	Label    string `json:"label"`
	EROFS    erofs  `json:"erofs"`
	DAXFS    v8     `json:"daxfs"`
	Counts   counts `json:"counts"`
	// DataBytes are the blocks of distinct contents. Huge counts the files of 2 MiB and more, Aligned
	// those of them that start at a multiple of 2 MiB.
	DataBytes int64 `json:"dataBytes"`
	Huge      int   `json:"hugeFiles"`
	Aligned   int   `json:"alignedHugeFiles"`
	// LeftOut lists no more names than maxLeftOut bytes hold; LeftOutNames counts them all.
	LeftOut      []leftOut `json:"leftOutOfDAXFS"`
	LeftOutNames int       `json:"namesLeftOutOfDAXFS"`

	listed int // bytes of LeftOut
}

type erofs struct {
	Bytes    int64  `json:"bytes"`
	Inodes   uint64 `json:"inodes"`
	Root     uint64 `json:"rootNid"`
	Compat   uint64 `json:"featureCompat"`
	Incompat uint64 `json:"featureIncompat"`
	Time     string `json:"time"`
}

type v8 struct {
	Version int    `json:"version"`
	Inodes  uint64 `json:"inodes"`
}

func (e *env) inspect(c *cli.Context) error {
	if err := needArgs(c, "IMAGE"); err != nil {
		return err
	}
	img, err := openImage(c.Args().First())
	if err != nil {
		return err
	}
	defer img.Close()
	r, err := inspect(c, img)
	if err != nil {
		return err
	}
	if c.Bool("json") {
		return writeJSON(e.stdout, r)
	}
	r.print(e.stdout)
	return nil
}

func inspect(c *cli.Context, img *image) (*inspection, error) {
	f, err := img.fs()
	if err != nil {
		return nil, err
	}
	half, err := daxfs.OpenDAXFS(img, img.size)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", img.Name(), err)
	}
	hash := ""
	root, err := daxfs.ReadRootHash(img, img.size)
	switch {
	case err == nil:
		hash = root.String()
	case errors.Is(err, daxfs.ErrNoDigests):
	case errors.Is(err, daxfs.ErrUnsupported): // the image is readable as one without a table
		fmt.Fprintf(c.App.ErrWriter, "daxfs: %s: its root hash is not known: %v\n", printable(img.Name()), err)
	default:
		return nil, fmt.Errorf("%s: %w", img.Name(), err)
	}
	sb := f.Super()
	r := &inspection{
		Image: img.Name(), Size: img.size, UUID: uuid(sb.UUID), RootHash: hash, Label: sb.Label,
		EROFS: erofs{
			Bytes: int64(sb.Blocks) * daxfs.BlockSize, Inodes: sb.Inodes, Root: sb.Root,
			Compat: uint64(sb.Compat), Incompat: uint64(sb.Incompat),
			Time: time.Unix(sb.Time.Sec, int64(sb.Time.Nsec)).UTC().Format(time.RFC3339Nano),
		},
		DAXFS:   v8{Version: 8, Inodes: half.Inodes()}, // the reader refuses every other version
		LeftOut: []leftOut{},
	}
	return r, r.walk(c, f)
}

// walk counts every inode once.
func (r *inspection) walk(c *cli.Context, f *daxfs.FS) error {
	seen := map[uint64]bool{}
	contents := map[int64]bool{}
	err := f.Walk(func(path string, in daxfs.Inode) error {
		if err := c.Context.Err(); err != nil {
			return err
		}
		if path != "." {
			r.Counts.Names++
		}
		if reason := leftOutReason(in.Mode); reason != "" {
			r.LeftOutNames++
			if r.listed <= maxLeftOut {
				r.LeftOut = append(r.LeftOut, leftOut{"/" + path, bytesOf("/" + path), reason})
				r.listed += len(path)
			}
		}
		if seen[in.Nid] {
			return nil
		}
		seen[in.Nid] = true
		r.Counts.Inodes++
		xs, err := in.Xattrs()
		if err != nil {
			return err
		}
		if len(xs) > 0 {
			r.Counts.WithXattrs++
		}
		switch in.Mode & unix.S_IFMT {
		case unix.S_IFDIR:
			r.Counts.Directories++
		case unix.S_IFLNK:
			r.Counts.Symlinks++
		case unix.S_IFREG:
			r.Counts.Files++
			r.Counts.FileBytes += in.Size
			if off, size, ok := in.Data(); ok && size > 0 && !contents[off] {
				contents[off] = true
				r.content(off, size)
			}
		default:
			r.Counts.Others++
		}
		return nil
	})
	if err != nil {
		return fmt.Errorf("%s: %w", r.Image, err)
	}
	return nil
}

func (r *inspection) content(off, size int64) {
	const huge = 2 << 20
	r.DataBytes += (size + daxfs.BlockSize - 1) / daxfs.BlockSize * daxfs.BlockSize
	if size >= huge {
		r.Huge++
		if off%huge == 0 {
			r.Aligned++
		}
	}
}

// leftOutReason returns the reason why the DAXFS half lacks an inode, or "".
func leftOutReason(mode uint32) string {
	switch mode & unix.S_IFMT {
	case unix.S_IFCHR:
		return "character device"
	case unix.S_IFBLK:
		return "block device"
	case unix.S_IFIFO:
		return "fifo"
	case unix.S_IFSOCK:
		return "socket"
	}
	return ""
}

func (r *inspection) print(w io.Writer) {
	fmt.Fprintf(w, "image      %s, %s\n", printable(r.Image), human(r.Size))
	fmt.Fprintf(w, "uuid       %s\n", r.UUID)
	if r.RootHash != "" {
		fmt.Fprintf(w, "root hash  %s\n", r.RootHash)
	}
	if r.Label != "" {
		fmt.Fprintf(w, "label      %s\n", printable(r.Label))
	}
	fmt.Fprintf(w, "erofs      %d inodes, root %d, features %#x/%#x, %s, time %s\n",
		r.EROFS.Inodes, r.EROFS.Root, r.EROFS.Compat, r.EROFS.Incompat, human(r.EROFS.Bytes), r.EROFS.Time)
	fmt.Fprintf(w, "daxfs      version %d, %d inodes\n", r.DAXFS.Version, r.DAXFS.Inodes)
	n := r.Counts
	fmt.Fprintf(w, "inodes     %d with %d names: %d files, %d directories, %d symbolic links, %d others\n",
		n.Inodes, n.Names, n.Files, n.Directories, n.Symlinks, n.Others)
	fmt.Fprintf(w, "contents   %s in files, %s of blocks, %s of everything else\n",
		human(n.FileBytes), human(r.DataBytes), human(r.Size-r.DataBytes))
	if r.Huge > 0 {
		fmt.Fprintf(w, "huge pages %d of %d files of 2 MiB and more can be mapped with them\n", r.Aligned, r.Huge)
	}
	printLosses(w, n.WithXattrs, r.LeftOut, r.LeftOutNames)
}
