package daxfs_test

import (
	"crypto/sha256"
	"fmt"
	"io"
	"log"
	"os"
	"path/filepath"
	"strings"

	"github.com/daxfs/daxfs-snapshotter/daxfs"
	"golang.org/x/sys/unix"
)

// A self-contained image of three files. Two are one inode; all share contents that are stored once.
func ExampleNewPlan() {
	dir, err := os.MkdirTemp("", "daxfs-example")
	if err != nil {
		log.Fatal(err)
	}
	defer os.RemoveAll(dir)
	f, err := os.Create(filepath.Join(dir, "hello.daxfs"))
	if err != nil {
		log.Fatal(err)
	}
	defer f.Close()

	text := []byte("hello\n")
	data := daxfs.Data{Off: daxfs.BlockSize, Size: int64(len(text)), Sum: sha256.Sum256(text)}
	if _, err := f.WriteAt(text, data.Off); err != nil {
		log.Fatal(err)
	}
	const end = 2 * daxfs.BlockSize // end of the contents, in whole blocks

	mtime := daxfs.Time{Sec: 1_700_000_000}
	greeting := &daxfs.Node{Mode: unix.S_IFREG | 0o644, Mtime: mtime, Data: data}
	root := &daxfs.Node{Mode: unix.S_IFDIR | 0o755, Entries: map[string]*daxfs.Node{
		"greeting": greeting,
		"etc": {Mode: unix.S_IFDIR | 0o755, Entries: map[string]*daxfs.Node{
			"greeting": greeting,
			"copy":     {Mode: unix.S_IFREG | 0o644, Mtime: mtime, Data: data},
		}},
		"dev": {Mode: unix.S_IFDIR | 0o755, Entries: map[string]*daxfs.Node{
			"null": {Mode: unix.S_IFCHR | 0o666, Rdev: unix.Mkdev(1, 3)},
		}},
	}}
	plan, err := daxfs.NewPlan(root, daxfs.Options{})
	if err != nil {
		log.Fatal(err)
	}
	if err := plan.Place(daxfs.Placement{Meta: end, End: end + plan.MetaSize()}); err != nil {
		log.Fatal(err)
	}
	if err := plan.WriteTo(f); err != nil {
		log.Fatal(err)
	}

	info, err := f.Stat()
	if err != nil {
		log.Fatal(err)
	}
	fmt.Println("bytes:", info.Size(), "of which metadata:", plan.MetaSize())
	for _, l := range plan.LeftOut() {
		fmt.Println("not in the DAXFS half:", l.Path, l.Reason)
	}
	fmt.Println("check:", daxfs.Check(f, info.Size(), nil))

	fsys, err := daxfs.Open(f, info.Size())
	if err != nil {
		log.Fatal(err)
	}
	got, err := fsys.ReadFile("greeting")
	fmt.Printf("greeting: %q %v\n", got, err)
	// Output:
	// bytes: 20480 of which metadata: 12288
	// not in the DAXFS half: /dev/null character device
	// check: <nil>
	// greeting: "hello\n" <nil>
}

// An image in a pool: contents lie high and may belong to many images, the metadata lies low, and the
// image is the window from its segment to the end of the contents.
func ExamplePlan() {
	pool, err := os.CreateTemp("", "daxfs-example")
	if err != nil {
		log.Fatal(err)
	}
	defer os.Remove(pool.Name())
	defer pool.Close()
	const segment, extent = 2 << 20, 8 << 20
	motd := []byte("shared by all images")
	if _, err := pool.WriteAt(motd, extent); err != nil {
		log.Fatal(err)
	}

	root := &daxfs.Node{Mode: unix.S_IFDIR | 0o755, Entries: map[string]*daxfs.Node{
		"motd": {Mode: unix.S_IFREG | 0o644, Data: daxfs.Data{Off: extent, Size: 20, Sum: sha256.Sum256(motd)}},
	}}
	plan, err := daxfs.NewPlan(root, daxfs.Options{Label: "window"})
	if err != nil {
		log.Fatal(err)
	}
	place := daxfs.Placement{Image: segment, Meta: segment + daxfs.BlockSize, End: extent + daxfs.BlockSize}
	if err := plan.Place(place); err != nil {
		log.Fatal(err)
	}
	if err := plan.WriteTo(io.NewOffsetWriter(pool, segment)); err != nil {
		log.Fatal(err)
	}
	fmt.Println("metadata:", plan.MetaSize(), "bytes in a window of", place.End-place.Image)
	fmt.Print(strings.ReplaceAll(plan.String(), " sum=", "\n\tsum=")) // short lines
	// Output:
	// metadata: 12288 bytes in a window of 6295552
	// image uuid=d25b256622138053abc0a75b2982c5f4 label="window" epoch=0.000000000
	// erofs inodes=2 names=1 root=1 end=192
	// daxfs inodes=2 names=1 table=192 entries=320
	// core size=4096 overlay=8192
	// place image=2097152 meta=2101248 end=8392704 core=+12288 overlay=+4096 base=+12288..+6295552
	// inode 1 "/" mode=040755 owner=0:0 nlink=2 size=43 mtime=0.000000000 compact inline nid=1 daxfs=320
	//	entry "motd" 2
	// inode 2 "/motd" mode=100644 owner=0:0 nlink=1 size=20 mtime=0.000000000 compact plain nid=4 data=8388608
	//	sum=22aad251ac6306b17480f4dc453d11402bdd8604850c3a23a0b5d96a73850111
}
