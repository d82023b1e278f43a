package daemon

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"testing"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/pkg/labels"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"

	"github.com/daxfs/daxfs-snapshotter/config"
)

// A pull starts with our differ and continues with one that did not see the layers below. The second
// layer is then read from its blob, so that directories that it does not list keep their attributes from below.
func TestDifferChanges(t *testing.T) {
	address := filepath.Join(t.TempDir(), "c.sock")
	cl, m := inside(t, flavours[0], func(cfg *config.Config) { cfg.Containerd.Address = address })
	ctx := namespaces.WithNamespace(t.Context(), "default")
	store := serveContents(t, m, address)

	// The lower layer gives dir a mode; walking into an empty directory would create it with another.
	below, err := m.pull(ctx, true, []file{{"other", []byte("x")}})
	m.must(err)
	mounts, err := m.sn.Prepare(ctx, "default/50/c", below)
	m.must(err)
	m.must(mount.WithTempMount(ctx, mounts, func(root string) error {
		return errors.Join(os.Mkdir(filepath.Join(root, "dir"), 0o700), os.Chmod(filepath.Join(root, "dir"), 0o751))
	}))
	st := &streaming{m.sn, m.ap, m.store}
	m.must(st.Commit(ctx, "default/51/base", "default/50/c")) // like a streamed layer
	tar := makeTar(file{"dir/walked", []byte("blob")})
	top := []string{"default/52/top", "default/53/extract-1-x top"}
	prepared, err := m.sn.Prepare(ctx, top[1], "default/51/base", snapshots.WithLabels(map[string]string{
		snapshots.LabelSnapshotRef: "top", labelDiff: digest.FromBytes(tar).String(),
	}))
	m.must(err)
	upper := upperOf(prepared)
	m.must(errors.Join(
		os.Mkdir(filepath.Join(upper, "dir"), 0o755), os.WriteFile(filepath.Join(upper, "dir/walked"), nil, 0o600)))
	m.must(m.sn.Commit(ctx, top[0], top[1]))
	m.must(cl.sn.Flush(ctx))
	if _, err := m.sn.Prepare(ctx, "default/60/c", top[0]); !errdefs.IsNotFound(err) {
		t.Errorf("without the blob: %v", err)
	}
	desc, _, err := (&streaming{store: store}).put(ctx, tar)
	m.must(err)
	label := content.Info{
		Digest: desc.Digest,
		Labels: map[string]string{labels.LabelUncompressed: digest.FromBytes(tar).String()},
	}
	_, err = store.Update(ctx, label, "labels."+labels.LabelUncompressed)
	m.must(err)
	mounts, err = m.sn.Prepare(ctx, "default/60/c", top[0])
	m.must(err)
	m.must(mount.WithTempMount(ctx, mounts, func(root string) error {
		info, err := os.Stat(filepath.Join(root, "dir"))
		if err == nil && info.Mode().Perm() != 0o751 {
			err = fmt.Errorf("dir is %s, expected the mode that it has below", info.Mode())
		}
		body, rerr := os.ReadFile(filepath.Join(root, "dir/walked"))
		if string(body) != "blob" {
			err = errors.Join(err, fmt.Errorf("the file holds %q, expected what the blob says", body))
		}
		return errors.Join(err, rerr)
	}))
}
