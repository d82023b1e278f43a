package blob

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"io"

	"github.com/klauspost/compress/gzip"
)

// errTrailing reports bytes behind compressed data that are not provably worthless.
var errTrailing = errors.New("other bytes behind the compressed data")

// gzipMembers reads the members of a gzip file, and the rest, like gzip(1): zeros are padding from
// tapes and block devices. Go's decompressor refuses them, and so does containerd.
type gzipMembers struct {
	in *bufio.Reader
	z  *gzip.Reader
}

func newGzipMembers(r io.Reader) (*gzipMembers, error) {
	// The decompressor has a fast path for bufio.Reader. It stops reading right after a member.
	in := bufio.NewReaderSize(r, 64<<10)
	z, err := gzip.NewReader(in)
	if err != nil {
		return nil, err
	}
	z.Multistream(false)
	return &gzipMembers{in, z}, nil
}

// WriteTo writes all members, then returns errTrailing if anything but zeros follows.
func (g *gzipMembers) WriteTo(w io.Writer) (int64, error) {
	var total int64
	for {
		n, err := g.z.WriteTo(w)
		total += n
		if err != nil {
			return total, err
		}
		head, err := g.in.Peek(3)
		if sniff(head) != gzipped {
			if err != nil && !errors.Is(err, io.EOF) {
				return total, err
			}
			return total, g.padding()
		}
		if err := g.z.Reset(g.in); err != nil {
			return total, fmt.Errorf("another member: %w", err)
		}
		g.z.Multistream(false)
	}
}

// padding reads to the end and accepts only zeros.
func (g *gzipMembers) padding() error {
	var buf [4096]byte
	for {
		n, err := g.in.Read(buf[:])
		if len(bytes.TrimLeft(buf[:n], "\x00")) > 0 {
			return errTrailing
		}
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return err
		}
	}
}
