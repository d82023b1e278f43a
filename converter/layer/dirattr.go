package layer

import (
	"bytes"
	"errors"
	"math"
	"os"
	"slices"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/daxfs/daxfs-snapshotter/daxfs"
)

// overlayMarks are the marks of overlayfs in an inode's extended attributes.
type overlayMarks struct {
	opaque    bool // hides the lower directory
	whiteouts bool // files of the directory may be whiteouts in xattr form
	whiteout  bool
	redirect  bool
	metacopy  bool
}

// attributes returns the attributes of the inode behind f, which may be an O_PATH descriptor.
func (d *dirReader) attributes(f *os.File, st *unix.Stat_t) (*daxfs.Node, overlayMarks, error) {
	n := d.node()
	n.Mode, n.UID, n.GID = st.Mode, st.Uid, st.Gid
	n.Mtime = daxfs.Time{Sec: st.Mtim.Sec, Nsec: uint32(st.Mtim.Nsec)}
	marks, err := d.xattrs(f, n)
	return n, marks, err
}

// xattrs reads all extended attributes of an inode, or returns an error.
func (d *dirReader) xattrs(f *os.File, n *daxfs.Node) (marks overlayMarks, err error) {
	self := selfPath(f)
	d.list, err = grow(d.list, func(b []byte) (int, error) { return unix.Listxattr(self, b) })
	if errors.Is(err, unix.ENOTSUP) {
		return marks, nil
	}
	if err != nil {
		return marks, os.NewSyscallError("listxattr", err)
	}
	total := int64(0)
	for list := d.list; len(list) > 0; {
		raw, rest, _ := bytes.Cut(list, []byte{0})
		list = rest
		name := string(raw)
		d.value, err = grow(d.value, func(b []byte) (int, error) { return unix.Getxattr(self, name, b) })
		if err != nil {
			return marks, os.NewSyscallError("getxattr "+name, err)
		}
		if isOverlayXattr(name) {
			private := false
			if d.upper {
				name, private = overlayXattr(name, d.value, &marks)
			}
			if private || !d.upper {
				d.layer.Stats.OverlayXattrs++
			}
			if private {
				continue
			}
		}
		if !settable(name) && !strings.HasPrefix(name, "trusted.") {
			d.layer.Stats.IgnoredXattrs++
			continue
		}
		if len(d.value) > maxXattr {
			return marks, limitError("bytes of an xattr", maxXattr)
		}
		total += int64(len(name) + len(d.value))
		if total > d.lim.MaxXattrBytes {
			return marks, limitError("bytes of xattrs of one entry", d.lim.MaxXattrBytes)
		}
		n.Xattrs = append(n.Xattrs, daxfs.Xattr{Name: name, Value: bytes.Clone(d.value)})
	}
	return marks, d.sealXattrs(n, total)
}

// grow calls read with increasing buffers until the result fits, and returns the result. It reuses b.
func grow(b []byte, read func([]byte) (int, error)) ([]byte, error) {
	b = b[:cap(b)]
	for {
		if len(b) == 0 {
			b = make([]byte, 1024)
		}
		n, err := read(b)
		if errors.Is(err, unix.ERANGE) && len(b) < math.MaxUint16+1 {
			b = make([]byte, 4*len(b))
			continue
		}
		if err != nil {
			return b[:0], err
		}
		return b[:n], nil
	}
}

// overlayPrefixes are the name prefixes of attributes that overlayfs claims.
var overlayPrefixes = []string{"trusted.overlay.", "user.overlay."}

func isOverlayXattr(name string) bool {
	return slices.ContainsFunc(overlayPrefixes, func(p string) bool { return strings.HasPrefix(name, p) })
}

// overlayXattr examines one attribute. If overlayfs uses it, overlayXattr records its mark and returns true.
// If overlayfs escaped it, because it belongs to a nested overlay, overlayXattr returns its original name.
func overlayXattr(name string, value []byte, marks *overlayMarks) (string, bool) {
	for _, prefix := range overlayPrefixes {
		key, ok := strings.CutPrefix(name, prefix)
		if !ok {
			continue
		}
		if inner, escaped := strings.CutPrefix(key, "overlay."); escaped {
			return prefix + inner, false
		}
		switch key {
		case "opaque":
			marks.opaque = marks.opaque || string(value) == "y"
			marks.whiteouts = marks.whiteouts || string(value) == "x"
		case "whiteout":
			marks.whiteout = true
		case "redirect":
			marks.redirect = true
		case "metacopy":
			marks.metacopy = true
		}
		return "", true
	}
	return name, false
}
