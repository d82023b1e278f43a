package region

import (
	"bytes"
	"encoding/binary"
	"io"
)

// signatures are the marks that owners leave on memory and disks, by offset from the start.
var signatures = []struct {
	off   int64
	bytes string
	name  string
}{
	{0, "XFSB", "an XFS filesystem"},
	{1080, "\x53\xef", "an ext filesystem"},
	{1024, "\xe2\xe1\xf5\xe0", "an EROFS filesystem"},
	{0, "\x35\x78\x61\x64", "a DAXFS filesystem"},
	{0, "hsqs", "a squashfs filesystem"},
	{65600, "_BHRfS_M", "a Btrfs filesystem"},
	{1024, "\x10\x20\xf5\xf2", "an F2FS filesystem"},
	{0, "LUKS\xba\xbe", "an encrypted volume"},
	{512, "LABELONE", "an LVM volume"},
	{4086, "SWAPSPACE2", "swap space"},
	{4096, "NVDIMM_PFN_INFO\x00", "the info block of an fsdax namespace"},
	{4096, "NVDIMM_DAX_INFO\x00", "the info block of a devdax namespace"},
	{4096, "BTT_ARENA_INFO\x00", "the info block of a sector mode namespace"},
	{512, "EFI PART", "a GPT partition table"},
	{510, "\x55\xaa", "a partition table"}, // last, because boot sectors of filesystems have it, too
}

// Identify names the known owner of the start or the end of a region of size bytes, or returns "". It
// recognises filesystems, volumes, partition tables and namespace labels.
func Identify(r io.ReaderAt, size int64) string {
	for _, s := range signatures {
		b := make([]byte, len(s.bytes))
		if n, _ := r.ReadAt(b, s.off); n == len(b) && string(b) == s.bytes {
			return s.name
		}
	}
	end := make([]byte, labelArea)
	if n, _ := r.ReadAt(end, size-labelArea); n == len(end) {
		if bytes.Contains(end, []byte("NAMESPACE_INDEX\x00")) {
			return "an nvdimm label area"
		}
		if binary.LittleEndian.Uint64(end[labelArea-512:]) == 0x5452415020494645 { // "EFI PART"
			return "a backup GPT partition table"
		}
	}
	return ""
}
