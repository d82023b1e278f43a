package main

import (
	"bytes"
	"encoding/json"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"

	"github.com/daxfs/daxfs-snapshotter/internal/ocitest"
	"github.com/daxfs/daxfs-snapshotter/internal/treetest"
	"github.com/daxfs/daxfs-snapshotter/pool"
	"github.com/daxfs/daxfs-snapshotter/pool/lease"
	"github.com/daxfs/daxfs-snapshotter/pool/region"
	"github.com/daxfs/daxfs-snapshotter/store"
)

// TestPoolReadersAlone: a pool without a daemon tells readers which OCI images were put into it, and
// pool ls shows the users of images. Reading writes nothing, even if the reader's launcher is gone.
func TestPoolReadersAlone(t *testing.T) {
	dir := t.TempDir()
	p, place := filepath.Join(dir, "pool"), filepath.Join(dir, "guest.lease")
	must(t, os.WriteFile(place, make([]byte, lease.MinSize), 0o600))
	for _, args := range [][]string{
		{"--readers", "some"}, {"--readers", "leases"}, {"--readers", "keep", "--lease", place}, {"--lease", place},
	} {
		if status, _, errs := runPool(t,
			append(append([]string{"init", "--size", "64m"}, args...), p)...); status != statusUsage {
			t.Errorf("init %q: status %d, %s", args, status, errs)
		}
	}
	mustPool(t, "init", "--size", "64m", "--readers", "leases", "--lease", "flock:"+place, p)
	layout := ocitest.NewLayout(t, filepath.Join(dir, "layout"))
	layout.Tag("v1", layout.Manifest(ocitest.LinuxAMD64, ocitest.Layer{Tar: treetest.Tar(treetest.Reg("f", "text"))}))
	mustPool(t, "put", "--name", "example.org/web:1", p, "oci:"+layout.Dir+":v1")

	rc, err := region.Named(p)
	must(t, err)
	rc.ReadOnly = true
	r, err := region.Open(rc)
	must(t, err)
	defer r.Close()
	cat, err := pool.ReadCatalogue(r)
	must(t, err)
	raw, err := pool.ReadDocument(r, cat.Images[0])
	must(t, err)
	doc, err := store.ParseDocument(raw)
	must(t, err)
	if len(doc.Images) != 1 || doc.Images[0].Name != "example.org/web:1" ||
		doc.Images[0].Namespace != store.PutNamespace {
		t.Errorf("readers are told %+v", doc)
	}

	l, err := lease.Open(place, lease.Reader{Name: "guest\x1b1", Machine: [16]byte{1}})
	must(t, err)
	_, err = l.Claim(cat.PoolID, cat.Images[0])
	must(t, err)
	must(t, l.Close()) // nobody holds the lock: its launcher is gone
	before, err := os.ReadFile(place)
	must(t, err)
	none := []string{"--control", filepath.Join(dir, "none")}
	var state poolState
	text := mustPool(t, append([]string{"ls", "--json"}, append(none, p)...)...)
	must(t, json.Unmarshal([]byte(text), &state))
	want := []store.LeaseUser{{
		Reader: "guest\x1b1", Region: place, Images: []string{cat.Images[0].Key},
		Earlier: []string{},
	}}
	if !reflect.DeepEqual(state.Readers, want) {
		t.Errorf("ls --json: %s", text)
	}
	text = mustPool(t, append([]string{"ls"}, append(none, p)...)...)
	if !strings.Contains(text, `"guest\x1b1"`) || !strings.Contains(text, place) {
		t.Errorf("ls: %s", text)
	}
	if after, err := os.ReadFile(place); err != nil || !bytes.Equal(before, after) {
		t.Errorf("ls wrote to the lease region: %v", err)
	}
	// The owner checks, and finds that the reader is gone.
	mustPool(t, append([]string{"gc"}, append(none, p)...)...)
	mustPool(t, append([]string{"rm"}, append(none, p, "example.org/web:1")...)...)
	if text = mustPool(t, append([]string{"ls"}, append(none, p)...)...); strings.Contains(text, "guest") {
		t.Errorf("ls after the owner looked: %s", text)
	}

	// An unreadable region is named, and the other output is complete.
	must(t, os.Truncate(place, 100))
	status, text, errs := runPool(t, append([]string{"ls"}, append(none, p)...)...)
	if status != statusOK || !strings.Contains(errs, "not all readers are known") || !strings.Contains(errs, place) {
		t.Errorf("ls with a region that is too small: status %d, %s%s", status, text, errs)
	}
}
