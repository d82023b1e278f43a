package task

import (
	"fmt"
	"hash/crc64"
	"path"
	"slices"
	"strings"
)

// The directories of a "churn" task's image are named after the guest's way of reading their files. A
// kernel keeps the inode of a file mapped with DAX, so only the space of the other files can be reused.
const (
	Read = "read"
	Map  = "map"
)

// Ways lists the ways.
var Ways = []string{Map, Read}

// NameOf names a file by its contents, for verification. The sum is fast even on an emulated processor.
func NameOf(way string, contents []byte) string { return path.Join(way, sum(contents)) }

// KeyOf names an image by its files.
func KeyOf(names []string) string {
	return sum([]byte(strings.Join(slices.Sorted(slices.Values(names)), "\n")))
}

func sum(b []byte) string { return fmt.Sprintf("%016x-%d", crc64.Checksum(b, table), len(b)) }

var table = crc64.MakeTable(crc64.ECMA)
