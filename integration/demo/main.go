// Command demo shows what daxfs does on this machine: a private containerd pulls two images with files
// in common and starts containers from each, and the demo looks up their physical pages. For
// comparison, the same images then run on containerd's own snapshotters.
//
//	make demo
//	make demo POOL=tmpfs
//	go run ./integration/demo -images DIR
//
// The last form only writes the two images, as web.tar and jobs.tar, into a directory.
//
// The demo runs in its own namespaces, with state below DAXFS_TEST_CACHE (see package stack), and
// leaves only the programs there. It needs root.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"path/filepath"

	"github.com/daxfs/daxfs-snapshotter/integration/stack"
	"github.com/daxfs/daxfs-snapshotter/integration/testimage"
)

func main() {
	o := options{out: os.Stdout}
	flag.StringVar(&o.pool, "pool", "file", "what the shared memory is made of: file or tmpfs")
	flag.IntVar(&o.containers, "containers", 4, "containers of each image")
	images := flag.String("images", "", "write the two images into this directory, and do nothing else")
	flag.Parse()
	if *images != "" {
		if err := writeImages(*images); err != nil {
			fmt.Fprintln(os.Stderr, "demo:", err)
			os.Exit(1)
		}
		return
	}
	if err := o.check(); err != nil {
		fmt.Fprintln(os.Stderr, "demo:", err)
		os.Exit(2)
	}
	if stack.Outermost() {
		introduce(os.Stdout)
	}
	os.Exit(stack.Show("demo", func(ctx context.Context) error { return show(ctx, o) }))
}

type options struct {
	pool       string // kind of the pool
	containers int    // of each image
	out        io.Writer
}

func (o options) check() error {
	if o.pool != "file" && o.pool != "tmpfs" {
		return fmt.Errorf("pool %q, expected \"file\" or \"tmpfs\"", o.pool)
	}
	if o.containers < 1 || o.containers > 100 {
		return fmt.Errorf("%d containers, expected 1 to 100", o.containers)
	}
	if os.Getuid() != 0 {
		return errors.New(`needs root, to mount and to run containers: sudo env "PATH=$PATH" make demo`)
	}
	return nil
}

// introduce announces what the demo will do.
func introduce(w io.Writer) {
	cache, err := stack.CacheDir()
	if err != nil {
		cache = "the cache directory"
	}
	fmt.Fprintf(w, `This starts its own containerd, in its own namespaces; a containerd that already runs here is not
touched. Programs that are missing in %s/bin are built first: %s.
The first time that takes about ten minutes on two cores. They stay there; nothing else does.

`, cache, stack.Versions())
}

// writeImages writes the two images as OCI archives.
func writeImages(dir string) error {
	web, jobs, err := testimage.Twins()
	if err != nil {
		return err
	}
	return errors.Join(testimage.WriteArchive(filepath.Join(dir, "web.tar"), web),
		testimage.WriteArchive(filepath.Join(dir, "jobs.tar"), jobs))
}

// config returns the daemon's configuration for a kind of pool; empty for the default.
func (o options) config() string {
	if o.pool == "file" {
		return ""
	}
	return "[pool]\nkind = \"tmpfs\"\npath = \"{{run}}/pool\"\nsize = \"1GiB\"\n"
}

// show runs everything and prints the proof.
func show(ctx context.Context, o options) (err error) {
	s, err := stack.Start(stack.Options{Mode: stack.Streaming, Config: o.config()})
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, s.Close()) }()
	d := &demo{Stack: s, options: o, ctx: ctx}
	_, err = d.run()
	return err
}
