package daemon

import (
	"context"
	"errors"
	"fmt"
	"time"

	eventsapi "github.com/containerd/containerd/api/services/events/v1"
	imagesapi "github.com/containerd/containerd/api/services/images/v1"
	namespacesapi "github.com/containerd/containerd/api/services/namespaces/v1"
	containerd "github.com/containerd/containerd/v2/client"
	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/errdefs"
	"github.com/containerd/log"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/daxfs/daxfs-snapshotter/converter/source"
	"github.com/daxfs/daxfs-snapshotter/store"
)

const (
	// publishPoll is how often the daemon checks whether the pool has changed; the check is cheap.
	publishPoll = time.Second
	// publishEvery is how often it lists containerd's images, in addition to each event that they changed.
	publishEvery = time.Minute
	// maxManifest bounds a published index, manifest or configuration. Registries refuse manifests above 4 MiB.
	maxManifest = 4 << 20
	// maxManifests bounds how many manifests of an index are read.
	maxManifests = 100
)

// publishLoop keeps the readers' list of the pool's images up to date until ctx ends.
func (d *Daemon) publishLoop(ctx context.Context) {
	if !d.store.Shared() {
		return
	}
	changed := make(chan struct{}, 1)
	go d.blobs.watchImages(ctx, changed)
	var last [2]uint64
	asked := time.Time{}
	for tick := time.NewTicker(publishPoll); ; {
		select {
		case <-ctx.Done():
			tick.Stop()
			return
		case <-changed:
			asked = time.Time{}
		case <-tick.C:
		}
		if d.toldState() == last && time.Since(asked) < publishEvery {
			continue
		}
		up := d.blobs.up()
		if !up && d.toldState() == last {
			continue
		}
		publish := d.publishPuts
		if up {
			asked = time.Now()
			publish = d.publish
		}
		puts := d.store.Puts()
		if err := publish(ctx); err != nil && ctx.Err() == nil {
			log.G(ctx).WithError(err).Warn("not all images are published to readers of the pool")
		}
		last = [2]uint64{d.store.Pool().Generation(), puts}
	}
}

// toldState changes when there is something to publish that does not come from containerd.
func (d *Daemon) toldState() [2]uint64 { return [2]uint64{d.store.Pool().Generation(), d.store.Puts()} }

// publishPuts publishes images that were put by hand, which needs no containerd.
func (d *Daemon) publishPuts(ctx context.Context) error { return d.store.Publish(ctx, nil) }

// publish publishes all images once.
func (d *Daemon) publish(ctx context.Context) error {
	found, err := d.blobs.images(ctx)
	return errors.Join(err, d.store.Publish(ctx, found))
}

// watchImages signals changed when an image record of containerd changes. It resubscribes when containerd was gone.
func (b *blobs) watchImages(ctx context.Context, changed chan<- struct{}) {
	events := containerd.NewEventServiceFromClient(eventsapi.NewEventsClient(b.conn))
	for ; ctx.Err() == nil; pause(ctx, publishPoll) {
		if !b.up() {
			continue
		}
		got, errs := events.Subscribe(ctx, `topic~="^/images/"`)
		tell := func() {
			select {
			case changed <- struct{}{}:
			default: // a signal is pending
			}
		}
		tell() // for changes while there was no subscription
		for alive := true; alive; {
			select {
			case <-errs:
				alive = false
			case <-got:
				tell()
			}
		}
	}
}

// pause waits for d or until ctx ends.
func pause(ctx context.Context, d time.Duration) {
	select {
	case <-ctx.Done():
	case <-time.After(d):
	}
}

// images returns the OCI images of all namespaces of containerd whose manifest and configuration are
// there. The result is nil only with an error.
func (b *blobs) images(ctx context.Context) ([]store.OCIImage, error) {
	spaces, err := b.spaces.List(ctx, &namespacesapi.ListNamespacesRequest{})
	if err != nil {
		return nil, fmt.Errorf("containerd: %w", err)
	}
	found := []store.OCIImage{}
	records := containerd.NewImageStoreFromClient(imagesapi.NewImagesClient(b.conn))
	for _, ns := range spaces.Namespaces {
		ctx := namespaces.WithNamespace(ctx, ns.Name)
		list, err := records.List(ctx)
		if err != nil {
			return nil, fmt.Errorf("images of namespace %q: %w", ns.Name, err)
		}
		for _, rec := range list {
			// The owner of the other pool publishes this image, with the current target of its name.
			if rec.Labels[attachLabel] != "" {
				continue
			}
			of, err := b.image(ctx, ns.Name, rec.Name, rec.Target)
			if err != nil && !errdefs.IsNotFound(err) {
				log.G(ctx).WithError(err).WithField("namespace", ns.Name).WithField("image", rec.Name).
					Debug("an image is not told to readers")
			}
			found = append(found, of...)
		}
	}
	return found, ctx.Err()
}

// image returns the OCI images of an image record: one for each platform that is there.
func (b *blobs) image(ctx context.Context, namespace, name string,
	target ocispec.Descriptor,
) ([]store.OCIImage, error) {
	top, err := b.readSmall(ctx, target)
	if err != nil {
		return nil, err
	}
	m := store.OCIImage{Namespace: namespace, Name: name, Target: target}
	if !source.IsIndex(target.MediaType) {
		config, err := b.configOf(ctx, top, target.MediaType)
		if err != nil {
			return nil, err
		}
		m.Blobs = [][]byte{top, config}
		return []store.OCIImage{m}, nil
	}
	list, err := source.ParseIndex(top, target.MediaType)
	if err != nil {
		return nil, err
	}
	var out []store.OCIImage
	for _, desc := range list.Manifests[:min(len(list.Manifests), maxManifests)] {
		manifest, err := b.readSmall(ctx, desc)
		if err != nil {
			continue // mostly the manifest of another platform
		}
		config, err := b.configOf(ctx, manifest, desc.MediaType)
		if err != nil {
			continue
		}
		m.Blobs = [][]byte{top, manifest, config}
		out = append(out, m)
	}
	return out, nil
}

func (b *blobs) configOf(ctx context.Context, manifest []byte, mediaType string) ([]byte, error) {
	m, err := source.ParseManifest(manifest, mediaType)
	if err != nil {
		return nil, err
	}
	return b.readSmall(ctx, m.Config)
}

// readSmall reads a blob that is a document. The caller verifies it.
func (b *blobs) readSmall(ctx context.Context, desc ocispec.Descriptor) ([]byte, error) {
	if desc.Size <= 0 || desc.Size > maxManifest {
		return nil,
			fmt.Errorf("blob %s of %d bytes, expected 1 to %d: %w", desc.Digest, desc.Size, maxManifest,
				errdefs.ErrInvalidArgument)
	}
	return content.ReadBlob(ctx, b.store, desc)
}
