package layer

import "strings"

// Limits bound the cost of one layer. A field of 0 stands for its default; a negative one refuses all.
type Limits struct {
	// MaxEntries bounds the entries of a layer. Xattrs take as much memory: from the third one of an entry
	// on, every two count as one more entry. Default 4,194,304.
	MaxEntries int64
	// MaxBytes bounds the sum of all file sizes, holes included, and thus stops decompression bombs and
	// sparse files. Default 1 TiB.
	MaxBytes int64
	// MaxMetaBytes bounds the bytes of paths, link targets and xattrs of a layer, which are in memory.
	// Default and maximum 1 GiB.
	MaxMetaBytes int64
	// MaxXattrBytes bounds names and values of the xattrs of one entry. Default and maximum 128 KiB, the
	// most that an inode of an image can hold. One value has at most 65,535 bytes.
	MaxXattrBytes int64
	// MaxPath bounds the length of a path in bytes. Default and maximum 4095, as in the kernel.
	MaxPath int
	// MaxDepth bounds the elements of a path. Default and maximum 2048, the most that fit MaxPath.
	MaxDepth int
}

const (
	maxMeta    = 1 << 30
	maxPath    = 4095 // PATH_MAX without its NUL
	maxDepth   = (maxPath + 1) / 2
	maxName    = 255   // NAME_MAX
	maxTarget  = 4095  // of a symbolic link
	maxXattr   = 65535 // one value: one byte less than in the kernel, because of the EROFS format
	maxXattrNm = 255   // XATTR_NAME_MAX
	maxXattrs  = 128 << 10
)

func (l Limits) withDefaults() Limits {
	if l.MaxEntries == 0 {
		l.MaxEntries = 4 << 20
	}
	if l.MaxBytes == 0 {
		l.MaxBytes = 1 << 40
	}
	if l.MaxMetaBytes == 0 || l.MaxMetaBytes > maxMeta {
		l.MaxMetaBytes = maxMeta
	}
	if l.MaxXattrBytes == 0 || l.MaxXattrBytes > maxXattrs {
		l.MaxXattrBytes = maxXattrs
	}
	if l.MaxPath == 0 || l.MaxPath > maxPath {
		l.MaxPath = maxPath
	}
	if l.MaxDepth == 0 || l.MaxDepth > maxDepth {
		l.MaxDepth = maxDepth
	}
	return l
}

// checkPath reports whether a clean relative path can exist.
func (l *Limits) checkPath(p string) error {
	if len(p) > l.MaxPath {
		return limitError("bytes of a path", int64(l.MaxPath))
	}
	depth, start := 0, 0
	for start <= len(p) {
		end := strings.IndexByte(p[start:], '/')
		if end < 0 {
			end = len(p) - start
		}
		if end > maxName {
			return limitError("bytes of a name", maxName)
		}
		depth++
		start += end + 1
	}
	if depth > l.MaxDepth {
		return limitError("elements of a path", int64(l.MaxDepth))
	}
	return nil
}
