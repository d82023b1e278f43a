package layer

import (
	"errors"
	"fmt"
)

var (
	// ErrInvalid marks a layer that is malformed or contradicts itself.
	ErrInvalid = errors.New("invalid layer")
	// ErrUnsupported marks a layer that is well formed but holds what can not be represented.
	ErrUnsupported = errors.New("unsupported")
	// ErrLimit marks a layer that exceeds its Limits.
	ErrLimit = errors.New("limit exceeded")
)

// EntryError is an error that belongs to one entry of a layer.
type EntryError struct {
	// Entry is the name of the entry as the layer has it.
	Entry string
	// After is set if the error came up behind Entry, before the next one had a name.
	After bool
	Err   error
}

// Error says which entry it was, and why.
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
