package recompress

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"os"
	"strings"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/daxfs/daxfs-snapshotter/converter/blob"
	"github.com/daxfs/daxfs-snapshotter/converter/chunked"
	"github.com/daxfs/daxfs-snapshotter/converter/source"
)

func newReader(b []byte) io.Reader { return bytes.NewReader(b) }

// layerTask is a layer to encode or to copy.
type layerTask struct {
	layer source.Layer
	to    ocispec.Descriptor // set once it is written
	kept  string             // why it was not encoded
}

// formats are the annotations of other formats, which an encoded layer loses.
var formats = []string{
	chunked.AnnotationTOCDigest, chunked.AnnotationTOCPosition, chunked.AnnotationTarSplitPosition,
	chunked.AnnotationTarSplitDigest, "containerd.io/snapshot/stargz/toc.digest",
	"io.containers.estargz.uncompressed-size",
}

// keep returns the reason in a layer's descriptor to copy the layer unchanged, or "".
func keep(d ocispec.Descriptor) string {
	switch {
	case d.Annotations[chunked.AnnotationTOCDigest] != "" && d.Annotations[chunked.AnnotationTarSplitPosition] != "":
		return "it is zstd:chunked already"
	case strings.Contains(d.MediaType, "nondistributable") || strings.Contains(d.MediaType, "foreign"):
		return "it is not to be distributed"
	}
	return ""
}

// layer encodes one layer and passes it to the destination.
func (c *conversion) layer(ctx context.Context, i int, t *layerTask) error {
	t.kept = keep(t.layer.Desc)
	if d := t.layer.Desc; t.kept != "" && d.MediaType == ocispec.MediaTypeImageLayerZstd {
		if ok, err := c.to.take(ctx, d); ok || err != nil {
			t.to = d
			if err == nil && c.o.Progress != nil {
				c.o.Progress.Done(i)
			}
			return err
		}
	}
	f, err := os.CreateTemp("", "daxfs-layer-*")
	if err != nil {
		return err
	}
	os.Remove(f.Name())
	defer f.Close()
	progress := func(n int) {
		if c.o.Progress != nil {
			c.o.Progress.Read(i, n)
		}
	}
	if t.kept == "" {
		err = c.encode(ctx, t, f, progress)
		if errors.Is(err, chunked.ErrUnsuitable) {
			t.kept = strings.TrimPrefix(err.Error(), chunked.ErrUnsuitable.Error()+": ")
			if _, err = f.Seek(0, io.SeekStart); err == nil {
				err = f.Truncate(0)
			}
			progress = func(int) {} // already counted
		}
		if err != nil {
			return err
		}
	}
	if t.kept != "" {
		if err := c.asItIs(ctx, t, f, progress); err != nil {
			return err
		}
	}
	err = c.to.blob(ctx, t.to, func() (io.ReadCloser, error) {
		return io.NopCloser(io.NewSectionReader(f, 0, t.to.Size)), nil
	}, c.upload(i, t.to.Size))
	if err == nil && c.o.Progress != nil {
		c.o.Progress.Done(i)
	}
	return err
}

// upload connects Progress to the sending of a layer.
func (c *conversion) upload(i int, size int64) upload {
	if c.o.Progress == nil {
		return upload{}
	}
	return upload{
		begin: func() { c.o.Progress.Send(i, size) },
		sent:  func(n int) { c.o.Progress.Sent(i, n) },
	}
}

// encode writes the layer to w as zstd:chunked.
func (c *conversion) encode(ctx context.Context, t *layerTask, w io.Writer, progress func(int)) error {
	rc, err := t.layer.Open(ctx)
	if err != nil {
		return err
	}
	spec := t.layer.Blob()
	spec.MaxSize, spec.Progress = c.o.MaxSize, progress
	r, err := blob.NewReader(ctx, rc, spec)
	if err != nil {
		return err
	}
	e, err := chunked.Encode(ctx, w, r, 0)
	if err := r.Finish(err); err != nil { // an error of the blob comes first
		return err
	}
	if e.DiffID != t.layer.DiffID {
		return &blob.MismatchError{What: "diff ID", Want: t.layer.DiffID.String(), Got: e.DiffID.String()}
	}
	t.to = ocispec.Descriptor{
		MediaType: ocispec.MediaTypeImageLayerZstd, Digest: e.Digest, Size: e.Size, Annotations: e.Annotations,
	}
	for key, value := range t.layer.Desc.Annotations {
		if _, ours := t.to.Annotations[key]; !ours && !isFormat(key) {
			t.to.Annotations[key] = value
		}
	}
	return nil
}

func isFormat(key string) bool {
	for _, k := range formats {
		if k == key {
			return true
		}
	}
	return false
}

// asItIs copies and verifies the blob.
func (c *conversion) asItIs(ctx context.Context, t *layerTask, w io.Writer, progress func(int)) error {
	rc, err := t.layer.Open(ctx)
	if err != nil {
		return err
	}
	defer rc.Close()
	head := &headWriter{}
	d, n, err := copyVerified(io.MultiWriter(w, head), rc, t.layer.Desc, progress)
	if err != nil {
		return err
	}
	t.to = t.layer.Desc
	t.to.Digest, t.to.Size, t.to.Data = d, n, nil
	t.to.Annotations = maps.Clone(t.to.Annotations)
	t.to.MediaType = mediaType(t.layer.Desc.MediaType, head.b)
	return nil
}

// mediaType returns a layer's OCI media type. Docker's types lack the compression, so head decides it.
func mediaType(was string, head []byte) string {
	t := ocispec.MediaTypeImageLayer
	if strings.Contains(was, "nondistributable") || strings.Contains(was, "foreign") {
		t = "application/vnd.oci.image.layer.nondistributable.v1.tar"
	}
	if packed := blob.LooksLike(head); packed == "gzip" || packed == "zstd" {
		t += "+" + packed
	}
	return t
}

// headWriter keeps the first bytes.
type headWriter struct{ b []byte }

func (h *headWriter) Write(p []byte) (int, error) {
	h.b = append(h.b, p[:min(len(p), blob.HeadSize-len(h.b))]...)
	return len(p), nil
}

// copyVerified copies a blob and compares it with its descriptor, as far as that is filled in.
func copyVerified(w io.Writer, r io.Reader, want ocispec.Descriptor, progress func(int)) (digest.Digest, int64, error) {
	algorithm := digest.SHA256
	if want.Digest != "" {
		if err := want.Digest.Validate(); err != nil {
			return "", 0, fmt.Errorf("digest %q: %w", want.Digest, err)
		}
		algorithm = want.Digest.Algorithm()
	}
	h := algorithm.Digester()
	n, err := io.Copy(io.MultiWriter(w, h.Hash(), counter(progress)), r)
	if err != nil {
		return "", n, err
	}
	if want.Size > 0 && n != want.Size {
		return "", n,
			&blob.MismatchError{What: "size", Want: fmt.Sprint(want.Size, " bytes"), Got: fmt.Sprint(n, " bytes")}
	}
	if got := h.Digest(); want.Digest != "" && got != want.Digest {
		return "", n, &blob.MismatchError{What: "digest", Want: want.Digest.String(), Got: got.String()}
	}
	return h.Digest(), n, nil
}

// counter receives the number of bytes written.
type counter func(int)

func (c counter) Write(p []byte) (int, error) {
	c(len(p))
	return len(p), nil
}

// copy copies a blob unchanged to the destination.
func (c *conversion) copy(ctx context.Context, b blobTask) error {
	if ok, err := c.to.take(ctx, b.desc); ok || err != nil {
		return err
	}
	f, err := os.CreateTemp("", "daxfs-blob-*")
	if err != nil {
		return err
	}
	os.Remove(f.Name())
	defer f.Close()
	rc, err := b.open(ctx)
	if err != nil {
		return err
	}
	defer rc.Close()
	limited := io.LimitReader(rc, c.o.MaxSize)
	_, n, err := copyVerified(f, limited, b.desc, func(int) {})
	if err != nil {
		return err
	}
	d := b.desc
	d.Size = n
	return c.to.blob(ctx, d, func() (io.ReadCloser, error) {
		return io.NopCloser(io.NewSectionReader(f, 0, n)), nil
	}, upload{})
}
