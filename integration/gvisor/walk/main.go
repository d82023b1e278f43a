// Gvisor-walk lists an image file as gVisor reads it: one line for each name, in the format of package
// listing. It omits extended attributes, which gVisor ignores, and device numbers, which its reader does not return.
//
// It is a module of its own, because no other part of the project uses gVisor's packages.
package main

import (
	"bufio"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"os"
	"path"

	"gvisor.dev/gvisor/pkg/erofs"
)

func main() {
	if len(os.Args) != 2 {
		fmt.Fprintln(os.Stderr, "usage: gvisor-walk IMAGE")
		os.Exit(2)
	}
	if err := list(os.Args[1], os.Stdout); err != nil {
		fmt.Fprintln(os.Stderr, "gvisor-walk:", err)
		os.Exit(1)
	}
}

func list(name string, out io.Writer) error {
	f, err := os.Open(name)
	if err != nil {
		return err
	}
	img, err := erofs.OpenImage(f)
	if err != nil {
		return errors.Join(err, f.Close())
	}
	defer img.Close()
	w := walker{img: img, out: bufio.NewWriter(out), first: map[uint64]string{}}
	if err := w.inode(".", img.RootNid()); err != nil {
		return err
	}
	return w.out.Flush()
}

type walker struct {
	img   *erofs.Image
	out   *bufio.Writer
	first map[uint64]string // the first name of each inode with several
}

func (w *walker) inode(name string, nid uint64) error {
	n, err := w.img.Inode(nid)
	if err != nil {
		return fmt.Errorf("%q: inode %d: %w", name, nid, err)
	}
	fmt.Fprintf(w.out, "%q mode=%06o owner=%d:%d mtime=%d.%09d", name, n.Mode(), n.UID(), n.GID(),
		n.Mtime(), n.MtimeNsec())
	if !n.IsDir() {
		fmt.Fprintf(w.out, " size=%d nlink=%d", n.Size(), n.Nlink())
		if n.Nlink() > 1 {
			if first, ok := w.first[nid]; ok {
				fmt.Fprintf(w.out, " same=%q", first)
			} else {
				w.first[nid] = name
			}
		}
	}
	switch {
	case n.IsSymlink():
		target, err := n.Readlink()
		if err != nil {
			return fmt.Errorf("%q: %w", name, err)
		}
		fmt.Fprintf(w.out, " target=%q", target)
	case n.IsRegular():
		// gVisor maps contents into a sandbox only if they are contiguous.
		if _, err := n.DataOffset(); err != nil {
			return fmt.Errorf("%q: where the contents are: %w", name, err)
		}
		ranges, err := n.DataRanges()
		if err != nil {
			return fmt.Errorf("%q: contents: %w", name, err)
		}
		h := sha256.New()
		for _, r := range ranges {
			h.Write(r.Bytes)
		}
		fmt.Fprintf(w.out, " sha256=%x", h.Sum(nil))
	}
	fmt.Fprintln(w.out)
	if !n.IsDir() {
		return nil
	}
	return n.IterDirents(func(entry string, _ uint8, child uint64) error {
		if entry == "." || entry == ".." {
			return nil
		}
		found, err := n.Lookup(entry)
		if err != nil || found != child {
			return fmt.Errorf("%q: looking up %q leads to inode %d (%v), expected %d", name, entry, found, err, child)
		}
		return w.inode(path.Join(name, entry), child)
	})
}
