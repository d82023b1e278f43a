package testimage

import (
	"bytes"
	"compress/gzip"
	"fmt"
	"io"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/types"
	"github.com/klauspost/compress/zstd"
)

// Formats is the image Special with its layers in three formats of registries: gzip, zstd, and eStargz.
func Formats() (v1.Image, error) {
	base, err := Busybox()
	if err != nil {
		return nil, err
	}
	img, err := Image(base)
	if err != nil {
		return nil, err
	}
	special := SpecialLayers()
	for _, l := range []struct {
		entries []Entry
		media   types.MediaType
		encode  func([]Entry) (encoded, plain []byte, err error)
	}{
		{special[0], types.OCILayerZStd, zstdLayer},
		{special[1], types.OCILayer, stargzLayer},
		{[]Entry{File("plain", 0o644, []byte("not compressed"))}, types.OCIUncompressedLayer, plainLayer},
	} {
		encoded, plain, err := l.encode(l.entries)
		if err != nil {
			return nil, err
		}
		if img, err = mutate.AppendLayers(img, &blobLayer{encoded, plain, l.media}); err != nil {
			return nil, err
		}
	}
	return img, nil
}

// Docker is the image Special with Docker's media types, and one more layer to make its chain a different one.
func Docker() (v1.Image, error) {
	base, err := Busybox()
	if err != nil {
		return nil, err
	}
	layers := append([][]Entry{base, {File("docker", 0o644, nil)}}, SpecialLayers()...)
	return imageOf(types.DockerManifestSchema2, types.DockerConfigJSON, types.DockerLayer, layers)
}

// blobLayer is a layer with given bytes.
type blobLayer struct {
	encoded, plain []byte
	media          types.MediaType
}

func sum(b []byte) (v1.Hash, error) {
	h, _, err := v1.SHA256(bytes.NewReader(b))
	return h, err
}

func (l *blobLayer) Digest() (v1.Hash, error) { return sum(l.encoded) }
func (l *blobLayer) DiffID() (v1.Hash, error) { return sum(l.plain) }
func (l *blobLayer) Compressed() (io.ReadCloser, error) {
	return io.NopCloser(bytes.NewReader(l.encoded)), nil
}

func (l *blobLayer) Uncompressed() (io.ReadCloser, error) {
	return io.NopCloser(bytes.NewReader(l.plain)), nil
}
func (l *blobLayer) Size() (int64, error)                { return int64(len(l.encoded)), nil }
func (l *blobLayer) MediaType() (types.MediaType, error) { return l.media, nil }

func plainLayer(entries []Entry) (encoded, plain []byte, err error) {
	var b bytes.Buffer
	err = Tar(&b, entries)
	return b.Bytes(), b.Bytes(), err
}

func zstdLayer(entries []Entry) (encoded, plain []byte, err error) {
	_, plain, err = plainLayer(entries)
	if err != nil {
		return nil, nil, err
	}
	w, err := zstd.NewWriter(nil)
	if err != nil {
		return nil, nil, err
	}
	defer w.Close()
	return w.EncodeAll(plain, nil), plain, nil
}

// stargzLayer has the structure of eStargz: a separate gzip member for each entry, the table of
// contents as a file in its own member, and an empty member with the place of the table. Readers that
// do not know the format, and containers, see an ordinary layer with one more file.
func stargzLayer(entries []Entry) (encoded, plain []byte, err error) {
	var whole, out bytes.Buffer
	member := func(raw []byte, extra []byte) error {
		w, err := gzip.NewWriterLevel(&out, gzip.BestCompression)
		if err != nil {
			return err
		}
		w.Extra = extra
		if _, err := w.Write(raw); err != nil {
			return err
		}
		whole.Write(raw)
		return w.Close()
	}
	landmark := File(".no.prefetch.landmark", 0o644, []byte{0xf})
	for _, e := range append([]Entry{landmark}, entries...) {
		raw, err := entryBytes(e)
		if err != nil {
			return nil, nil, err
		}
		if err := member(raw, nil); err != nil {
			return nil, nil, err
		}
	}
	offset := out.Len()
	toc, err := entryBytes(File("stargz.index.json", 0o644, []byte(`{"version":1,"entries":[]}`)))
	if err != nil {
		return nil, nil, err
	}
	if err := member(append(toc, make([]byte, 1024)...), nil); err != nil { // with the end of the archive
		return nil, nil, err
	}
	if err := member(nil, fmt.Appendf(nil, "SG\x16\x00%016xSTARGZ", offset)); err != nil {
		return nil, nil, err
	}
	return out.Bytes(), whole.Bytes(), nil
}

// entryBytes returns an entry's bytes in an archive, without the archive's end.
func entryBytes(e Entry) ([]byte, error) {
	var b bytes.Buffer
	if err := Tar(&b, []Entry{e}); err != nil {
		return nil, err
	}
	return b.Bytes()[:b.Len()-2*512], nil
}
