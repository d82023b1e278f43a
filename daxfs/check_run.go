package daxfs

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"strings"
)

// Finding is one violation of a rule of the format in one place.
type Finding struct {
	// Rule is the id under which docs/format.md explains the rule.
	Rule Rule
	// Off is the offset in the image, in bytes, of the structure that breaks the rule, or -1.
	Off int64
	// Ino is a nid of the EROFS half, or a DAXFS inode number for rules that start with "v8-", or 0.
	Ino uint64
	// Path is the absolute path of the inode by its first name, or empty if it has none or it is unknown.
	Path string
	// Msg says what was expected and what was found.
	Msg string
}

// String returns the finding in one line.
func (f Finding) String() string {
	var b strings.Builder
	fmt.Fprintf(&b, "%s: ", f.Rule)
	if f.Path != "" {
		fmt.Fprintf(&b, "%q: ", f.Path)
	}
	b.WriteString(f.Msg)
	if f.Ino != 0 {
		fmt.Fprintf(&b, " (inode %d", f.Ino)
		if f.Off >= 0 {
			fmt.Fprintf(&b, ", offset %d", f.Off)
		}
		b.WriteByte(')')
	} else if f.Off >= 0 {
		fmt.Fprintf(&b, " (offset %d)", f.Off)
	}
	return b.String()
}

// CheckOptions are the options of CheckWith. Check uses the zero value.
type CheckOptions struct {
	// SkipTails skips the rule data-tail, and with it all reading of contents, one page per file.
	SkipTails bool
	// MaxInodes refuses images with more inodes in either half; 0 stands for 1<<24. An inode takes up to
	// 500 bytes of memory.
	MaxInodes uint64
}

const defaultMaxInodes = 1 << 24

// Check verifies an image of size bytes: its EROFS half, its DAXFS half, and that both show the same
// tree over the same contents. An image that passes is safe to mount with either kernel driver and
// readable in full through Open and OpenDAXFS, as long as nobody changes its bytes.
//
// Bytes that no rule covers may have any value: in a window of a pool they are contents of other images.
//
// Check calls report, which may be nil, for each finding until report returns false. One fault can give
// several findings. The error is the first finding as a *FormatError, or an error of r, which ends the
// check. It takes O(n log n) time and O(n) memory in the number of inodes and names, both bounded by size.
func Check(r io.ReaderAt, size int64, report func(Finding) bool) error {
	return CheckWith(r, size, CheckOptions{}, report)
}

// CheckWith is Check with options.
func CheckWith(r io.ReaderAt, size int64, o CheckOptions, report func(Finding) bool) error {
	c := checker{report: report, tails: !o.SkipTails, max: o.MaxInodes}
	if c.max == 0 {
		c.max = defaultMaxInodes
	}
	c.run(r, size)
	return c.result()
}

// result returns the error of Check and Prove.
func (c *checker) result() error {
	if c.err != nil && !errors.Is(c.err, errStop) {
		return c.err
	}
	return c.first
}

// errStop ends a check when report wants no more findings; it never reaches a caller.
var errStop = errors.New("stop")

type checker struct {
	report func(Finding) bool
	first  error // the first finding
	err    error // why the check ends early; no finding is reported after it, and loops stop
	tails  bool
	max    uint64

	s    source // reads of metadata: cached unless the image is in memory
	data source // reads of contents
	ero  *FS    // nil if that half cannot be read
	v8   *DAXFS // nil if that half cannot be read

	live liveState

	erofsState
	v8State
	extents parts[extent]
	page    [BlockSize]byte // scratch
	// budget limits the bytes of directories and xattrs that are still to be read; pairing limits the
	// DAXFS directories read beside those of the EROFS half. Both start at the size of the image: only
	// overlapping structures exceed it.
	budget, pairing int64
}

func (c *checker) run(r io.ReaderAt, size int64) {
	var err error
	if c.data, err = newSource(r, size); err != nil {
		c.broken(err, "")
		return
	}
	c.s = c.data
	if c.s.b == nil {
		c.s.r = NewReadCache(r, size)
	}
	c.pairing = size
	if size%BlockSize != 0 {
		c.finding(RuleImageSize, -1, 0, "", "size is %d bytes, expected a multiple of %d", size, BlockSize)
	}
	for _, step := range []func(){c.checkSupers, c.checkErofs, c.checkV8, c.checkSpace} {
		c.budget = size
		if step(); c.err != nil {
			return
		}
	}
}

func (c *checker) fail(err error) {
	if c.err == nil {
		c.err = err
	}
}

func (c *checker) finding(rule Rule, off int64, ino uint64, path, format string, args ...any) {
	c.emit(&FormatError{rule, off, ino, fmt.Errorf("%w: %s", ErrCorrupt, fmt.Sprintf(format, args...))}, path)
}

// broken reports an error of a reader. An error that is not a *FormatError ends the check.
func (c *checker) broken(err error, path string) {
	var f *FormatError
	if !errors.As(err, &f) {
		c.fail(err)
		return
	}
	c.emit(f, path)
}

func (c *checker) emit(f *FormatError, path string) {
	if c.err != nil {
		return
	}
	if c.first == nil {
		c.first = f
	}
	if c.report == nil {
		c.fail(errStop)
		return
	}
	// A finding of Check implies a corrupt image; only "unsupported" adds information.
	msg := strings.TrimPrefix(f.Err.Error(), ErrCorrupt.Error()+": ")
	if !c.report(Finding{f.Rule, f.Off, f.Ino, path, msg}) {
		c.fail(errStop)
	}
}

// spend takes n bytes from a budget, or returns false if fewer are left.
func spend(budget *int64, n int64) bool {
	if n > *budget {
		return false
	}
	*budget -= n
	return true
}

// checkSupers opens both halves and checks the first block and the overlay pair.
func (c *checker) checkSupers() {
	var err error
	if c.ero, err = openErofs(c.s); err != nil {
		c.ero = nil
		c.broken(err, "")
	}
	if c.v8, err = openV8(c.s); err != nil {
		c.v8 = nil
		c.broken(err, "")
	}
	c.use(0, BlockSize, useMeta, 0)
	block, err := c.s.view(0, BlockSize)
	if err != nil {
		c.fail(err)
		return
	}
	if c.ero != nil {
		c.checkErofsSuper(block)
	}
	if c.v8 != nil {
		c.checkV8Super(block)
	}
}

var zeros [BlockSize]byte

// isZero reports whether all bytes are zero. bytes.Equal is several times faster than a loop.
func isZero(b []byte) bool {
	for ; len(b) > len(zeros); b = b[len(zeros):] {
		if !bytes.Equal(b[:len(zeros)], zeros[:]) {
			return false
		}
	}
	return bytes.Equal(b, zeros[:len(b)])
}
