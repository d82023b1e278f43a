//go:build linux

package main

import (
	"archive/tar"
	"bytes"
	"context"
	"fmt"
	"io"
	"math/rand/v2"
	"path/filepath"
	"strings"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/daxfs/daxfs-snapshotter/daxfs"
	"github.com/daxfs/daxfs-snapshotter/integration/qemu/task"
	"github.com/daxfs/daxfs-snapshotter/mount"
	"github.com/daxfs/daxfs-snapshotter/mount/erofs"
	"github.com/daxfs/daxfs-snapshotter/pool"
	"github.com/daxfs/daxfs-snapshotter/pool/region"
	"github.com/daxfs/daxfs-snapshotter/store"
)

// flips makes a pool with two images in the persistent memory, like this machine's daemon. Then the
// host flips bits of the memory below it, Rounds times in contents of one image and Rounds times in metadata.
//
// One scrub must find each flip in contents. Then the image is rebuilt, and a new mount must show the
// original contents, through the page tables and with read(2), while the other image never changes.
// Check must find each flip in metadata, unless nothing reads the byte.
func (g *guest) flips() error {
	if err := awaitDevice(); err != nil {
		return err
	}
	f := &flips{g: g, random: rand.New(rand.NewPCG(11, g.Seed)), blobs: tars{}}
	driver := []mount.Driver{erofs.DAX{}}
	var err error
	f.store, err = store.Open(f.ctx(), store.Config{
		Root: "/run/store", Pool: store.Pool{Kind: region.KindPmem, Path: device}, Drivers: driver,
		Adopt: driver, Blobs: f.blobs,
	})
	if err != nil {
		return err
	}
	g.later("close the store", f.store.Close)
	victim, err := f.image("victim", 1, 100, 4096, 10_000, 70_000)
	if err != nil {
		return err
	}
	other, err := f.image("other", 5000, 20_000)
	if err != nil {
		return err
	}
	for i := range g.Rounds {
		if err := f.contents(victim, other); err != nil {
			return fmt.Errorf("flip %d of contents: %w", i, err)
		}
		g.answer.Flips++
	}
	before, err := f.listing()
	if err != nil {
		return err
	}
	for i := range g.Rounds {
		if err := f.metadata(before); err != nil {
			return fmt.Errorf("flip %d of metadata: %w", i, err)
		}
		g.answer.MetaFlips++
	}
	return nil
}

// flips is one run of that task.
type flips struct {
	hostLine
	g      *guest
	store  *store.Store
	blobs  tars
	random *rand.Rand
}

func (f *flips) ctx() context.Context { return context.Background() }

// flipped is an image and the contents of its files.
type flipped struct {
	store.Image
	dir   string // its mount point
	files map[string][]byte
}

// image puts an image with files of some sizes into the pool, and mounts it.
func (f *flips) image(name string, sizes ...int) (*flipped, error) {
	m := &flipped{files: map[string][]byte{}}
	var raw bytes.Buffer
	w := tar.NewWriter(&raw)
	for i, size := range sizes {
		b := make([]byte, size)
		for k := range b {
			b[k] = byte(f.random.Uint32())
		}
		file := fmt.Sprintf("%s%d", name, i)
		m.files[file] = b
		if err := w.WriteHeader(&tar.Header{
			Name: file, Mode: 0o644, Size: int64(size),
			Typeflag: tar.TypeReg,
		}); err != nil {
			return nil, err
		}
		if _, err := w.Write(b); err != nil {
			return nil, err
		}
	}
	if err := w.Close(); err != nil {
		return nil, err
	}
	id := digest.FromBytes(raw.Bytes())
	f.blobs[id] = raw.Bytes()
	st, err := f.store.AddBlob(f.ctx(), store.Blob{
		DiffID: id, Size: int64(raw.Len()), Pin: func(string) {}, Holder: "pin/" + name,
		Open: func(ctx context.Context) (io.ReadCloser, error) {
			return f.blobs.Open(ctx, "", ocispec.Descriptor{Digest: id})
		},
	})
	if err != nil {
		return nil, err
	}
	m.Image = store.Image{
		Key: store.ImageKey([]string{st.Key}), Layers: []store.Layer{{Key: st.Key}},
		Holder: "pin/" + name,
	}
	if m.dir, err = f.store.Lower(f.ctx(), m.Image); err != nil {
		return nil, err
	}
	return m, m.verify(m.dir)
}

// verify compares a directory with the original contents.
func (m *flipped) verify(dir string) error {
	for name, want := range m.files {
		for _, way := range task.Ways {
			got, err := contents(filepath.Join(dir, name), way)
			if err != nil {
				return err
			}
			if !bytes.Equal(got, want) {
				return fmt.Errorf("WRONG BYTES: %q in %q, by %s", name, dir, way)
			}
		}
	}
	return nil
}

// tars serves blobs to the store.
type tars map[digest.Digest][]byte

func (t tars) Find(_ context.Context, _ string, id digest.Digest) ([]store.Found, error) {
	return []store.Found{{Desc: ocispec.Descriptor{Digest: id, Size: int64(len(t[id]))}}}, nil
}

func (t tars) Open(_ context.Context, _ string, d ocispec.Descriptor) (io.ReadCloser, error) {
	return io.NopCloser(bytes.NewReader(t[d.Digest])), nil
}

// contents flips a bit in contents of m, or after them in their last page.
func (f *flips) contents(m, other *flipped) error {
	names := make([]string, 0, len(m.files))
	for i := range len(m.files) {
		names = append(names, fmt.Sprintf("victim%d", i))
	}
	name := names[f.random.IntN(len(names))]
	off, err := f.place(m.Image, name)
	if err != nil {
		return err
	}
	pages := (int64(len(m.files[name])) + 4095) / 4096
	if err := f.flip(off + f.random.Int64N(pages*4096)); err != nil {
		return err
	}
	done, err := f.store.Scrub(f.ctx(), 0)
	if err != nil {
		return err
	}
	if done.Damaged != 1 {
		return fmt.Errorf("a scrub of %d extents found %d damaged ones, expected 1", done.Extents, done.Damaged)
	}
	if err := f.store.Heal(f.ctx(), nil); err != nil {
		return err
	}
	if now, err := f.place(m.Image, name); err != nil || now == off {
		return fmt.Errorf("%q is still at %d: %w", name, off, err)
	}
	dir, err := f.store.Lower(f.ctx(), m.Image)
	if err != nil {
		return err
	}
	if dir == m.dir {
		return fmt.Errorf("the image is still mounted at %q", dir)
	}
	m.dir = dir
	if err := m.verify(dir); err != nil {
		return err
	}
	f.g.answer.Verified += int64(len(m.files))
	return other.verify(other.dir)
}

// place returns the offset in the pool of a file's contents.
func (f *flips) place(m store.Image, name string) (int64, error) {
	info, err := f.store.Find(m.Key)
	if err != nil {
		return 0, err
	}
	r := f.store.Pool().Region()
	live, err := daxfs.OpenLive(r, r.Size())
	if err != nil {
		return 0, err
	}
	img, err := live.Image(info.Slot)
	if err != nil {
		return 0, err
	}
	st, err := img.Stat(name)
	if err != nil {
		return 0, err
	}
	return st.Sys().(*daxfs.Stat).Off, nil
}

// flip makes the host flip any bit of a byte.
func (f *flips) flip(off int64) error {
	_, err := f.ask(task.Request{Op: task.OpFlip, Off: off, Bit: f.random.IntN(8)})
	return err
}

// metadata flips a bit of the tree area, and flips it back.
func (f *flips) metadata(before string) error {
	spans := f.store.Pool().TreeRanges()
	s := spans[f.random.IntN(len(spans))]
	q := task.Request{Op: task.OpFlip, Off: s[0] + f.random.Int64N(s[1]-s[0]), Bit: f.random.IntN(8)}
	if _, err := f.ask(q); err != nil {
		return err
	}
	found := false
	err := f.store.Pool().Check(f.ctx(), func(x pool.Finding) bool {
		found = found || !x.Known
		return !found
	})
	if err != nil {
		return err
	}
	if !found {
		f.g.answer.Silent++
		now, err := f.listing()
		if err != nil || now != before {
			return fmt.Errorf("a flip at %d is not found and changes what images show: %w", q.Off, err)
		}
	}
	_, err = f.ask(q)
	return err
}

// listing lists everything that the images show except contents.
func (f *flips) listing() (string, error) {
	var b strings.Builder
	r := f.store.Pool().Region()
	live, err := daxfs.OpenLive(r, r.Size())
	if err != nil {
		return "", err
	}
	for _, info := range f.store.Images() {
		img, err := live.Image(info.Slot)
		if err != nil {
			return "", err
		}
		err = img.Walk(func(path string, in daxfs.Inode) error {
			_, err := fmt.Fprintf(&b, "%s %q %d %o %d %d %v %d %d\n", info.Key, path, in.Nid, in.Mode, in.UID, in.GID,
				in.Mtime, in.Size, in.Off)
			return err
		})
		if err != nil {
			return "", err
		}
	}
	return b.String(), nil
}
