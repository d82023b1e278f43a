package main

import (
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"io/fs"
	mrand "math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"time"

	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/static"
	"github.com/google/go-containerregistry/pkg/v1/types"
	"golang.org/x/sys/unix"
)

// reading is the name of the read paths among the samples.
const reading = "reads"

const (
	bigFile    = "big"
	bigSize    = 128 << 20
	smallFiles = 50_000
	page       = 4096
)

// readTmpfs is the reference; the disk is named after its filesystem.
const readTmpfs = "tmpfs"

// view is one way to read the same tree.
type view struct {
	name string
	// image and driver are empty if dir is the tree itself.
	image, driver string
	dir           string
}

// readOp is one way to read a tree.
type readOp struct {
	name string
	run  func(dir string) error
}

func readOps() []readOp {
	return []readOp{
		{"sequential", sequential},
		{"random", random},
		{"mmap faults", faults},
		{"find", find},
	}
}

// read compares reads of a tree on a tmpfs, on disk, and in an image of it mounted by each driver.
// Cold is the first read after a mount, with an empty page cache; warm is the median of the next five.
// disk is an empty directory on disk.
func (b *bench) read(daxfs, disk string) error {
	defer os.RemoveAll(scratch)
	views, err := readViews(daxfs, disk)
	if err != nil {
		return fmt.Errorf("prepare the trees to read: %w", err)
	}
	for round := range b.rounds {
		for _, op := range readOps() {
			for _, v := range views {
				if err := b.ctx.Err(); err != nil {
					return err
				}
				if err := b.readOne(daxfs, v, op, round); err != nil && b.ctx.Err() == nil {
					b.fail(err, "%s read of %s", op.name, v.name)
				}
			}
		}
	}
	return nil
}

func (b *bench) readOne(daxfs string, v view, op readOp, round int) (err error) {
	unix.Sync()
	if err := os.WriteFile("/proc/sys/vm/drop_caches", []byte("3"), 0o200); err != nil {
		return err
	}
	if v.driver != "" {
		if err := daxfsRun(daxfs, "mount", "--driver", v.driver, "--no-check", v.image, v.dir); err != nil {
			return err
		}
		defer func() { err = errors.Join(err, daxfsRun(daxfs, "umount", v.dir)) }()
	}
	var times []float64
	for range 6 {
		began := time.Now()
		if err := op.run(v.dir); err != nil {
			return err
		}
		times = append(times, float64(time.Since(began).Microseconds())/1000)
	}
	b.samples = append(b.samples,
		sample{reading, v.name, op.name + " cold ms", round, times[0]},
		sample{reading, v.name, op.name + " warm ms", round, median(times[1:])})
	fmt.Printf("round %d  %-11s %-14s  cold %.2f ms  warm %.2f ms\n", round+1, op.name, v.name, times[0],
		median(times[1:]))
	return nil
}

// readViews makes the tree, a copy on disk, and images of it on both.
func readViews(daxfs, disk string) ([]view, error) {
	tree, image := filepath.Join(scratch, "tree"), filepath.Join(scratch, "image")
	point := filepath.Join(scratch, "mnt")
	if err := errors.Join(os.RemoveAll(scratch), os.MkdirAll(point, 0o755), makeTree(tree)); err != nil {
		return nil, err
	}
	flat := filepath.Join(scratch, "tar")
	if err := writeFile(flat, func(w io.Writer) error { return tarTree(w, tree) }); err != nil {
		return nil, err
	}
	raw, err := os.ReadFile(flat)
	if err != nil {
		return nil, err
	}
	img, err := pack([]mutate.Addendum{{Layer: static.NewLayer(raw, types.OCIUncompressedLayer)}})
	if err != nil {
		return nil, err
	}
	oci := filepath.Join(scratch, "layout")
	if err := writeLayout(oci, img.image); err != nil {
		return nil, err
	}
	if err := daxfsRun(daxfs, "convert", "-o", image, "oci:"+oci); err != nil {
		return nil, err
	}
	diskTree, diskImage := filepath.Join(disk, "tree"), filepath.Join(disk, "image")
	for _, argv := range [][]string{{"cp", "-a", tree, diskTree}, {"cp", image, diskImage}} {
		if out, err := exec.Command(argv[0], argv[1:]...).CombinedOutput(); err != nil {
			return nil, fmt.Errorf("%v: %w\n%s", argv, err, out)
		}
	}
	if err := errors.Join(os.Remove(flat), os.RemoveAll(oci)); err != nil {
		return nil, err
	}
	return []view{
		{name: readTmpfs, dir: tree},
		{name: filesystem(disk), dir: diskTree},
		{name: "daxfs, erofs-file on " + filesystem(disk), image: diskImage, driver: "erofs-file", dir: point},
		{name: "daxfs, erofs-loop on tmpfs", image: image, driver: "erofs-loop", dir: point},
		{name: "daxfs, fuse on tmpfs", image: image, driver: "fuse", dir: point},
	}, nil
}

// makeTree writes one big file, and small ones in directories of 100.
func makeTree(dir string) error {
	if err := os.Mkdir(dir, 0o755); err != nil {
		return err
	}
	big := make([]byte, bigSize)
	rand.Read(big)
	if err := os.WriteFile(filepath.Join(dir, bigFile), big, 0o644); err != nil {
		return err
	}
	for i := range smallFiles {
		sub := filepath.Join(dir, fmt.Sprintf("dir-%04d", i/100))
		if i%100 == 0 {
			if err := os.Mkdir(sub, 0o755); err != nil {
				return err
			}
		}
		if err := os.WriteFile(filepath.Join(sub, fmt.Sprintf("file-with-a-usual-name-%d.py", i)), big[i:i+100],
			0o644); err != nil {
			return err
		}
	}
	return nil
}

// filesystem returns the name of the filesystem of a directory.
func filesystem(dir string) string {
	names := map[int64]string{
		unix.EXT4_SUPER_MAGIC: "ext4", unix.XFS_SUPER_MAGIC: "xfs",
		unix.BTRFS_SUPER_MAGIC: "btrfs",
	}
	var st unix.Statfs_t
	if unix.Statfs(dir, &st) == nil && names[int64(st.Type)] != "" {
		return names[int64(st.Type)]
	}
	return "disk"
}

func daxfsRun(daxfs string, args ...string) error {
	if out, err := exec.Command(daxfs, args...).CombinedOutput(); err != nil {
		return fmt.Errorf("daxfs %s: %w\n%s", args[0], err, out)
	}
	return nil
}

func sequential(dir string) error {
	f, err := os.Open(filepath.Join(dir, bigFile))
	if err != nil {
		return err
	}
	defer f.Close()
	buf := make([]byte, 1<<20)
	for {
		if _, err := f.Read(buf); errors.Is(err, io.EOF) {
			return nil
		} else if err != nil {
			return err
		}
	}
}

// random reads 4096 pages in a random order, the same each time.
func random(dir string) error {
	f, err := os.Open(filepath.Join(dir, bigFile))
	if err != nil {
		return err
	}
	defer f.Close()
	buf := make([]byte, page)
	r := mrand.New(mrand.NewPCG(1, 2))
	for range 4096 {
		if _, err := f.ReadAt(buf, r.Int64N(bigSize/page)*page); err != nil {
			return err
		}
	}
	return nil
}

// faults maps the big file and touches every page.
func faults(dir string) error {
	f, err := os.Open(filepath.Join(dir, bigFile))
	if err != nil {
		return err
	}
	defer f.Close()
	m, err := unix.Mmap(int(f.Fd()), 0, bigSize, unix.PROT_READ, unix.MAP_PRIVATE)
	if err != nil {
		return err
	}
	var sum byte
	for i := 0; i < len(m); i += page {
		sum ^= m[i]
	}
	runtime.KeepAlive(sum) // keeps the compiler from dropping the reads
	return unix.Munmap(m)
}

// find lists the tree with the attributes of every entry.
func find(dir string) error {
	return filepath.WalkDir(dir, func(_ string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		_, err = d.Info()
		return err
	})
}
