package snapshotter_test

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/core/snapshots/storage"
	"github.com/containerd/errdefs"
	bolt "go.etcd.io/bbolt"
	bberrors "go.etcd.io/bbolt/errors"

	"github.com/daxfs/daxfs-snapshotter/snapshotter"
)

// oldMetadata writes metadata.db like version 1: a streamed layer, an unpacked one above it, a
// container on both, and a container on plain directories above the image of the streamed layer.
func oldMetadata(t *testing.T, root string) {
	t.Helper()
	ms, err := storage.NewMetaStore(filepath.Join(root, "metadata.db"))
	if err != nil {
		t.Fatal(err)
	}
	defer ms.Close()
	err = ms.WithTransaction(context.Background(), true, func(ctx context.Context) error {
		for _, s := range []struct {
			kind              snapshots.Kind
			key, parent, name string
		}{
			{snapshots.KindActive, "default/1/extract-1-a", "", "default/2/" + chainA},
			{snapshots.KindActive, "default/3/extract-1-b", "default/2/" + chainA, "default/4/mine"},
			{snapshots.KindActive, "default/5/c", "default/4/mine", ""},
			{snapshots.KindActive, "default/6/plain", "default/4/mine", ""},
		} {
			if _, err := storage.CreateSnapshot(ctx, s.kind, s.key, s.parent); err != nil {
				return err
			}
			if s.name != "" {
				if _, err := storage.CommitActive(ctx, s.key, s.name, snapshots.Usage{}); err != nil {
					return err
				}
			}
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	if err := ms.Close(); err != nil {
		t.Fatal(err)
	}
	db, err := bolt.Open(filepath.Join(root, "metadata.db"), 0o600, nil)
	if err != nil {
		t.Fatal(err)
	}
	defer db.Close()
	err = db.Update(func(tx *bolt.Tx) error {
		own, err := tx.CreateBucket([]byte("daxfs"))
		if err != nil {
			return err
		}
		if err := own.Put([]byte("store"), []byte("0123456789abcdef")); err != nil {
			return err
		}
		records, err := own.CreateBucket([]byte("records"))
		if err != nil {
			return err
		}
		for id, text := range map[string]string{
			"1": `{"streamed":["blob/` + chainB + `"],"chain":"` + chainA + `","top":true,"built":true}`,
			"2": `{"chain":"snapshot/0123456789abcdef/2","dir":true,"ingested":true,"built":true}`,
			"3": `{"lower":{"chain":"snapshot/0123456789abcdef/2"}}`,
			"4": `{"lower":{"dirs":["2"],"chain":"` + chainA + `"}}`,
		} {
			if err := records.Put([]byte(id), []byte(text)); err != nil {
				return err
			}
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	for id := 1; id <= 4; id++ {
		for _, sub := range []string{"fs", "work"} {
			if err := os.MkdirAll(filepath.Join(root, "snapshots", fmt.Sprint(id), sub), 0o755); err != nil {
				t.Fatal(err)
			}
		}
	}
	if err := os.WriteFile(filepath.Join(root, "snapshots/2/fs/b"), nil, 0o644); err != nil {
		t.Fatal(err)
	}
}

// Metadata of the version that named images by chain IDs is migrated; all snapshots keep their layers.
func TestMigration(t *testing.T) {
	needRoot(t)
	e := &env{t: t, root: t.TempDir()}
	oldMetadata(t, e.root)
	e.fake = newFakeLowers(filepath.Join(e.root, "fake"))
	e.must(e.fake.addDir("blob/"+chainB, plainDir(t, "a")))
	e.open()
	defer func() { e.must(e.Close()); e.must(e.fake.reboot()) }()
	e.must(e.Flush(t.Context()))
	e.must(e.check())
	c, err := e.Mounts(t.Context(), "default/5/c")
	e.must(err)
	e.expectFiles(c, "a b")
	plain, err := e.Mounts(t.Context(), "default/6/plain")
	e.must(err)
	if low := option(plain, "lowerdir"); !strings.HasPrefix(low, filepath.Join(e.root, "snapshots/2/fs")+":") {
		t.Errorf("the container on directories stands on %q", low)
	}
	e.expectFiles(plain, "a b")
	for range 2 { // twice: the second start migrates nothing
		e.restart()
		e.must(e.Flush(t.Context()))
		again, err := e.Mounts(t.Context(), "default/5/c")
		if e.must(err); option(again, "lowerdir") != option(c, "lowerdir") {
			t.Errorf("%v became %v", c, again)
		}
	}
}

// Version 1 does not start on the records of this version: it creates its own bucket of records first.
func TestNoWayBackToVersionOne(t *testing.T) {
	needRoot(t)
	for name, before := range map[string]func(*testing.T, string){
		"migrated": oldMetadata,
		"new":      func(*testing.T, string) {},
	} {
		root := t.TempDir()
		before(t, root)
		fake := newFakeLowers(filepath.Join(root, "fake"))
		sn, err := snapshotter.New(t.Context(), root, fake, snapshotter.Options{})
		if err != nil {
			t.Fatal(err)
		}
		if err := sn.Close(); err != nil {
			t.Fatal(err)
		}
		db, err := bolt.Open(filepath.Join(root, "metadata.db"), 0o600, nil)
		if err != nil {
			t.Fatal(err)
		}
		err = db.Update(func(tx *bolt.Tx) error {
			_, err := tx.Bucket([]byte("daxfs")).CreateBucketIfNotExists([]byte("records"))
			return err
		})
		if !errors.Is(err, bberrors.ErrIncompatibleValue) {
			t.Errorf("%s: version 1 opens the records: %v", name, err)
		}
		if err := errors.Join(db.Close(), fake.reboot()); err != nil {
			t.Fatal(err)
		}
	}
}

func plainDir(t *testing.T, file string) string {
	t.Helper()
	dir := t.TempDir()
	if err := os.WriteFile(filepath.Join(dir, file), nil, 0o644); err != nil {
		t.Fatal(err)
	}
	return dir
}

func TestNewerMetadata(t *testing.T) {
	needRoot(t)
	root := t.TempDir()
	oldMetadata(t, root)
	db, err := bolt.Open(filepath.Join(root, "metadata.db"), 0o600, nil)
	if err != nil {
		t.Fatal(err)
	}
	err = db.Update(func(tx *bolt.Tx) error { return tx.Bucket([]byte("daxfs")).Put([]byte("version"), []byte{3}) })
	if err != nil {
		t.Fatal(err)
	}
	if err := db.Close(); err != nil {
		t.Fatal(err)
	}
	_, err = snapshotter.New(t.Context(), root, newFakeLowers(root), snapshotter.Options{})
	if !errdefs.IsFailedPrecondition(err) || !strings.Contains(err.Error(), "a newer program wrote them") {
		t.Errorf("records of version 3: %v", err)
	}
}
