package daxfs

import (
	"errors"
	"fmt"
	"strings"
)

// ErrCorrupt is wrapped by every error that says that bytes of an image break a rule of the format.
var ErrCorrupt = errors.New("corrupt image")

// ErrUnsupported is wrapped by every error that says that an image is, or may be, sound but uses something that
// this package does not read: another version, a feature bit, a compressed file.
var ErrUnsupported = errors.New("unsupported image")

// FormatError is the error of everything that reads an image. It names the rule that is broken and the place.
type FormatError struct {
	// Rule is the id under which docs/format.md explains the rule.
	Rule Rule
	// Off is the offset in the image of the structure that breaks the rule, in bytes; -1 where there is none.
	Off int64
	// Ino is the inode that the structure belongs to: a nid of the EROFS half, or an inode number of the DAXFS
	// half for rules that start with "v8-". It is 0 where the structure belongs to none.
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

// corrupt makes the error for bytes at off, of inode ino, that break a rule.
func corrupt(rule Rule, off int64, ino uint64, format string, args ...any) error {
	return &FormatError{rule, off, ino, fmt.Errorf("%w: %s", ErrCorrupt, fmt.Sprintf(format, args...))}
}

// unsupported makes the error for what this package does not read.
func unsupported(rule Rule, off int64, ino uint64, format string, args ...any) *FormatError {
	return &FormatError{rule, off, ino, fmt.Errorf("%w: %s", ErrUnsupported, fmt.Sprintf(format, args...))}
}
