package layer

import (
	"archive/tar"
	"context"
	"errors"
	"fmt"
	"io"
	"math"
	"path"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/daxfs/daxfs-snapshotter/daxfs"
)

const (
	whiteoutPrefix = ".wh."
	opaqueMarker   = ".wh..wh..opq"
	xattrRecord    = "SCHILY.xattr."
)

// IsWhiteout reports whether a file name is a whiteout of the image specification.
func IsWhiteout(base string) bool { return strings.HasPrefix(base, whiteoutPrefix) }

// onlyReader hides a Seek method: skipped contents must be read, or a hash of the stream would miss them.
type onlyReader struct{ io.Reader }

// FromTar reads an uncompressed tar stream up to its end marker, puts the contents of every regular
// file into s, and returns the changes. Entries have the meaning that containerd's archive.Apply gives
// them; tree.Merge decides what depends on lower layers.
//
// Unlike containerd it accepts sparse files in the old GNU format. It refuses three inputs that containerd
// accepts: owners of more than 32 bits, which containerd truncates; an xattr of 65,536 bytes, which no
// image can hold; and empty capabilities, with which the kernel executes nothing. lim sets further limits.
//
// It reads headers of 512 bytes, so r should be buffered. The caller reads the rest after the end
// marker, for example to verify a digest. On error the caller discards the contents already in s.
// Errors of r and s are wrapped.
func FromTar(ctx context.Context, r io.Reader, s Store, lim Limits) (*Layer, error) {
	t := tarReader{
		builder: newBuilder(FromTarStream, lim),
		tar:     tar.NewReader(onlyReader{r}),
		store:   s,
	}
	last := ""
	for {
		if err := ctx.Err(); err != nil {
			return nil, err
		}
		hdr, err := t.tar.Next()
		if errors.Is(err, io.EOF) {
			return t.layer, nil
		}
		if err != nil {
			if errors.Is(err, tar.ErrHeader) || errors.Is(err, tar.ErrFieldTooLong) {
				err = fmt.Errorf("%w: %w", ErrInvalid, err)
			}
			return nil, &EntryError{Entry: last, After: true, Err: err}
		}
		if err := t.entry(); err != nil {
			return nil, entryError(hdr.Name, err)
		}
		if err := t.header(ctx, hdr); err != nil {
			return nil, entryError(hdr.Name, err)
		}
		last = hdr.Name
	}
}

type tarReader struct {
	*builder
	tar   *tar.Reader
	store Store
}

// header turns one tar entry into a change.
func (t *tarReader) header(ctx context.Context, hdr *tar.Header) error {
	if hdr.Typeflag == tar.TypeXGlobalHeader && hdr.PAXRecords == nil {
		// A record is malformed. The tar reader reports no error and takes records in random order up to the
		// bad one, so the name may or may not be that of a record.
		return nil
	}
	name := cleanName(hdr.Name)
	if name == "" {
		// containerd ignores "./" entries: they do not change the root directory.
		return nil
	}
	dir, base := path.Split(name)
	if IsWhiteout(base) {
		return t.whiteout(dir, base)
	}
	if err := t.lim.checkPath(name); err != nil {
		return err
	}
	if hdr.Typeflag == tar.TypeXGlobalHeader {
		// Containerd ignores the records, but removes what is at the name, as for any entry.
		return t.add(Change{Op: OpRemove, Path: name})
	}
	c := Change{Op: OpAdd, Path: name, Node: t.node()}
	if err := t.attributes(hdr, c.Node); err != nil {
		return err
	}
	if err := t.contents(ctx, hdr, &c); err != nil {
		return err
	}
	return t.add(c)
}

// whiteout handles the ".wh." names, for entries of every type. Limits apply to the hidden path: the
// whiteout of a name of 255 bytes has a name of 259.
func (t *tarReader) whiteout(dir, base string) error {
	c := Change{Op: OpOpaque, Path: strings.TrimSuffix(dir, "/")}
	if base != opaqueMarker {
		hidden := base[len(whiteoutPrefix):]
		if hidden == "" || hidden == "." || hidden == ".." {
			return invalidf("whiteout of %q", hidden)
		}
		c = Change{Op: OpRemove, Path: dir + hidden}
	}
	if err := t.lim.checkPath(c.Path); err != nil {
		return err
	}
	return t.add(c)
}

// attributes fills in the attributes that do not depend on the type.
func (t *tarReader) attributes(hdr *tar.Header, n *daxfs.Node) error {
	n.Mode = uint32(hdr.Mode & 0o7777)
	if !isID(hdr.Uid) || !isID(hdr.Gid) {
		return invalidf("owner %d:%d does not fit 32 bits", hdr.Uid, hdr.Gid)
	}
	n.UID, n.GID = uint32(hdr.Uid), uint32(hdr.Gid)
	n.Mtime = boundTime(hdr.ModTime)
	return t.xattrs(hdr, n)
}

// isID reports whether an id of a header, signed or unsigned, fits the 32 bits of chown(2). Containerd
// truncates longer ids, which turns 2^32 into root.
func isID(id int) bool { return id >= math.MinInt32 && id <= math.MaxUint32 }

// contents fills in the fields that depend on the type.
func (t *tarReader) contents(ctx context.Context, hdr *tar.Header, c *Change) error {
	n := c.Node
	switch hdr.Typeflag {
	case tar.TypeDir:
		n.Mode |= unix.S_IFDIR
	case tar.TypeReg, tar.TypeGNUSparse: // the reader turns TypeRegA of old archives into TypeReg
		n.Mode |= unix.S_IFREG
		if err := t.content(hdr.Size); err != nil {
			return err
		}
		if hdr.Size == 0 {
			return nil
		}
		data, err := t.store.Put(ctx, hdr.Size, t.tar)
		if err != nil {
			return err
		}
		n.Data = data
	case tar.TypeSymlink:
		n.Mode = unix.S_IFLNK | 0o777
		if err := checkTarget(hdr.Linkname); err != nil {
			return err
		}
		n.Target = hdr.Linkname
		return t.keep(len(n.Target))
	case tar.TypeLink:
		c.Op = OpLink
		if len(hdr.Linkname) > maxPath {
			return limitError("bytes of a link target", maxPath)
		}
		c.LinkTo = hdr.Linkname
	case tar.TypeChar, tar.TypeBlock, tar.TypeFifo:
		if hdr.Devmajor < 0 || hdr.Devmajor > math.MaxUint32 || hdr.Devminor < 0 || hdr.Devminor > math.MaxUint32 {
			return invalidf("device number %d:%d is out of range", hdr.Devmajor, hdr.Devminor)
		}
		switch hdr.Typeflag {
		case tar.TypeChar:
			n.Mode |= unix.S_IFCHR
		case tar.TypeBlock:
			n.Mode |= unix.S_IFBLK
		default:
			n.Mode |= unix.S_IFIFO
			return nil
		}
		// mknod(2) keeps the 12 low bits of the major and the 20 low bits of the minor number.
		n.Rdev = unix.Mkdev(uint32(hdr.Devmajor), uint32(hdr.Devminor)) & math.MaxUint32
	default:
		return unsupportedf("tar entry of type %q", hdr.Typeflag)
	}
	return nil
}

func checkTarget(target string) error {
	if target == "" {
		return invalidf("symbolic link without a target")
	}
	if len(target) > maxTarget {
		return limitError("bytes of a symbolic link", maxTarget)
	}
	return nil
}

// cleanName returns the name of an entry relative to the root. Leading ".." and "/" stay at the root.
// The usual forms ("a/b", "./a/b", "a/") cost no memory.
func cleanName(name string) string {
	short := strings.TrimSuffix(strings.TrimPrefix(name, "./"), "/")
	start := 0
	for i := 0; i <= len(short); i++ {
		if i < len(short) && short[i] != '/' {
			continue
		}
		if e := short[start:i]; e == "" || e == "." || e == ".." {
			return path.Clean("/" + name)[1:]
		}
		start = i + 1
	}
	return short
}

// firstTime and lastTime bound the times that containerd accepts; lastTime is the limit of int64 nanoseconds.
var firstTime, lastTime = time.Unix(0, 0), time.Unix(0, math.MaxInt64)

// boundTime replaces times before 1970 and after 2262 with 1970, like containerd. Seconds near 2^63
// overflow time.Time, which counts from year 1, to times before 1970.
func boundTime(t time.Time) daxfs.Time {
	if t.Before(firstTime) || t.After(lastTime) {
		return daxfs.Time{}
	}
	return daxfs.Time{Sec: t.Unix(), Nsec: uint32(t.Nanosecond())}
}
