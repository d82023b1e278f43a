package blob

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"io"

	"github.com/klauspost/compress/gzip"
)

// errTrailing is returned for bytes behind compressed data that nothing proves to be worthless.
var errTrailing = errors.New("other bytes behind the compressed data")

// gzipMembers reads the members of a gzip file, and what is behind them, as gzip(1) does: zeros are padding, which tapes
// and block devices leave. Go's decompressor refuses them, and so does containerd.
type gzipMembers struct {
	in *bufio.Reader
	z  *gzip.Reader
}

func newGzipMembers(r io.Reader) (*gzipMembers, error) {
	// The decompressor has a fast path for bufio.Reader, not for our type. It leaves such a reader right behind a member.
	in := bufio.NewReaderSize(r, 64<<10)
	z, err := gzip.NewReader(in)
	if err != nil {
		return nil, err
	}
	z.Multistream(false)
	return &gzipMembers{in, z}, nil
}

// WriteTo returns errTrailing, when all members are written, if something else than zeros is behind them.
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

// padding reads to the end.
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
