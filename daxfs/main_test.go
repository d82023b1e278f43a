package daxfs_test

import (
	"errors"
	"time"
)

// fixedTime has all nine digits.
var fixedTime = time.Unix(1_700_000_000, 123_456_789)

func isErr(got, want error) bool {
	if want == nil {
		return got == nil
	}
	return errors.Is(got, want)
}
