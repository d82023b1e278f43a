package recompress

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"

	"github.com/google/renameio/v2"
	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/specs-go"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// layout is an OCI image layout, which may contain other images.
type layout struct {
	kind, dir, tag string
}

func (l *layout) String() string                         { return l.kind }
func (l *layout) Close() error                           { return nil }
func (l *layout) counts() (sent, mounted, present int64) { return 0, 0, 0 }

func (l *layout) path(d digest.Digest) string {
	return filepath.Join(l.dir, ocispec.ImageBlobsDir, d.Algorithm().String(), d.Encoded())
}

// take finds an existing, undamaged blob.
func (l *layout) take(_ context.Context, d ocispec.Descriptor) (bool, error) {
	path := l.path(d.Digest)
	fi, err := os.Stat(path)
	return err == nil && fi.Mode().IsRegular() && fi.Size() == d.Size && same(path, d.Digest), nil
}

// blob writes a file that gets its name only once it is complete.
func (l *layout) blob(ctx context.Context, d ocispec.Descriptor, open func() (io.ReadCloser, error), _ upload) error {
	path := l.path(d.Digest)
	if there, _ := l.take(ctx, d); there {
		return nil
	}
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return err
	}
	rc, err := open()
	if err != nil {
		return err
	}
	defer rc.Close()
	f, err := renameio.NewPendingFile(path, renameio.WithPermissions(0o644))
	if err != nil {
		return err
	}
	defer f.Cleanup()
	if _, err := io.Copy(f, rc); err != nil {
		return err
	}
	return f.CloseAtomicallyReplace()
}

func same(path string, d digest.Digest) bool {
	f, err := os.Open(path)
	if err != nil {
		return false
	}
	defer f.Close()
	v := d.Verifier()
	_, err = io.Copy(v, f)
	return err == nil && v.Verified()
}

func (l *layout) manifest(ctx context.Context, d ocispec.Descriptor, doc []byte) error {
	return l.blob(ctx, d, func() (io.ReadCloser, error) { return io.NopCloser(bytes.NewReader(doc)), nil }, upload{})
}

func (l *layout) name(ctx context.Context, d ocispec.Descriptor, doc []byte) error {
	if err := l.manifest(ctx, d, doc); err != nil {
		return err
	}
	index := ocispec.Index{Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: ocispec.MediaTypeImageIndex}
	file := filepath.Join(l.dir, ocispec.ImageIndexFile)
	old, err := os.ReadFile(file)
	if err == nil {
		err = json.Unmarshal(old, &index)
	}
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		return fmt.Errorf("%s: %w", file, err)
	}
	index.Manifests = slices.DeleteFunc(index.Manifests, func(e ocispec.Descriptor) bool {
		return e.Annotations[ocispec.AnnotationRefName] == l.tag
	})
	if l.tag != "" {
		d.Annotations = map[string]string{ocispec.AnnotationRefName: l.tag}
	}
	index.Manifests = append(index.Manifests, d)
	text, err := json.Marshal(index)
	if err != nil {
		return err
	}
	version, err := json.Marshal(ocispec.ImageLayout{Version: ocispec.ImageLayoutVersion})
	if err != nil {
		return err
	}
	if err := renameio.WriteFile(filepath.Join(l.dir, ocispec.ImageLayoutFile), version, 0o644); err != nil {
		return err
	}
	return renameio.WriteFile(file, text, 0o644)
}
