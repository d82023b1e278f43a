package layer

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"math"
	"slices"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/daxfs/daxfs-snapshotter/daxfs"
)

// The binary form of a layer:
//
//	magic "DXLY", version byte, source byte,
//	uvarint entries, files, bytes, ignored xattrs, number of changes,
//	the changes,
//	CRC-32C of all that, 4 bytes little endian.
//
// A change is a byte op|hasNode, the path as (uvarint length of the prefix shared with the previous
// path, string), for a link the string LinkTo, and the node: uvarint mode, uid, gid, varint seconds,
// uvarint nanoseconds, uvarint number of xattrs, each as two strings; then by type the string target,
// uvarint rdev, or uvarint size and, if that is not 0, uvarint block number and 32 bytes sum. A string
// is its uvarint length and its bytes.
//
// It holds no contents, only their places in the store.
const (
	binaryMagic   = "DXLY"
	binaryVersion = 2

	hasNode = 0x08

	minHeader = len(binaryMagic) + 2 + 5
	minChange = 3 // op and two lengths
	sumSize   = 4
)

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

// MarshalBinary returns the layer as bytes, about 50 for an entry. Equal layers give equal bytes.
func (l *Layer) MarshalBinary() ([]byte, error) { return l.AppendBinary(nil) }

// AppendBinary appends the bytes of MarshalBinary to b.
func (l *Layer) AppendBinary(b []byte) ([]byte, error) { return l.appendBinary(b, false) }

// DrainBinary is AppendBinary, but frees changes on the way like Drain. If it fails, the layer keeps them.
func (l *Layer) DrainBinary(b []byte) ([]byte, error) {
	b, err := l.appendBinary(b, true)
	if err == nil {
		l.changes = changes{}
	}
	return b, err
}

func (l *Layer) appendBinary(b []byte, forget bool) ([]byte, error) {
	if l.paths > maxMeta {
		return nil, limitError("bytes of paths", maxMeta)
	}
	size := 64
	for _, p := range l.parts {
		size += len(p)
	}
	b = slices.Grow(b, size)
	start := len(b)
	b = append(b, binaryMagic...)
	b = append(b, binaryVersion, byte(l.Source))
	for _, v := range []int64{l.Stats.Entries, l.Stats.Files, l.Stats.Bytes, l.Stats.IgnoredXattrs, int64(l.count)} {
		b = binary.AppendUvarint(b, uint64(v))
	}
	for i, p := range l.parts {
		b = append(b, p...)
		if forget {
			l.parts[i] = nil
		}
	}
	return binary.LittleEndian.AppendUint32(b, crc32.Checksum(b[start:], castagnoli)), nil
}

// appendChange appends a change. last is the path of the previous one.
func appendChange(b []byte, last string, c *Change) []byte {
	op := byte(c.Op)
	if c.Node != nil {
		op |= hasNode
	}
	b = append(b, op)
	shared := sharedPrefix(last, c.Path)
	b = binary.AppendUvarint(b, uint64(shared))
	b = appendString(b, c.Path[shared:])
	if c.Op == OpLink {
		b = appendString(b, c.LinkTo)
	}
	if c.Node != nil {
		b = appendNode(b, c.Node)
	}
	return b
}

func appendNode(b []byte, n *daxfs.Node) []byte {
	b = binary.AppendUvarint(b, uint64(n.Mode))
	b = binary.AppendUvarint(b, uint64(n.UID))
	b = binary.AppendUvarint(b, uint64(n.GID))
	b = binary.AppendVarint(b, n.Mtime.Sec)
	b = binary.AppendUvarint(b, uint64(n.Mtime.Nsec))
	b = binary.AppendUvarint(b, uint64(len(n.Xattrs)))
	for _, x := range n.Xattrs {
		b = appendString(b, x.Name)
		b = appendString(b, string(x.Value))
	}
	switch n.Mode & unix.S_IFMT {
	case unix.S_IFLNK:
		b = appendString(b, n.Target)
	case unix.S_IFCHR, unix.S_IFBLK:
		b = binary.AppendUvarint(b, n.Rdev)
	case unix.S_IFREG:
		b = binary.AppendUvarint(b, uint64(n.Data.Size))
		if n.Data.Size > 0 {
			b = binary.AppendUvarint(b, uint64(n.Data.Off/daxfs.BlockSize))
			b = append(b, n.Data.Sum[:]...)
		}
	}
	return b
}

func appendString(b []byte, s string) []byte {
	return append(binary.AppendUvarint(b, uint64(len(s))), s...)
}

func sharedPrefix(a, b string) int {
	n := min(len(a), len(b))
	for i := range n {
		if a[i] != b[i] {
			return i
		}
	}
	return n
}

// UnmarshalBinary decodes the bytes of MarshalBinary into the layer. It accepts untrusted bytes: it returns
// ErrInvalid for damaged ones and ErrUnsupported for another version. The layer keeps no reference to data.
func (l *Layer) UnmarshalBinary(data []byte) error {
	if len(data) < minHeader+sumSize || string(data[:len(binaryMagic)]) != binaryMagic {
		return fmt.Errorf("stored layer of %d bytes: %w", len(data), invalidf("does not start with %q", binaryMagic))
	}
	if v := data[len(binaryMagic)]; v != binaryVersion {
		return fmt.Errorf("stored layer: %w", unsupportedf("version %d, this program knows %d", v, binaryVersion))
	}
	body := data[:len(data)-sumSize]
	sum := binary.LittleEndian.Uint32(data[len(body):])
	if got := crc32.Checksum(body, castagnoli); got != sum {
		return fmt.Errorf("stored layer: %w", invalidf("checksum is %#x, expected %#x", got, sum))
	}
	d := decoder{rest: body[len(binaryMagic)+1 : len(body) : len(body)], lim: Limits{}.withDefaults()}
	decoded, err := d.layer()
	if err != nil {
		return fmt.Errorf("stored layer at byte %d: %w", len(body)-len(d.rest), err)
	}
	*l = *decoded
	return nil
}

// decoder takes values off the front of rest. The first error is kept; later values are zero.
type decoder struct {
	rest []byte
	err  error
	lim  Limits
	own  bool // rest is trusted: it was checked before, or this process made it
}

var errShort = errors.New("ends early")

func (d *decoder) fail(err error) {
	if d.err == nil {
		d.err = fmt.Errorf("%w: %w", ErrInvalid, err)
	}
}

func (d *decoder) bytes(n uint64) []byte {
	if n > uint64(len(d.rest)) {
		d.fail(errShort)
	}
	if d.err != nil {
		return nil
	}
	b := d.rest[:n]
	d.rest = d.rest[n:]
	return b
}

// uint takes an unsigned number up to limit.
func (d *decoder) uint(limit uint64) uint64 {
	v, n := binary.Uvarint(d.rest)
	if n <= 0 {
		d.fail(errShort)
	} else if v > limit && !d.own {
		d.fail(fmt.Errorf("number %d, expected at most %d", v, limit))
	}
	if d.err != nil {
		return 0
	}
	d.rest = d.rest[n:]
	return v
}

func (d *decoder) int() int64 {
	v, n := binary.Varint(d.rest)
	if n <= 0 {
		d.fail(errShort)
	}
	if d.err != nil {
		return 0
	}
	d.rest = d.rest[n:]
	return v
}

func (d *decoder) string(limit uint64) string { return string(d.bytes(d.uint(limit))) }

func (d *decoder) layer() (*Layer, error) {
	l := &Layer{}
	if src := d.bytes(1); len(src) == 1 {
		l.Source = Source(src[0])
	}
	if l.Source > FromDirectory {
		d.fail(fmt.Errorf("source %d, expected %d or %d", l.Source, FromTarStream, FromDirectory))
	}
	for _, p := range []*int64{&l.Stats.Entries, &l.Stats.Files, &l.Stats.Bytes, &l.Stats.IgnoredXattrs} {
		*p = int64(d.uint(math.MaxInt64))
	}
	// Each change takes at least minChange of the remaining bytes.
	count := d.uint(uint64(len(d.rest)) / minChange)
	part := d.rest // from the first change that is not yet in a part
	var node daxfs.Node
	for range count {
		node = daxfs.Node{}
		c := d.change(l.last, &node)
		if d.err == nil {
			d.check(&c)
		}
		// Paths omit the prefix they share with the previous one, so they may unfold to much more than data.
		if l.paths+int64(len(c.Path)) > maxMeta {
			d.fail(fmt.Errorf("more than %d bytes of paths", maxMeta))
		}
		if d.err != nil {
			return nil, d.err
		}
		l.note(&c)
		if n := len(part) - len(d.rest); n >= partSize {
			l.parts, part = append(l.parts, bytes.Clone(part[:n])), d.rest
		}
	}
	if len(d.rest) > 0 {
		d.fail(fmt.Errorf("%d bytes behind the last change", len(d.rest)))
	}
	if len(part) > 0 {
		l.parts = append(l.parts, bytes.Clone(part))
	}
	return l, d.err
}

// change takes a change. Its node, if any, is stored in node.
func (d *decoder) change(last string, node *daxfs.Node) (c Change) {
	op := d.bytes(1)
	if d.err != nil {
		return c
	}
	c.Op = Op(op[0] &^ hasNode)
	shared := d.uint(uint64(len(last)))
	if d.err != nil {
		return c
	}
	c.Path = last[:shared] // costs no memory if no suffix follows
	if rest := d.string(maxPath); rest != "" {
		c.Path += rest
	}
	if c.Op == OpLink {
		c.LinkTo = d.string(maxPath)
	}
	if op[0]&hasNode != 0 {
		c.Node = node
		d.node(c.Node)
	}
	return c
}

// check refuses changes that no layer holds.
func (d *decoder) check(c *Change) {
	kind := uint32(0)
	if c.Node != nil {
		kind = c.Node.Mode & unix.S_IFMT
	}
	switch {
	case c.Op < OpAdd || c.Op > OpOpaque:
		d.fail(fmt.Errorf("operation %#x", c.Op))
	case (c.Op == OpAdd) != (kind != 0), c.Node != nil && c.Op != OpAdd && c.Op != OpLink:
		d.fail(fmt.Errorf("%v %q with attributes of type %#o", c.Op, c.Path, kind))
	case c.Path == "":
		if c.Op != OpOpaque && kind != unix.S_IFDIR {
			d.fail(fmt.Errorf("%v of the root", c.Op))
		}
	case strings.IndexByte(c.Path, 0) >= 0 || cleanName(c.Path) != c.Path:
		d.fail(fmt.Errorf("path %q is not clean", c.Path))
	default:
		if err := d.lim.checkPath(c.Path); err != nil {
			d.fail(err)
		}
	}
}

func (d *decoder) node(n *daxfs.Node) {
	n.Mode = uint32(d.uint(math.MaxUint16))
	n.UID = uint32(d.uint(math.MaxUint32))
	n.GID = uint32(d.uint(math.MaxUint32))
	n.Mtime.Sec = d.int()
	n.Mtime.Nsec = uint32(d.uint(999_999_999))
	lastName := ""
	for range d.uint(uint64(len(d.rest)) / 2) {
		x := daxfs.Xattr{Name: d.string(maxXattrNm)}
		x.Value = append([]byte{}, d.bytes(d.uint(maxXattr))...)
		if d.err != nil {
			return
		}
		if !d.own && (x.Name <= lastName || strings.IndexByte(x.Name, 0) >= 0) {
			d.fail(fmt.Errorf("xattr %q behind %q", x.Name, lastName))
			return
		}
		lastName = x.Name
		n.Xattrs = append(n.Xattrs, x)
	}
	switch n.Mode & unix.S_IFMT {
	case 0, unix.S_IFDIR, unix.S_IFIFO, unix.S_IFSOCK:
	case unix.S_IFLNK:
		n.Target = d.string(maxTarget)
		if !d.own && (n.Target == "" || strings.IndexByte(n.Target, 0) >= 0) {
			d.fail(fmt.Errorf("symbolic link to %q", n.Target))
		}
	case unix.S_IFCHR, unix.S_IFBLK:
		n.Rdev = d.uint(math.MaxUint64)
	case unix.S_IFREG:
		n.Data.Size = int64(d.uint(math.MaxInt64))
		if n.Data.Size > 0 {
			n.Data.Off = daxfs.BlockSize * int64(d.uint(uint64(math.MaxInt64-n.Data.Size)/daxfs.BlockSize))
			copy(n.Data.Sum[:], d.bytes(uint64(len(n.Data.Sum))))
		}
	default:
		if !d.own {
			d.fail(fmt.Errorf("mode %#o", n.Mode))
		}
	}
}
