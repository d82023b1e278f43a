package chunked

import (
	"bufio"
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"hash"
	"hash/crc64"
	"io"
	"math"
	"strings"
	"time"
	"unicode/utf8"

	"github.com/opencontainers/go-digest"
	"github.com/vbatts/tar-split/archive/tar"
	"github.com/vbatts/tar-split/tar/storage"
)

const (
	// maxRaw bounds the bytes between contents that become one frame, or at the end of the tar one segment
	// of tar-split.
	maxRaw = 1 << 20
	// maxHeaders bounds the headers of one entry, which are in memory and become one line of tar-split.
	maxHeaders = 4 << 20
)

// source counts the bytes of the tar and keeps its read error, to tell a damaged tar from an unreadable one.
type source struct {
	r   io.Reader
	n   int64
	err error
}

// bounded fails when more than left bytes are read. A tar may have any number of PAX headers before an entry.
type bounded struct {
	r    io.Reader
	left int64
}

func (b *bounded) Read(p []byte) (int, error) {
	if b.left <= 0 {
		return 0, fmt.Errorf("headers of more than %d bytes", maxHeaders)
	}
	n, err := b.r.Read(p[:min(int64(len(p)), b.left)])
	b.left -= int64(n)
	return n, err
}

func (s *source) Read(p []byte) (int, error) {
	n, err := s.r.Read(p)
	s.n += int64(n)
	if err != nil && !errors.Is(err, io.EOF) {
		s.err = err
	}
	return n, err
}

// scanner cuts a tar into pieces and writes tar-split and the entries of the table of contents. It
// hashes its output, not its input: the result is the diff ID that tar-split and contents produce.
type scanner struct {
	ctx    context.Context
	src    *source
	out    *pipeline
	split  *table
	lines  *json.Encoder // of tar-split
	line   int
	names  names
	diffID hash.Hash
	n      int64  // bytes passed on
	raw    *piece // collected bytes between contents
	rest   []byte // bytes of the file read beyond its last chunk
	files  int

	entries []Entry
}

func (s *scanner) run() ([]Entry, error) {
	s.lines = json.NewEncoder(s.split)
	s.names = names{}
	s.entries = []Entry{}
	in := bufio.NewReaderSize(s.src, 64<<10)
	if err := s.tar(in); err != nil {
		return nil, err
	}
	if err := s.trailing(in); err != nil {
		return nil, err
	}
	// The tar reader passes on nothing of a truncated block.
	if s.n != s.src.n {
		return nil, fmt.Errorf("%w: it has %d bytes, tar-split covers only %d: is its end cut off?",
			ErrUnsuitable, s.src.n, s.n)
	}
	if s.n == 0 {
		return nil, fmt.Errorf("%w: it is empty", ErrUnsuitable)
	}
	return s.entries, s.flush()
}

func (s *scanner) tar(r io.Reader) error {
	in := &bounded{r: r}
	tr := tar.NewReader(in)
	tr.RawAccounting = true
	last := ""
	for {
		in.left = maxHeaders
		hdr, err := tr.Next()
		in.left = math.MaxInt64
		if err != nil && !errors.Is(err, io.EOF) {
			return s.bad(fmt.Errorf("behind entry %q: %w", last, err))
		}
		if raw := tr.RawBytes(); len(raw) > 0 {
			if err := s.segment(raw); err != nil {
				return err
			}
		}
		if err != nil {
			return nil
		}
		if err := s.entry(hdr, tr); err != nil {
			return err
		}
		last = hdr.Name
	}
}

// bad converts an error of the tar reader.
func (s *scanner) bad(err error) error {
	if s.src.err != nil {
		return s.src.err
	}
	return fmt.Errorf("%w: %w", ErrUnsuitable, err)
}

// segment takes bytes outside of contents.
func (s *scanner) segment(b []byte) error {
	if err := s.pack(storage.Entry{Type: storage.SegmentType, Payload: b}); err != nil {
		return err
	}
	s.diffID.Write(b)
	s.n += int64(len(b))
	if s.raw == nil {
		s.raw = pieces.Get().(*piece)
		s.raw.data, s.raw.entry = s.raw.data[:0], -1
	}
	s.raw.data = append(s.raw.data, b...)
	if len(s.raw.data) >= maxRaw {
		return s.flush()
	}
	return nil
}

// pack writes a line of tar-split.
func (s *scanner) pack(e storage.Entry) error {
	e.Position = s.line
	s.line++
	if err := s.lines.Encode(e); err != nil {
		return fmt.Errorf("tar-split: %w", err)
	}
	return nil
}

// flush passes on the collected bytes between contents.
func (s *scanner) flush() error {
	p := s.raw
	if p == nil {
		return nil
	}
	s.raw = nil
	return s.out.add(p)
}

func (s *scanner) entry(hdr *tar.Header, r io.Reader) error {
	e, err := entryOf(hdr)
	if err == nil {
		err = s.names.add(&e)
	}
	if err != nil {
		return fmt.Errorf("%w: entry %.200q: %w", ErrUnsuitable, hdr.Name, err)
	}
	s.entries = append(s.entries, e)
	f := storage.Entry{Type: storage.FileType, Name: hdr.Name, Size: hdr.Size}
	if hdr.Size > 0 {
		s.files++
		if err := s.flush(); err != nil {
			return err
		}
		if f.Payload, err = s.contents(r, hdr.Size); err != nil {
			return err
		}
	}
	return s.pack(f)
}

// contents passes on the contents of the last entry in chunks. It returns the checksum for tar-split.
func (s *scanner) contents(r io.Reader, size int64) ([]byte, error) {
	crc := crc64.New(storage.CRCTable)
	var whole hash.Hash // hash of a file of several chunks
	i := len(s.entries) - 1
	s.rest = s.rest[:0]
	for offset := int64(0); offset < size; {
		p := pieces.Get().(*piece)
		p.entry, p.offset = i, offset
		if err := s.chunk(p, r, size-offset); err != nil {
			return nil, err
		}
		offset += int64(len(p.data))
		crc.Write(p.data)
		s.diffID.Write(p.data)
		s.n += int64(len(p.data))
		if whole == nil && offset < size {
			whole = sha256.New()
		}
		if whole != nil {
			whole.Write(p.data)
		}
		if err := s.out.add(p); err != nil {
			return nil, err
		}
	}
	if whole != nil {
		s.entries[i].Digest = digest.NewDigest(digest.SHA256, whole)
	}
	return crc.Sum(nil), nil
}

// chunk reads the next chunk of a file. left bytes of the file are not yet passed on.
func (s *scanner) chunk(p *piece, r io.Reader, left int64) error {
	p.data = append(p.data[:0], s.rest...)
	s.rest = s.rest[:0]
	var c cutter
	for {
		if s.ctx.Err() != nil {
			return context.Cause(s.ctx)
		}
		if n := min(left-int64(len(p.data)), readBlock); n > 0 {
			at := len(p.data)
			p.data = append(p.data, make([]byte, n)...)
			if _, err := io.ReadFull(r, p.data[at:]); err != nil {
				return s.bad(fmt.Errorf("contents of entry %q: %w", s.entries[p.entry].Name, err))
			}
		}
		n, ends := c.find(p.data)
		if ends {
			s.rest = append(s.rest, p.data[n:]...)
			p.data = p.data[:n]
		}
		if ends || int64(len(p.data)) == left {
			return nil
		}
	}
}

var errTrailing = fmt.Errorf("%w: bytes other than zeros follow its end", ErrUnsuitable)

// trailing takes the bytes behind the end marker. containers/storage fails if they are not a tar.
func (s *scanner) trailing(in io.Reader) error {
	buf := make([]byte, maxRaw)
	for {
		n, err := io.ReadFull(in, buf)
		if s.src.err != nil {
			return s.src.err
		}
		if s.ctx.Err() != nil {
			return context.Cause(s.ctx)
		}
		if len(bytes.Trim(buf[:n], "\x00")) > 0 || n%tarBlock != 0 {
			return errTrailing
		}
		if n > 0 {
			if err := s.segment(buf[:n]); err != nil {
				return err
			}
		}
		if err != nil {
			return nil
		}
	}
}

const tarBlock = 512

var types = map[byte]string{
	tar.TypeReg: TypeReg, tar.TypeLink: TypeLink, tar.TypeSymlink: TypeSymlink, tar.TypeDir: TypeDir,
	tar.TypeChar: TypeChar, tar.TypeBlock: TypeBlock, tar.TypeFifo: TypeFIFO,
}

// entryOf returns the entry of the table of contents. It refuses what JSON cannot hold and what
// readers interpret differently from the tar.
func entryOf(hdr *tar.Header) (Entry, error) {
	e := Entry{
		Type: types[hdr.Typeflag], Name: hdr.Name, Linkname: hdr.Linkname, Mode: hdr.Mode, Size: hdr.Size,
		UID: hdr.Uid, GID: hdr.Gid, DevMajor: hdr.Devmajor, DevMinor: hdr.Devminor,
	}
	if e.Type == "" {
		return e, fmt.Errorf("type %q", hdr.Typeflag)
	}
	if e.Type != TypeReg && e.Size != 0 {
		return e, fmt.Errorf("a %s of %d bytes", e.Type, e.Size)
	}
	if !utf8.ValidString(e.Name) || !utf8.ValidString(e.Linkname) {
		return e, errors.New("a name that is not UTF-8")
	}
	for key, value := range hdr.PAXRecords {
		if strings.HasPrefix(key, "GNU.sparse.") {
			return e, errors.New("a file with holes")
		}
		name, ok := strings.CutPrefix(key, "SCHILY.xattr.")
		if !ok {
			continue
		}
		if !utf8.ValidString(name) {
			return e, errors.New("an attribute whose name is not UTF-8")
		}
		if e.Xattrs == nil {
			e.Xattrs = map[string]string{}
		}
		e.Xattrs[name] = base64.StdEncoding.EncodeToString([]byte(value))
	}
	for _, t := range []struct {
		from time.Time
		to   **time.Time
	}{{hdr.ModTime, &e.ModTime}, {hdr.AccessTime, &e.AccessTime}, {hdr.ChangeTime, &e.ChangeTime}} {
		if t.from.IsZero() {
			continue
		}
		utc := t.from.UTC()
		if y := utc.Year(); y < 0 || y > 9999 {
			return e, fmt.Errorf("the year %d", y)
		}
		*t.to = &utc
	}
	return e, nil
}
