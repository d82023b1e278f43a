package testimage

import (
	"bytes"
	"context"
	"io"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/types"

	"github.com/daxfs/daxfs-snapshotter/converter/chunked"
)

// Chunked makes an image of layers, bottom first, in the format zstd:chunked.
func Chunked(layers ...[]Entry) (v1.Image, error) {
	return ChunkedBy(func(w io.Writer, raw io.Reader) (map[string]string, error) {
		made, err := chunked.Encode(context.Background(), w, raw, 0)
		if err != nil {
			return nil, err
		}
		return made.Annotations, nil
	}, layers...)
}

// ChunkedBy makes such an image with another encoder. encode turns the tar of a layer into its blob and annotations.
func ChunkedBy(encode func(w io.Writer, raw io.Reader) (map[string]string, error),
	layers ...[]Entry,
) (v1.Image, error) {
	img, err := Image()
	if err != nil {
		return nil, err
	}
	for _, entries := range layers {
		var raw bytes.Buffer
		if err := Tar(&raw, entries); err != nil {
			return nil, err
		}
		var blob bytes.Buffer
		annotations, err := encode(&blob, bytes.NewReader(raw.Bytes()))
		if err != nil {
			return nil, err
		}
		img, err = mutate.Append(img, mutate.Addendum{
			Layer: &blobLayer{blob.Bytes(), raw.Bytes(), types.OCILayerZStd}, Annotations: annotations,
			MediaType: types.OCILayerZStd,
		})
		if err != nil {
			return nil, err
		}
	}
	return img, nil
}

// Updated returns the entries of a layer with new contents in every n-th regular file.
func Updated(entries []Entry, n int) []Entry {
	out := make([]Entry, len(entries))
	for i, e := range entries {
		if i%n == 0 && len(e.Body) > 0 {
			e = File(e.Name, e.Mode, Noise(uint64(i), len(e.Body)))
		}
		out[i] = e
	}
	return out
}
