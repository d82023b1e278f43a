package daxfs

import (
	"errors"
	"fmt"
	"strings"
)

// ErrCorrupt is wrapped by every error about bytes of an image that break a rule of the format.
var ErrCorrupt = errors.New("corrupt image")

// ErrUnsupported is wrapped by every error about a possibly sound image that needs something this
// package does not read: another version, a feature bit, a compressed file.
var ErrUnsupported = errors.New("unsupported image")

// FormatError is the error of all readers of an image. It names the broken rule and the place.
type FormatError struct {
	// Rule is the id under which docs/format.md explains the rule.
	Rule Rule
	// Off is the offset in the image, in bytes, of the structure that breaks the rule, or -1.
	Off int64
	// Ino is the inode of the structure: a nid of the EROFS half, or a DAXFS inode number for rules that
	// start with "v8-", or 0.
	Ino uint64
	// Err wraps ErrCorrupt or ErrUnsupported and says what was expected and what was found.
	Err error
}

func (e *FormatError) Error() string {
	var b strings.Builder
	fmt.Fprintf(&b, "%v (rule %s", e.Err, e.Rule)
	if e.Ino != 0 {
		fmt.Fprintf(&b, ", inode %d", e.Ino)
	}
	if e.Off >= 0 {
		fmt.Fprintf(&b, ", offset %d", e.Off)
	}
	b.WriteByte(')')
	return b.String()
}

func (e *FormatError) Unwrap() error { return e.Err }

// corrupt returns the error for bytes at off, of inode ino, that break a rule.
func corrupt(rule Rule, off int64, ino uint64, format string, args ...any) error {
	return &FormatError{rule, off, ino, fmt.Errorf("%w: %s", ErrCorrupt, fmt.Sprintf(format, args...))}
}

// unsupported returns the error for a feature that this package does not read.
func unsupported(rule Rule, off int64, ino uint64, format string, args ...any) *FormatError {
	return &FormatError{rule, off, ino, fmt.Errorf("%w: %s", ErrUnsupported, fmt.Sprintf(format, args...))}
}
