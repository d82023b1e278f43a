package main

import (
	"bufio"
	"encoding/base64"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"path"
	"slices"
	"strings"
	"time"

	"github.com/urfave/cli/v2"
	"golang.org/x/sys/unix"

	"github.com/daxfs/daxfs-snapshotter/daxfs"
)

func init() { register(40, lsCommand) }

func lsCommand(e *env) *cli.Command {
	return &cli.Command{
		Name:      "ls",
		Usage:     "list files of an image",
		ArgsUsage: "IMAGE [PATH]",
		Description: `
With -l: type and permissions, links, owner, size (device number of a device), time of modification
(UTC), name. Names that a terminal cannot show are quoted. A symbolic link at the end of PATH is
followed if it leads to a directory; with -l and --json only if a / follows it.

Examples:
   daxfs ls debian.daxfs /etc
   daxfs ls -lRh debian.daxfs
   daxfs ls --json -R debian.daxfs | jq -r 'select(.size > 10000000) | .path'`,
		Flags: []cli.Flag{
			&cli.BoolFlag{Name: "l", Usage: "show attributes"},
			&cli.BoolFlag{Name: "human-readable", Usage: "with -l, write sizes as 4KiB; -h beside -l does so, too"},
			&cli.BoolFlag{Name: "R", Usage: "list directories below, too"},
			&cli.BoolFlag{Name: "json", Usage: "write a line of JSON for each name"},
		},
		UseShortOptionHandling: true,
		Action:                 e.ls,
	}
}

// humanSizes turns the -h of "ls -lh" into --human-readable. Everywhere else -h asks for help, and the
// library handles it before the command.
func humanSizes(args []string) []string {
	short := func(a string) bool { return len(a) > 1 && a[0] == '-' && strings.Trim(a[1:], "lRh") == "" }
	end := slices.Index(args, "--")
	if end < 0 {
		end = len(args)
	}
	if end < 2 || args[1] != "ls" {
		return args
	}
	flags := args[2:end]
	if !slices.ContainsFunc(flags, func(a string) bool { return short(a) && strings.Contains(a, "l") }) ||
		!slices.ContainsFunc(flags, func(a string) bool { return short(a) && strings.Contains(a, "h") }) {
		return args
	}
	out := []string{args[0], args[1], "--human-readable"}
	for _, a := range flags {
		if short(a) {
			a = strings.ReplaceAll(a, "h", "")
		}
		if a != "-" {
			out = append(out, a)
		}
	}
	return append(out, args[end:]...)
}

// entry is a line of ls --json. Values of xattrs are base64.
type entry struct {
	Path   string            `json:"path"`
	Bytes  []byte            `json:"pathBytes,omitempty"`
	Type   string            `json:"type"`
	Inode  uint64            `json:"inode"`
	Mode   string            `json:"mode"`
	Nlink  uint32            `json:"nlink"`
	UID    uint32            `json:"uid"`
	GID    uint32            `json:"gid"`
	Size   int64             `json:"size"`
	Mtime  string            `json:"mtime"`
	Rdev   string            `json:"rdev,omitempty"`
	Target string            `json:"target,omitempty"`
	Raw    []byte            `json:"targetBytes,omitempty"`
	Offset int64             `json:"offset"`
	Xattrs map[string]string `json:"xattrs,omitempty"`
}

func (e *env) ls(c *cli.Context) error {
	if err := needArgs(c, "IMAGE", "[PATH]"); err != nil {
		return err
	}
	img, f, err := openImageFS(c.Args().First())
	if err != nil {
		return err
	}
	defer img.Close()
	w := bufio.NewWriter(e.stdout)
	l := lister{ctx: c, fs: f, w: w}
	if err := l.list(c.Args().Get(1)); err != nil {
		w.Flush() // lines written so far are valid
		return fmt.Errorf("%s: %w", img.Name(), err)
	}
	return w.Flush()
}

type lister struct {
	ctx *cli.Context
	fs  *daxfs.FS
	w   *bufio.Writer
}

func (l *lister) list(name string) error {
	p := inside(name)
	in, err := l.fs.Lookup(p, strings.HasSuffix(name, "/"))
	if err != nil {
		return err
	}
	if in.IsSymlink() && !l.ctx.Bool("l") && !l.ctx.Bool("json") {
		if to, err := l.fs.Lookup(p, true); err == nil && to.IsDir() {
			in = to
		}
	}
	if !in.IsDir() {
		return l.show(p, path.Base(p), in)
	}
	return l.dir(p, in, map[uint64]bool{})
}

// dir lists a directory and those below it. seen stops endless recursion in a hostile image.
func (l *lister) dir(p string, dir daxfs.Inode, seen map[uint64]bool) error {
	if seen[dir.Nid] {
		return fmt.Errorf("%q: %w: the directory has two names", p, daxfs.ErrCorrupt)
	}
	seen[dir.Nid] = true
	type sub struct {
		path string
		in   daxfs.Inode
	}
	var subs []sub
	var inner error
	err := dir.Entries(0, func(d daxfs.Dirent) bool {
		if inner = l.ctx.Context.Err(); inner != nil {
			return false
		}
		var in daxfs.Inode
		if in, inner = l.fs.Inode(d.Nid); inner != nil {
			return false
		}
		full := path.Join(p, d.Name)
		inner = l.show(full, d.Name, in)
		if in.IsDir() {
			subs = append(subs, sub{full, in})
		}
		return inner == nil
	})
	if err != nil {
		return err
	}
	if inner != nil || !l.ctx.Bool("R") {
		return inner
	}
	for _, s := range subs {
		if !l.ctx.Bool("json") {
			fmt.Fprintf(l.w, "\n/%s:\n", printable(s.path))
		}
		if err := l.dir(s.path, s.in, seen); err != nil {
			return err
		}
	}
	return nil
}

func (l *lister) show(full, name string, in daxfs.Inode) error {
	if l.ctx.Bool("json") {
		return l.showJSON(full, in)
	}
	if !l.ctx.Bool("l") {
		_, err := fmt.Fprintln(l.w, printable(name))
		return err
	}
	what := fmt.Sprint(in.Size)
	if l.ctx.Bool("human-readable") {
		what = human(in.Size)
	}
	if m := in.Mode & unix.S_IFMT; m == unix.S_IFCHR || m == unix.S_IFBLK {
		what = device(in.Rdev)
	}
	fmt.Fprintf(l.w, "%s %3d %5d %5d %10s %s %s", modeString(in.Mode), in.Nlink, in.UID, in.GID, what,
		mtime(in).Format("2006-01-02 15:04:05.000000000"), printable(name))
	if in.IsSymlink() {
		target, err := in.Target()
		if err != nil {
			return err
		}
		fmt.Fprintf(l.w, " -> %s", printable(target))
	}
	_, err := fmt.Fprintln(l.w)
	return err
}

func (l *lister) showJSON(full string, in daxfs.Inode) error {
	v := entry{
		Path: "/" + full, Bytes: bytesOf("/" + full), Type: typeName(in.Mode), Inode: in.Nid,
		Mode: fmt.Sprintf("%04o", in.Mode&0o7777), Nlink: in.Nlink,
		UID: in.UID, GID: in.GID, Size: in.Size, Mtime: mtime(in).Format(time.RFC3339Nano), Offset: in.Off,
	}
	switch in.Mode & unix.S_IFMT {
	case unix.S_IFCHR, unix.S_IFBLK:
		v.Rdev = device(in.Rdev)
	case unix.S_IFLNK:
		target, err := in.Target()
		if err != nil {
			return err
		}
		v.Target, v.Raw = target, bytesOf(target)
	}
	xs, err := in.Xattrs()
	if err != nil {
		return err
	}
	for _, x := range xs {
		if v.Xattrs == nil {
			v.Xattrs = map[string]string{}
		}
		v.Xattrs[x.Name] = base64.StdEncoding.EncodeToString(x.Value)
	}
	return writeJSONLine(l.w, v)
}

func mtime(in daxfs.Inode) time.Time { return time.Unix(in.Mtime.Sec, int64(in.Mtime.Nsec)).UTC() }

func device(rdev uint64) string { return fmt.Sprintf("%d,%d", unix.Major(rdev), unix.Minor(rdev)) }

func typeName(mode uint32) string {
	switch mode & unix.S_IFMT {
	case unix.S_IFREG:
		return "file"
	case unix.S_IFDIR:
		return "directory"
	case unix.S_IFLNK:
		return "symlink"
	case 0:
		return "unknown"
	}
	return leftOutReason(mode)
}

// modeString formats the mode as ls -l does.
func modeString(mode uint32) string {
	b := []byte("?rwxrwxrwx")
	switch mode & unix.S_IFMT {
	case unix.S_IFREG:
		b[0] = '-'
	case unix.S_IFDIR:
		b[0] = 'd'
	case unix.S_IFLNK:
		b[0] = 'l'
	case unix.S_IFCHR:
		b[0] = 'c'
	case unix.S_IFBLK:
		b[0] = 'b'
	case unix.S_IFIFO:
		b[0] = 'p'
	case unix.S_IFSOCK:
		b[0] = 's'
	}
	for i := range 9 {
		if mode&(1<<(8-i)) == 0 {
			b[i+1] = '-'
		}
	}
	for _, s := range []struct {
		bit      uint32
		at       int
		with, no byte
	}{{unix.S_ISUID, 3, 's', 'S'}, {unix.S_ISGID, 6, 's', 'S'}, {unix.S_ISVTX, 9, 't', 'T'}} {
		if mode&s.bit != 0 {
			if b[s.at] == 'x' {
				b[s.at] = s.with
			} else {
				b[s.at] = s.no
			}
		}
	}
	return string(b)
}

func init() { register(50, catCommand) }

func catCommand(e *env) *cli.Command {
	return &cli.Command{
		Name:      "cat",
		Usage:     "write the contents of a file of an image to standard output",
		ArgsUsage: "IMAGE PATH",
		Description: `
Symbolic links are followed inside of the image.

Example:
   daxfs cat debian.daxfs /etc/os-release`,
		Action: e.cat,
	}
}

func (e *env) cat(c *cli.Context) error {
	if err := needArgs(c, "IMAGE", "PATH"); err != nil {
		return err
	}
	img, f, err := openImageFS(c.Args().First())
	if err != nil {
		return err
	}
	defer img.Close()
	in, err := f.Lookup(inside(c.Args().Get(1)), true)
	if err != nil {
		return fmt.Errorf("%s: %w", img.Name(), err)
	}
	if !in.IsRegular() {
		return fmt.Errorf("%s: %w", img.Name(), &fs.PathError{
			Op: "cat", Path: c.Args().Get(1),
			Err: fmt.Errorf("is a %s, expected a file", typeName(in.Mode)),
		})
	}
	return copyContents(c, e.stdout, in, make([]byte, min(copyBuffer, in.Size)))
}

// copyBuffer is the size in bytes of the pieces in which contents are copied.
const copyBuffer = 1 << 20

// copyContents writes a regular file in pieces of len(buf), and checks for an interruption between them.
func copyContents(c *cli.Context, w io.Writer, in daxfs.Inode, buf []byte) error {
	for off := int64(0); off < in.Size; {
		if err := c.Context.Err(); err != nil {
			return err
		}
		n, err := in.ReadAt(buf[:min(int64(len(buf)), in.Size-off)], off)
		if err != nil && !errors.Is(err, io.EOF) {
			return err
		}
		if n == 0 {
			return io.ErrUnexpectedEOF
		}
		if _, err := w.Write(buf[:n]); err != nil {
			return err
		}
		off += int64(n)
	}
	return nil
}
