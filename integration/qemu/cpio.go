package qemu

import (
	"fmt"
	"io"
	"path"
	"sort"
)

// archive is an initramfs: files by path without a leading slash, written in the "newc" format of
// cpio. The kernel's Documentation/driver-api/early-userspace/buffer-format.rst describes the format.
type archive map[string]archiveFile

type archiveFile struct {
	mode uint32 // type and permissions; a directory has no body, a symbolic link has its target
	body []byte
}

const (
	typeDir  = 0o040000
	typeFile = 0o100000
	typeLink = 0o120000
)

// add adds a file and the directories above it.
func (a archive) add(name string, mode uint32, body []byte) {
	for d := path.Dir(name); d != "."; d = path.Dir(d) {
		a[d] = archiveFile{mode: typeDir | 0o755}
	}
	a[name] = archiveFile{mode: mode, body: body}
}

// write writes the archive, parents before children.
func (a archive) write(w io.Writer) error {
	names := make([]string, 0, len(a))
	for n := range a {
		names = append(names, n)
	}
	sort.Strings(names)
	for i, n := range names {
		if err := writeMember(w, i+1, n, a[n]); err != nil {
			return err
		}
	}
	return writeMember(w, 0, "TRAILER!!!", archiveFile{})
}

func writeMember(w io.Writer, ino int, name string, f archiveFile) error {
	// magic, ino, mode, uid, gid, nlink, mtime, filesize, device numbers (4), length of the name with its NUL, check
	_, err := fmt.Fprintf(w, "070701%08X%08X%08X%08X%08X%08X%08X%08X%08X%08X%08X%08X%08X%s\x00",
		ino, f.mode, 0, 0, 1, 0, len(f.body), 0, 0, 0, 0, len(name)+1, 0, name)
	if err != nil {
		return err
	}
	const header = 110
	if err := pad(w, header+len(name)+1); err != nil {
		return err
	}
	if _, err := w.Write(f.body); err != nil {
		return err
	}
	return pad(w, len(f.body))
}

// pad pads to a multiple of four bytes.
func pad(w io.Writer, n int) error {
	_, err := w.Write(make([]byte, -n&3))
	return err
}
