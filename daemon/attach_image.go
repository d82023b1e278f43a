package daemon

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"maps"
	"strings"
	"time"

	containerd "github.com/containerd/containerd/v2/client"
	"github.com/containerd/containerd/v2/core/content"
	cimages "github.com/containerd/containerd/v2/core/images"
	"github.com/containerd/containerd/v2/core/leases"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/identity"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/daxfs/daxfs-snapshotter/daemon/api"
	"github.com/daxfs/daxfs-snapshotter/pool"
	"github.com/daxfs/daxfs-snapshotter/store"
	"github.com/daxfs/daxfs-snapshotter/store/shared"
)

// attach makes an OCI image of a shared pool known in a namespace of containerd: snapshots, content, and the image.
func (d *Daemon) attach(ctx context.Context, namespace string, o shared.OCIImage) (a api.Attached, err error) {
	a = api.Attached{Name: o.Name, Target: o.Target, Chain: o.Chain, Pool: o.Pool}
	doc, err := d.shared.Document(o)
	if err != nil {
		return a, toErrdefs(err)
	}
	var m *store.OCIImage
	for _, i := range doc.Images {
		if i.Name == o.Name && i.Namespace == o.Namespace && i.Target.Digest == o.Target {
			m = &i
		}
	}
	if m == nil {
		return a, fmt.Errorf("the pool no longer has it: %w", errdefs.ErrNotFound)
	}
	p, err := m.Parts()
	if err != nil {
		return a, toErrdefs(fmt.Errorf("%w: %w", pool.ErrCorrupt, err))
	}
	c, err := containerd.NewWithConn(d.blobs.conn)
	if err != nil {
		return a, err
	}
	ctx = namespaces.WithNamespace(ctx, namespace)
	// Until the image refers to the blobs and snapshots, a lease protects them from the garbage collector.
	ctx, done, err := c.WithLease(ctx, leases.WithRandomID(), leases.WithExpiration(time.Hour),
		leases.WithLabel(leaseLabel, d.attachRun()))
	if err != nil {
		return a, err
	}
	defer func() { err = errors.Join(err, done(context.WithoutCancel(ctx))) }()
	w := attacher{client: c, snapshotter: d.cfg.Shared.Snapshotter, OCIParts: p, target: m.Target}
	if err := w.snapshots(ctx); err != nil {
		return a, err
	}
	if err := w.content(ctx, doc.ChainID); err != nil {
		return a, err
	}
	a.Bytes = w.written
	if err := d.record(ctx, namespace, o, &w); err != nil {
		return a, err
	}
	return a, d.offers.add(namespace, o.Name, o.Target)
}

// leaseLabel marks the leases that attaching takes; its value is the run of the daemon.
const leaseLabel = "daxfs.attach"

// attachRun identifies this run of this daemon.
func (d *Daemon) attachRun() string {
	return fmt.Sprintf("%s.%d", d.attachRoot(), d.started.UnixNano())
}

// attachRoot identifies this daemon.
func (d *Daemon) attachRoot() string { return digest.FromString(d.cfg.Root).Encoded()[:32] }

// endAttaches removes the leases that killed runs of this daemon left from attaching images. Otherwise
// the claims of those images would last as long as the lease.
func (d *Daemon) endAttaches(ctx context.Context) error {
	c, err := containerd.NewWithConn(d.blobs.conn)
	if err != nil {
		return err
	}
	spaces, err := c.NamespaceService().List(ctx)
	if err != nil {
		return err
	}
	for _, ns := range spaces {
		ctx := namespaces.WithNamespace(ctx, ns)
		list, err := c.LeasesService().List(ctx, fmt.Sprintf("labels.%q", leaseLabel))
		if err != nil {
			return fmt.Errorf("leases of namespace %q: %w", ns, err)
		}
		for _, l := range list {
			run := l.Labels[leaseLabel]
			if !strings.HasPrefix(run, d.attachRoot()+".") || run == d.attachRun() {
				continue
			}
			if err := c.LeasesService().Delete(ctx, l, leases.SynchronousDelete); err != nil &&
				!errdefs.IsNotFound(err) {
				return fmt.Errorf("lease %q: %w", l.ID, err)
			}
		}
	}
	return nil
}

// record records the image by its name. In the namespace of Kubernetes it also records the name with
// the digest, as a pull by Kubernetes does.
func (d *Daemon) record(ctx context.Context, namespace string, o shared.OCIImage, w *attacher) error {
	d.recording.Lock()
	defer d.recording.Unlock()
	labels := map[string]string{attachLabel: poolLabel(o.Pool), criLabel: "managed"}
	ours, err := w.image(ctx, o.Name, labels)
	if err != nil || !ours || namespace != criNamespace {
		return err
	}
	if name := digestName(o.Name, o.Target); name != "" {
		labels[digestLabel] = "true"
		if _, err := w.image(ctx, name, labels); err != nil {
			return err
		}
	}
	return dropDigestNames(ctx, w.client.ImageService()) // of the image that the name stood for before
}

// attacher writes one OCI image to containerd.
type attacher struct {
	client      *containerd.Client
	snapshotter string
	*store.OCIParts
	target  ocispec.Descriptor
	written int64
}

// snapshots claims the image of each prefix of the chain, bottom first, as containerd's unpacker does.
func (w *attacher) snapshots(ctx context.Context) error {
	sn := w.client.SnapshotService(w.snapshotter)
	chains := identity.ChainIDs(append([]digest.Digest(nil), w.DiffIDs...))
	parent := ""
	for i, chain := range chains {
		key := fmt.Sprintf(snapshots.UnpackKeyFormat, "attach-"+time.Now().UTC().Format("150405.000000000"), chain)
		labels := map[string]string{
			snapshots.LabelSnapshotRef: chain.String(), "containerd.io/snapshot/diff-id": w.DiffIDs[i].String(),
		}
		_, err := sn.Prepare(ctx, key, parent, snapshots.WithLabels(labels))
		switch {
		case err == nil:
			err = fmt.Errorf("no shared pool has layers 1 to %d of %d as an image (chain %s): %w",
				i+1, len(chains), chain, errdefs.ErrNotFound)
			return errors.Join(err, sn.Remove(context.WithoutCancel(ctx), key))
		case !errdefs.IsAlreadyExists(err):
			return fmt.Errorf("claim chain %s: %w", chain, err)
		}
		parent = chain.String()
	}
	return nil
}

// content writes the blobs, with the labels that tell containerd's garbage collector what they refer to.
func (w *attacher) content(ctx context.Context, chain digest.Digest) error {
	cs := w.client.ContentStore()
	top := map[string]string{"containerd.io/gc.ref.snapshot." + w.snapshotter: chain.String()}
	list := []store.ContentBlob{w.Config, w.Manifest}
	if w.Index != nil {
		list = append(list, *w.Index)
	}
	for _, blob := range list {
		if err := w.write(ctx, cs, blob); err != nil {
			return fmt.Errorf("content %s: %w", blob.Desc.Digest, err)
		}
	}
	if err := label(ctx, cs, w.Config.Desc.Digest, top); err != nil {
		return err
	}
	handler := cimages.SetChildrenMappedLabels(cs, cimages.ChildrenHandler(cs), cimages.ChildGCLabels)
	for _, blob := range list[1:] {
		if _, err := handler(ctx, blob.Desc); err != nil {
			return fmt.Errorf("labels of %s: %w", blob.Desc.Digest, err)
		}
	}
	return nil
}

func (w *attacher) write(ctx context.Context, cs content.Store, b store.ContentBlob) error {
	if _, err := cs.Info(ctx, b.Desc.Digest); err == nil {
		return nil
	}
	err := content.WriteBlob(ctx, cs, "daxfs-attach-"+b.Desc.Digest.String(), bytes.NewReader(b.Bytes), b.Desc)
	if err == nil {
		w.written += b.Desc.Size
	}
	return err
}

func label(ctx context.Context, cs content.Store, id digest.Digest, labels map[string]string) error {
	var fields []string
	for key := range labels {
		fields = append(fields, "labels."+key)
	}
	_, err := cs.Update(ctx, content.Info{Digest: id, Labels: labels}, fields...)
	return err
}

// image records the image, unless the name exists: a pulled or built image keeps its name and is not ours.
func (w *attacher) image(ctx context.Context, name string, labels map[string]string) (ours bool, err error) {
	is := w.client.ImageService()
	_, err = is.Create(ctx, cimages.Image{Name: name, Target: w.target, Labels: labels})
	if !errdefs.IsAlreadyExists(err) {
		return err == nil, err
	}
	old, err := is.Get(ctx, name)
	if err != nil {
		return false, err
	}
	if old.Target.Digest != w.target.Digest && old.Labels[attachLabel] == "" {
		return false, fmt.Errorf("there is another image of that name, %s: remove it first: %w", old.Target.Digest,
			errdefs.ErrAlreadyExists)
	}
	if old.Labels[attachLabel] == "" { // the same image, pulled by a user
		return false, nil
	}
	merged := maps.Clone(old.Labels)
	if labels[digestLabel] == "" { // a user asked for this name
		delete(merged, digestLabel)
	} else if merged[digestLabel] == "" { // a user did so before
		return true, nil
	}
	maps.Copy(merged, labels)
	_, err = is.Update(ctx, cimages.Image{Name: name, Target: w.target, Labels: merged})
	return err == nil, err
}
