package snapshotter

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"path/filepath"
	"strings"
	"time"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/core/diff"
	"github.com/containerd/containerd/v2/core/diff/apply"
	"github.com/containerd/containerd/v2/core/images"
	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/errdefs"
	"github.com/containerd/log"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	bolt "go.etcd.io/bbolt"
)

// Differ applies OCI layers to a Snapshotter's snapshots without unpacking. It is safe for concurrent use.
type Differ struct {
	s     *Snapshotter
	blobs content.Provider
}

var (
	_ diff.Applier  = (*Differ)(nil)
	_ diff.Comparer = (*Differ)(nil)
)

// NewDiffer returns the differ of s. It reads from blobs, containerd's store, in the context's namespace.
func NewDiffer(s *Snapshotter, blobs content.Provider) *Differ { return &Differ{s: s, blobs: blobs} }

// blobBuffer is the size of one read of a blob. Through containerd's API each read is a request.
const blobBuffer = 4 << 20

// Apply stores the layer desc in the snapshot to which the mounts belong. It returns ErrNotImplemented
// for mounts of other snapshotters and for layers that it cannot decode: containerd then tries its next differ.
func (d *Differ) Apply(ctx context.Context, desc ocispec.Descriptor, mounts []mount.Mount,
	opts ...diff.ApplyOpt,
) (_ ocispec.Descriptor, err error) {
	id := d.s.owns(mounts)
	if id == "" {
		return ocispec.Descriptor{}, fmt.Errorf("mounts of another snapshotter: %w", errdefs.ErrNotImplemented)
	}
	if !decodable(ctx, desc.MediaType) {
		return ocispec.Descriptor{}, fmt.Errorf("layer of media type %q: %w", desc.MediaType, errdefs.ErrNotImplemented)
	}
	began := time.Now()
	defer func() { d.s.opts.Observe("stream", time.Since(began), err) }()
	info, rec, err := d.s.active(ctx, id)
	if err != nil {
		return ocispec.Descriptor{}, err
	}
	empty, err := isEmpty(d.s.upper(id))
	if err != nil {
		return ocispec.Descriptor{}, err
	}
	if !empty {
		// The directory has files already, so the layer belongs on top of them. Only walking can put it there.
		if len(rec.Streamed) > 0 {
			return ocispec.Descriptor{}, fmt.Errorf("snapshot %q holds a streamed layer and files above it: %w",
				info.Name, errdefs.ErrFailedPrecondition)
		}
		return d.unpack(ctx, id, desc, opts)
	}
	if rec.Lower.onShared() {
		// A streamed layer would need an image in our pool with a copy of all layers below it.
		return d.unpack(ctx, id, desc, opts)
	}
	added, err := d.stream(ctx, id, info, desc)
	if errdefs.IsResourceExhausted(err) && len(rec.Streamed) == 0 {
		log.G(ctx).WithError(err).WithField("snapshot", info.Name).
			Warn("no room for the layer, unpacking it to a directory, which shares less memory")
		d.s.opts.Fallback("full")
		return d.unpack(ctx, id, desc, opts)
	}
	if err != nil {
		return ocispec.Descriptor{}, fmt.Errorf("layer %s: %w", desc.Digest, err)
	}
	return ocispec.Descriptor{MediaType: ocispec.MediaTypeImageLayer, Size: added.Size, Digest: added.DiffID}, nil
}

// stream stores the layer and records it with the snapshot.
func (d *Differ) stream(ctx context.Context, id string, info snapshots.Info,
	desc ocispec.Descriptor,
) (Streamed, error) {
	var unpins []func()
	defer func() {
		for _, unpin := range unpins {
			unpin()
		}
	}()
	var expected digest.Digest
	if v, err := digest.Parse(info.Labels[labelDiffID]); err == nil {
		expected = v
	}
	ns, _ := splitName(info.Name)
	blob := Blob{
		Namespace: ns,
		Digest:    desc.Digest,
		MediaType: desc.MediaType,
		DiffID:    expected,
		Size:      desc.Size,
		Open:      func(ctx context.Context) (io.ReadCloser, error) { return d.open(ctx, desc) },
		Pin:       func(key string) { unpins = append(unpins, d.s.pins.pin(key)) },
	}
	var added Streamed
	err := d.s.withEviction(ctx, func() (err error) {
		added, err = d.s.lowers.AddBlob(ctx, blob)
		return err
	})
	if err != nil {
		return Streamed{}, err
	}
	return added, d.s.amendActive(ctx, info.Name, id, func(_ *bolt.Tx, r *record) error {
		r.Streamed = append(r.Streamed, added.Key)
		r.StreamedUsage.Add(added.Usage)
		return nil
	})
}

// unpack writes the layer into the directory of the snapshot, as containerd's walking differ would.
func (d *Differ) unpack(ctx context.Context, id string, desc ocispec.Descriptor,
	opts []diff.ApplyOpt,
) (ocispec.Descriptor, error) {
	info, rec, err := d.s.active(ctx, id)
	if err != nil {
		return ocispec.Descriptor{}, err
	}
	options := []string{"upperdir=" + d.s.upper(id)}
	if info.Parent != "" {
		lowerdirs, err := d.s.underlay(ctx, id, info, rec)
		if err != nil {
			return ocispec.Descriptor{}, err
		}
		options = append(options, "lowerdir="+strings.Join(lowerdirs, ":"))
		// A snapshot that was to be streamed did not take over the root attributes of its lower.
		root, err := d.s.upperRoot(info.Labels, lowerdirs)
		if err != nil {
			return ocispec.Descriptor{}, err
		}
		if err := root.apply(d.s.upper(id)); err != nil {
			return ocispec.Descriptor{}, err
		}
	}
	// The applier parses an overlay mount and writes to its upper directory; it never mounts it.
	overlay := []mount.Mount{{Type: "overlay", Source: "overlay", Options: options}}
	return apply.NewFileSystemApplier(d.blobs).Apply(ctx, desc, overlay, opts...)
}

// Compare returns ErrNotImplemented: containerd's walking differ compares our mounts well.
func (d *Differ) Compare(context.Context, []mount.Mount, []mount.Mount, ...diff.Opt) (ocispec.Descriptor, error) {
	return ocispec.Descriptor{}, errdefs.ErrNotImplemented
}

func (d *Differ) open(ctx context.Context, desc ocispec.Descriptor) (io.ReadCloser, error) {
	ra, err := d.blobs.ReaderAt(ctx, desc)
	if err != nil {
		return nil, fmt.Errorf("blob %s: %w", desc.Digest, err)
	}
	if r, ok := ra.(interface{ Reader() io.Reader }); ok {
		return blobReader{r.Reader(), ra}, nil
	}
	return blobReader{bufio.NewReaderSize(content.NewReader(ra), blobBuffer), ra}, nil
}

type blobReader struct {
	io.Reader
	io.Closer
}

// decodable reports whether a media type is that of a tar, plain or in a known compression.
func decodable(ctx context.Context, mediaType string) bool {
	if !images.IsLayerType(mediaType) || strings.HasSuffix(mediaType, "+encrypted") {
		return false
	}
	compression, err := images.DiffCompression(ctx, mediaType)
	if err != nil {
		return false
	}
	switch compression {
	case "", "gzip", "zstd", "unknown": // unknown: an old Docker type that says "tar" for either
		return true
	}
	return false
}

// owns returns the id of the snapshot to whose upper directory the mounts write, or "" if it is not ours.
func (s *Snapshotter) owns(mounts []mount.Mount) string {
	if len(mounts) != 1 {
		return ""
	}
	if mounts[0].ReadOnly() {
		return ""
	}
	upper := ""
	switch m := mounts[0]; m.Type {
	case "bind":
		upper = m.Source
	case "overlay":
		for _, o := range m.Options {
			if v, ok := strings.CutPrefix(o, "upperdir="); ok {
				upper = v
			}
		}
	}
	id := filepath.Base(filepath.Dir(upper))
	if upper == "" || upper != s.upper(id) {
		return ""
	}
	return id
}

func (s *Snapshotter) active(ctx context.Context, id string) (info snapshots.Info, rec record, err error) {
	key := ""
	err = s.st.view(ctx, func(ctx context.Context, _ *bolt.Tx) error {
		key, err = nameOf(ctx, id)
		return err
	})
	if err != nil {
		return info, rec, err
	}
	_, info, rec, err = s.lookup(ctx, key)
	if err == nil && info.Kind != snapshots.KindActive {
		err = fmt.Errorf("snapshot %q is %s, expected an active one: %w", key, info.Kind, errdefs.ErrFailedPrecondition)
	}
	return info, rec, err
}

func (s *Snapshotter) amendActive(ctx context.Context, key, id string, change func(*bolt.Tx, *record) error) error {
	return s.st.update(ctx, func(ctx context.Context, tx *bolt.Tx) error {
		if found, err := nameOf(ctx, id); err != nil || found != key {
			return fmt.Errorf("snapshot %q was removed or committed meanwhile: %w", key, errdefs.ErrFailedPrecondition)
		}
		rec, err := getRecord(tx, id)
		if err != nil {
			return err
		}
		if err := change(tx, &rec); err != nil {
			return err
		}
		return putRecord(tx, id, rec)
	})
}

// underlay returns directories that show the layers below an active snapshot, top first. A snapshot
// that was to be streamed has none yet: underlay chooses and records them, so that they stay.
func (s *Snapshotter) underlay(ctx context.Context, id string, info snapshots.Info, rec record) ([]string, error) {
	for {
		var links []link
		err := s.st.view(ctx, func(ctx context.Context, tx *bolt.Tx) (err error) {
			links, err = chain(ctx, tx, info.Parent)
			return err
		})
		if err != nil {
			return nil, err
		}
		if rec.Lower != nil && !rec.Lower.Blind {
			return s.lowerdirs(ctx, rec.Lower, links)
		}
		low := directories(links)
		unpin := s.pins.pin(low.Image)
		dirs, err := s.directoriesOf(ctx, low, links)
		if err == nil {
			err = s.amendActive(ctx, info.Name, id, func(tx *bolt.Tx, r *record) error {
				r.Lower = low
				return checkDirs(tx, low)
			})
		}
		unpin()
		if !errors.Is(err, errChanged) {
			return dirs, err
		}
	}
}
