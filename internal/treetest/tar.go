package treetest

import (
	"archive/tar"
	"bytes"
	"fmt"
	"time"
)

// File is one entry of a layer to make.
type File struct {
	tar.Header
	Body string
}

// Base is the default time of entries.
var Base = time.Unix(1_600_000_000, 123_456_789)

// Dir describes a directory with mode 0755.
func Dir(name string) File { return file(tar.TypeDir, name, 0o755) }

// Reg describes a regular file with mode 0644.
func Reg(name, body string) File {
	f := file(tar.TypeReg, name, 0o644)
	f.Body, f.Size = body, int64(len(body))
	return f
}

// Sym describes a symbolic link.
func Sym(name, target string) File {
	f := file(tar.TypeSymlink, name, 0o777)
	f.Linkname = target
	return f
}

// Hard describes a hard link with mode 0644.
func Hard(name, target string) File {
	f := file(tar.TypeLink, name, 0o644)
	f.Linkname = target
	return f
}

// Special describes a device (tar.TypeChar, tar.TypeBlock) or a fifo.
func Special(typ byte, name string, major, minor int64) File {
	f := file(typ, name, 0o600)
	f.Devmajor, f.Devminor = major, minor
	return f
}

func file(typ byte, name string, mode int64) File {
	return File{Header: tar.Header{Typeflag: typ, Name: name, Mode: mode, ModTime: Base, Format: tar.FormatPAX}}
}

// Perm returns f with other mode bits.
func (f File) Perm(mode int64) File { f.Mode = mode; return f }

// Own returns f with another owner.
func (f File) Own(uid, gid int) File { f.Uid, f.Gid = uid, gid; return f }

// At returns f with another modification time.
func (f File) At(t time.Time) File { f.ModTime = t; return f }

// X returns f with one more extended attribute.
func (f File) X(name, value string) File {
	records := map[string]string{"SCHILY.xattr." + name: value}
	for k, v := range f.PAXRecords {
		records[k] = v
	}
	f.PAXRecords = records
	return f
}

// PAXRecord returns a record of an extended header, even one that archive/tar refuses to write.
func PAXRecord(key, value string) string {
	n := len(key) + len(value) + 3
	for n != len(fmt.Sprint(n))+len(key)+len(value)+3 {
		n = len(fmt.Sprint(n)) + len(key) + len(value) + 3
	}
	return fmt.Sprintf("%d %s=%s\n", n, key, value)
}

// SetChecksum corrects the checksum of a header: the first 512 bytes of h.
func SetChecksum(h []byte) {
	copy(h[148:156], "        ")
	sum := 0
	for _, c := range h[:512] {
		sum += int(c)
	}
	copy(h[148:156], fmt.Sprintf("%06o\x00 ", sum))
}

// Tar returns a tar of the files in the given order. It panics if archive/tar cannot write one.
func Tar(files ...File) []byte {
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	for _, f := range files {
		h := f.Header
		if err := w.WriteHeader(&h); err != nil {
			panic(fmt.Sprintf("tar entry %q: %v", f.Name, err))
		}
		if _, err := w.Write([]byte(f.Body)); err != nil {
			panic(fmt.Sprintf("tar entry %q: %v", f.Name, err))
		}
	}
	if err := w.Close(); err != nil {
		panic(err)
	}
	return b.Bytes()
}
