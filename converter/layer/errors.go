package layer

import (
	"errors"
	"fmt"
)

var (
	// ErrInvalid marks a layer that is malformed or contradicts itself.
	ErrInvalid = errors.New("invalid layer")
	// ErrUnsupported marks a well-formed layer with content that cannot be represented.
	ErrUnsupported = errors.New("unsupported")
	// ErrLimit marks a layer that exceeds its Limits.
	ErrLimit = errors.New("limit exceeded")
)

// EntryError is an error of one entry of a layer.
type EntryError struct {
	// Entry is the name of the entry as stored in the layer.
	Entry string
	// After is true if the error occurred after Entry, before the next name was known.
	After bool
	Err   error
}

// Error names the entry and the cause.
func (e *EntryError) Error() string {
	if e.After {
		if e.Entry == "" {
			return fmt.Sprintf("layer: first entry: %v", e.Err)
		}
		return fmt.Sprintf("layer: after entry %q: %v", e.Entry, e.Err)
	}
	return fmt.Sprintf("layer: entry %q: %v", e.Entry, e.Err)
}

// Unwrap returns the cause: one of ErrInvalid, ErrUnsupported and ErrLimit, or the error of the stream or store.
func (e *EntryError) Unwrap() error { return e.Err }

func entryError(name string, err error) error { return &EntryError{Entry: name, Err: err} }

func limitError(what string, limit int64) error {
	return fmt.Errorf("%w: more than %d %s", ErrLimit, limit, what)
}

func invalidf(format string, args ...any) error {
	return fmt.Errorf("%w: %s", ErrInvalid, fmt.Sprintf(format, args...))
}

func unsupportedf(format string, args ...any) error {
	return fmt.Errorf("%w: %s", ErrUnsupported, fmt.Sprintf(format, args...))
}
