package config

import (
	"fmt"
	"strconv"

	"github.com/docker/go-units"
)

// Size is a number of bytes, written as a number or with a unit in powers of 1024: "64 GiB", "512m".
type Size int64

// UnmarshalText reads a size.
func (s *Size) UnmarshalText(text []byte) error {
	n, err := units.RAMInBytes(string(text))
	if err != nil {
		return fmt.Errorf("size %q: expected a number with an optional unit, such as \"64GiB\"", text)
	}
	*s = Size(n)
	return nil
}

// MarshalText writes a size as a number of bytes.
func (s Size) MarshalText() ([]byte, error) { return strconv.AppendInt(nil, int64(s), 10), nil }
