package tree

import (
	"bytes"
	"context"
	"io"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/containerd/containerd/v2/pkg/archive"
	"github.com/containerd/log"
	"github.com/sirupsen/logrus"

	"github.com/daxfs/daxfs-snapshotter/converter/layer"
	"github.com/daxfs/daxfs-snapshotter/daxfs"
	"github.com/daxfs/daxfs-snapshotter/internal/treetest"
)

// Containerd is the oracle of these tests: its applier unpacks the same layers into one directory.

func TestMain(m *testing.M) {
	log.L.Logger.SetLevel(logrus.ErrorLevel) // containerd warns of every attribute it ignores
	os.Exit(m.Run())
}

// requireRoot skips tests that make owners and devices.
func requireRoot(t testing.TB) {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("needs root: containerd's applier sets owners and makes devices")
	}
}

// applyAll applies layers to a new directory with containerd.
func applyAll(t testing.TB, layers [][]byte) (treetest.Tree, time.Time, error) {
	t.Helper()
	root := filepath.Join(t.TempDir(), "root")
	if err := os.Mkdir(root, 0o755); err != nil {
		t.Fatal(err)
	}
	start := time.Now().Add(-time.Second) // file systems use a coarse clock
	for _, l := range layers {
		if _, err := archive.Apply(context.Background(), root, bytes.NewReader(l)); err != nil {
			return nil, start, err
		}
	}
	want, err := treetest.FromPath(root)
	if err != nil {
		t.Fatal(err)
	}
	return want, start, nil
}

// mergeAll merges the layers with this package.
func mergeAll(t testing.TB, layers [][]byte) (treetest.Tree, *Merger, error) {
	t.Helper()
	var store treetest.Store
	m := NewMerger()
	for _, b := range layers {
		l, err := layer.FromTar(context.Background(), bytes.NewReader(b), &store, layer.Limits{})
		if err != nil {
			return nil, m, err
		}
		if err := m.Apply(l); err != nil {
			return nil, m, err
		}
	}
	got, err := treetest.FromNode(m.root, store.Open)
	if err != nil {
		t.Fatal(err)
	}
	return got, m, nil
}

// compare fails the test unless containerd and Merge agree, also on whether the layers can be applied.
func compare(t testing.TB, layers [][]byte) (spared int) {
	t.Helper()
	got, m, gotErr := mergeAll(t, layers)
	if m.spared > 0 {
		return m.spared // see the package comment, and TestOpaqueHidesOnlyLower
	}
	want, start, wantErr := applyAll(t, layers)
	if wantErr != nil || gotErr != nil {
		if (wantErr == nil) != (gotErr == nil) {
			t.Errorf("containerd: %v\nmerge:      %v", wantErr, gotErr)
		}
		return 0
	}
	if d := treetest.Diff(want, got, treetest.DirTimesSince(start)); d != "" {
		t.Errorf("trees differ (- containerd, + merge):\n%s", d)
	}
	return 0
}

// zeros is contents that nobody reads.
type zeros struct{}

func (zeros) Read([]byte) (int, error) { return 0, io.EOF }

// mergeTars merges layers and drops their contents.
func mergeTars(s stack) (*daxfs.Node, error) {
	var layers []*layer.Layer
	for _, b := range s.tars() {
		l, err := layer.FromTar(context.Background(), bytes.NewReader(b), new(treetest.Store), layer.Limits{})
		if err != nil {
			return nil, err
		}
		layers = append(layers, l)
	}
	return Merge(layers)
}
