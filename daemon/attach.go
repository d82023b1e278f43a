package daemon

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	containerd "github.com/containerd/containerd/v2/client"
	cimages "github.com/containerd/containerd/v2/core/images"
	"github.com/containerd/containerd/v2/pkg/identifiers"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/errdefs"
	"github.com/containerd/log"
	"github.com/distribution/reference"
	"github.com/opencontainers/go-digest"

	"github.com/daxfs/daxfs-snapshotter/daemon/api"
	"github.com/daxfs/daxfs-snapshotter/pool"
	"github.com/daxfs/daxfs-snapshotter/store/shared"
)

// attachLabel marks attached images; its value is the name of the pool.
const attachLabel = "daxfs.attached"

// digestLabel marks names with a digest that attaching added to others. They are removed with those.
const digestLabel = "daxfs.attached.digest"

// criLabel marks the images that belong to containerd's CRI plugin; criNamespace is its namespace.
const (
	criLabel     = "io.cri-containerd.image"
	criNamespace = "k8s.io"
)

var errNoShared = fmt.Errorf("no pool of another owner is configured (shared.pools): %w", errdefs.ErrFailedPrecondition)

func (d *Daemon) listShared(ctx context.Context) api.SharedAnswer {
	a := api.SharedAnswer{Pools: []shared.Status{}, Images: []api.SharedImage{}}
	if d.shared == nil {
		return a
	}
	d.shared.Refresh(ctx)
	a.Pools = d.shared.Status()
	for _, o := range d.shared.OCIImages() {
		a.Images = append(a.Images, api.SharedImage{
			Name: o.Name, Namespace: o.Namespace, Target: o.Target, Chain: o.Chain, Pool: o.Pool,
		})
	}
	return a
}

// attachImages attaches the OCI images that a request names, and does not stop at the first error.
func (d *Daemon) attachImages(ctx context.Context, req api.AttachRequest) ([]api.Attached, error) {
	if d.shared == nil {
		return nil, errNoShared
	}
	if err := validateAttach(req); err != nil {
		return nil, err
	}
	d.shared.Refresh(ctx)
	list, err := chooseImages(d.shared.OCIImages(), req)
	if err != nil {
		return nil, err
	}
	done := []api.Attached{}
	var errs []error
	end := time.Now().Add(attachPatience)
	for _, o := range list {
		a, err := d.attachPatiently(ctx, req.Namespace, o, end)
		if err != nil {
			errs = append(errs, fmt.Errorf("image %q: %w", o.Name, err))
			continue
		}
		done = append(done, a)
	}
	if len(errs) > 0 && len(done) > 0 {
		errs = append(errs, fmt.Errorf("%d others were attached", len(done)))
	}
	return done, errors.Join(errs...)
}

// attachPatience bounds the time in which a request tries again. gRPC connects again within three seconds.
const attachPatience = 10 * time.Second

// attachPatiently tries again until end while containerd does not reach this daemon: after a restart of
// the daemon, containerd fails calls untried for a while.
func (d *Daemon) attachPatiently(ctx context.Context, namespace string, o shared.OCIImage,
	end time.Time,
) (api.Attached, error) {
	for {
		a, err := d.attach(ctx, namespace, o)
		if !errdefs.IsUnavailable(err) || !d.blobs.up() || time.Now().After(end) {
			return a, err
		}
		select {
		case <-ctx.Done():
			return a, err
		case <-time.After(100 * time.Millisecond):
		}
	}
}

func validateAttach(r api.AttachRequest) error {
	if err := identifiers.Validate(r.Namespace); err != nil {
		return fmt.Errorf("namespace %q: %w", r.Namespace, err)
	}
	if r.All == (len(r.Names) > 0) {
		return fmt.Errorf("%d names, with all %v, expected either: %w", len(r.Names), r.All, pool.ErrInvalid)
	}
	return nil
}

// chooseImages returns the images that a request names. If several namespaces of owners have a name,
// the request's namespace wins, then the first.
func chooseImages(have []shared.OCIImage, req api.AttachRequest) ([]shared.OCIImage, error) {
	byName := map[string]shared.OCIImage{}
	var names []string
	for _, o := range have {
		old, ok := byName[o.Name]
		if !ok {
			names = append(names, o.Name)
		}
		if !ok || old.Namespace != req.Namespace && o.Namespace == req.Namespace {
			byName[o.Name] = o
		}
	}
	if !req.All {
		names = req.Names
	}
	var out []shared.OCIImage
	for _, name := range names {
		o, ok := byName[name]
		if !ok {
			return nil, fmt.Errorf("image %q is in no shared pool: %w", name, errdefs.ErrNotFound)
		}
		out = append(out, o)
	}
	return out, nil
}

// attachNew attaches the images that were not attached before.
func (d *Daemon) attachNew(ctx context.Context, namespace string) {
	list, err := chooseImages(d.shared.OCIImages(), api.AttachRequest{Namespace: namespace, All: true})
	if err != nil || len(list) == 0 || !d.blobs.up() {
		return
	}
	for _, o := range list {
		if d.offers.has(namespace, o.Name, o.Target) {
			continue
		}
		logger := log.G(ctx).WithField("image", o.Name).WithField("pool", o.Pool)
		_, err := d.attach(ctx, namespace, o)
		switch {
		case err == nil:
			logger.Info("attached an image of a shared pool")
		case ctx.Err() != nil:
			return
		case errdefs.IsUnavailable(err):
			logger.WithError(err).Debug("containerd does not answer yet")
			return
		default:
			if d.offers.fails(namespace, o.Name, err) { // retried every two seconds
				logger.WithError(err).Warn("an image of a shared pool cannot be attached")
			}
			if errdefs.IsAlreadyExists(err) { // the user has to decide; do not retry
				if err := d.offers.add(namespace, o.Name, o.Target); err != nil {
					logger.WithError(err).Warn("the attempt cannot be recorded")
				}
			}
		}
	}
}

// detachImages removes attached images from a namespace. containerd's garbage collector then ends the claims.
func (d *Daemon) detachImages(ctx context.Context, req api.AttachRequest) ([]api.Attached, error) {
	if err := validateAttach(req); err != nil {
		return nil, err
	}
	ctx = namespaces.WithNamespace(ctx, req.Namespace)
	c, err := containerd.NewWithConn(d.blobs.conn)
	if err != nil {
		return nil, err
	}
	d.recording.Lock()
	defer d.recording.Unlock()
	all, err := c.ImageService().List(ctx)
	if err != nil {
		return nil, err
	}
	done := []api.Attached{}
	var errs []error
	for _, img := range all {
		if req.All && img.Labels[digestLabel] != "" || !req.All && !slices.Contains(req.Names, img.Name) {
			continue
		}
		if img.Labels[attachLabel] == "" {
			if !req.All {
				errs = append(errs, fmt.Errorf("image %q was not attached: remove it as any other: %w", img.Name,
					errdefs.ErrFailedPrecondition))
			}
			continue
		}
		if err := c.ImageService().Delete(ctx, img.Name, cimages.SynchronousDelete()); err != nil {
			errs = append(errs, fmt.Errorf("image %q: %w", img.Name, err))
			continue
		}
		done = append(done, api.Attached{Name: img.Name, Target: img.Target.Digest, Pool: img.Labels[attachLabel]})
	}
	errs = append(errs, dropDigestNames(ctx, c.ImageService()))
	for _, name := range req.Names {
		if !slices.ContainsFunc(all, func(i cimages.Image) bool { return i.Name == name }) {
			errs = append(errs, fmt.Errorf("image %q in namespace %q: %w", name, req.Namespace, errdefs.ErrNotFound))
		}
	}
	return done, errors.Join(errs...)
}

// digestName returns the name with a digest that containerd's CRI plugin records beside a name with a
// tag. The plugin uses it to find the image for a pod that gives a digest. Other names get none, "".
func digestName(name string, target digest.Digest) string {
	ref, err := reference.ParseDockerRef(name)
	if err != nil || ref.String() != name || reference.IsNameOnly(ref) {
		return ""
	}
	if _, ok := ref.(reference.Digested); ok {
		return ""
	}
	return ref.Name() + "@" + target.String()
}

// dropDigestNames removes the names with a digest whose image is no longer attached.
func dropDigestNames(ctx context.Context, is cimages.Store) error {
	all, err := is.List(ctx, fmt.Sprintf("labels.%q", attachLabel))
	if err != nil {
		return err
	}
	needed := map[string]bool{}
	for _, img := range all {
		if img.Labels[digestLabel] == "" {
			needed[digestName(img.Name, img.Target.Digest)] = true
		}
	}
	var errs []error
	for _, img := range all {
		if img.Labels[digestLabel] == "" || needed[img.Name] {
			continue
		}
		if err := is.Delete(ctx, img.Name, cimages.SynchronousDelete()); err != nil && !errdefs.IsNotFound(err) {
			errs = append(errs, fmt.Errorf("image %q: %w", img.Name, err))
		}
	}
	return errors.Join(errs...)
}

// poolLabel returns the value of attachLabel for a pool. Labels have a limited length.
func poolLabel(name string) string {
	const most = 1024
	name = strings.ToValidUTF8(name, "?")
	return name[:min(len(name), most)]
}
