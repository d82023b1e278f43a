package blob

import (
	"bytes"
	"errors"
	"fmt"
	"mime"
	"strings"
)

var (
	// ErrMediaType reports a blob whose media type is not that of a layer.
	ErrMediaType = errors.New("not a layer media type")
	// ErrEncrypted reports an encrypted layer (ocicrypt).
	ErrEncrypted = errors.New("layer is encrypted")
)

// packing is the compression of a layer's tar.
type packing int

const (
	plain packing = iota
	gzipped
	zstandard
	// sniffed means that the first bytes decide. Docker's types do not tell the compression of a layer,
	// and tools relabel layers without repacking them; containerd inspects the bytes, too.
	sniffed
)

func (p packing) String() string {
	return [...]string{"uncompressed", "gzip", "zstd", "unknown"}[p]
}

// layerTypes are the media types of layers, without the compression suffix.
var layerTypes = []string{
	"application/vnd.oci.image.layer.v1.tar",
	"application/vnd.oci.image.layer.nondistributable.v1.tar",
	"application/vnd.docker.image.rootfs.diff.tar",
	"application/vnd.docker.image.rootfs.foreign.diff.tar",
}

// CheckMediaType returns an error that wraps ErrEncrypted or ErrMediaType unless this package can read
// layers of mediaType. In an archive without types, mediaType is empty and the bytes decide.
func CheckMediaType(mediaType string) error {
	_, err := packingOf(mediaType)
	return err
}

func packingOf(mediaType string) (packing, error) {
	if mediaType == "" {
		return sniffed, nil
	}
	if t, _, err := mime.ParseMediaType(mediaType); err == nil {
		mediaType = t // in lower case, without parameters
	}
	if strings.HasSuffix(mediaType, "+encrypted") {
		return 0,
			fmt.Errorf("%w (media type %q): decrypt the image first, for instance with skopeo copy --decryption-key",
				ErrEncrypted, mediaType)
	}
	for _, t := range layerTypes {
		rest, ok := strings.CutPrefix(mediaType, t)
		if !ok {
			continue
		}
		switch rest {
		case "":
			if strings.HasPrefix(mediaType, "application/vnd.oci.") {
				return plain, nil
			}
			return sniffed, nil
		case "+gzip", ".gzip", "+zstd", ".zstd":
			return sniffed, nil
		}
	}
	return 0, fmt.Errorf("%w: %q (expected an OCI or Docker layer: tar, tar+gzip or tar+zstd)", ErrMediaType, mediaType)
}

// magics are the first bytes of unsupported compressed files.
var magics = []struct{ name, magic string }{
	{"bzip2", "BZh"},
	{"xz", "\xfd7zXZ\x00"},
	{"lzma", "\x5d\x00\x00"},
	{"lz4", "\x04\x22\x4d\x18"},
	{"lzip", "LZIP"},
	{"lzop", "\x89LZO\x00"},
	{"compress", "\x1f\x9d"},
	{"zip", "PK\x03\x04"},
	{"7z", "7z\xbc\xaf\x27\x1c"},
	{"zlib", "\x78\x01"},
	{"zlib", "\x78\x5e"},
	{"zlib", "\x78\x9c"},
	{"zlib", "\x78\xda"},
	{"Snappy", "\xff\x06\x00\x00sNaPpY"},
}

// HeadSize is the number of bytes that LooksLike needs.
const HeadSize = 16

// LooksLike returns the compression that the first bytes of an unreadable tar suggest, or "".
func LooksLike(head []byte) string {
	if p := sniff(head); p != plain {
		return p.String()
	}
	for _, m := range magics {
		if bytes.HasPrefix(head, []byte(m.magic)) {
			return m.name
		}
	}
	return ""
}

// IsCompressed reports whether a file starts like gzip or zstd. head must have at least 4 bytes.
func IsCompressed(head []byte) bool { return sniff(head) != plain }

// sniff derives the packing from the first bytes of a blob. A tar starts with a file name, which does
// not accidentally equal the magic of gzip or zstd.
func sniff(head []byte) packing {
	switch {
	case bytes.HasPrefix(head, []byte{0x1f, 0x8b, 0x08}):
		return gzipped
	case bytes.HasPrefix(head, []byte{0x28, 0xb5, 0x2f, 0xfd}):
		return zstandard
	case len(head) >= 4 && head[0]&0xf0 == 0x50 && head[1] == 0x2a && head[2] == 0x4d && head[3] == 0x18:
		return zstandard // a skippable frame, with which zstd:chunked and pzstd may start
	}
	return plain
}
