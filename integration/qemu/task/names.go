package task

import (
	"fmt"
	"hash/crc64"
	"path"
	"slices"
	"strings"
)

// The directories of an image of the task "churn", by the way in which the guest looks at the files there. A kernel keeps the
// inode of a file that was mapped with DAX, so the space of the others only can be used again.
const (
	Read = "read"
	Map  = "map"
)

// Ways lists them.
var Ways = []string{Map, Read}

// NameOf names a file by its contents, so that it can be verified without knowing more. The sum is one that an emulated processor
// has soon.
func NameOf(way string, contents []byte) string { return path.Join(way, sum(contents)) }

// KeyOf names an image by its files.
func KeyOf(names []string) string {
	return sum([]byte(strings.Join(slices.Sorted(slices.Values(names)), "\n")))
}

func sum(b []byte) string { return fmt.Sprintf("%016x-%d", crc64.Checksum(b, table), len(b)) }

var table = crc64.MakeTable(crc64.ECMA)
