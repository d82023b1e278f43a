// Command bench compares daxfs with other programs on this machine, in one run: with containerd's own
// snapshotters and stargz-snapshotter (pull, start, memory and disk, on a real containerd); the page
// cache of images with contents in common; daxfs convert with other makers of file system images; and
// reads from the mounted image with reads from a tmpfs and from disk.
//
//	make bench
//	make bench BENCH="-rounds 3 -only daxfs,overlayfs -images python"
//
// Every round runs all variants, each on its own containerd and disk state, so that other load slows
// all of them. The result names failures, and the rest of the run continues. The result is a directory
// with Markdown tables, ratios first, the samples as CSV, and charts. The command needs root. Before
// it, run integration/bench/prepare, which makes the images, mkfs.erofs and stargz-snapshotter.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/daxfs/daxfs-snapshotter/integration/stack"
)

type options struct {
	out        string
	rounds     int
	nth        int
	containers int
	parts      string
	only       string
	images     string
	profiles   string
}

func main() {
	exitIfReader()
	var o options
	flag.StringVar(&o.out, "out", "bench-out", "directory for the results")
	flag.IntVar(&o.rounds, "rounds", 5, "rounds")
	flag.IntVar(&o.nth, "nth", 9, "containers that are started one after the other, after the first")
	flag.IntVar(&o.containers, "containers", 20, "containers of the memory test; 0 leaves it out")
	flag.StringVar(&o.parts, "parts", "", "what to compare: snapshotters, images, conversion, reads (all)")
	flag.StringVar(&o.only, "only", "", "snapshotters to compare, separated by commas (all)")
	flag.StringVar(&o.images, "images", "", "images to compare them on: python, node (both)")
	flag.StringVar(&o.profiles, "profiles", "", "directory for CPU profiles and metrics of the daemon")
	flag.Parse()
	if os.Getuid() != 0 {
		fmt.Fprintln(os.Stderr, "bench: needs root, to mount and to run containers")
		os.Exit(2)
	}
	os.Exit(stack.Isolated(func() int {
		ctx, stop := signal.NotifyContext(context.Background(), unix.SIGINT, unix.SIGTERM)
		defer stop()
		if err := measure(ctx, o); err != nil {
			fmt.Fprintln(os.Stderr, "bench:", err)
			return 1
		}
		return 0
	}))
}

func measure(ctx context.Context, o options) (err error) {
	dir, err := stack.CacheDir()
	if err != nil {
		return err
	}
	cache := filepath.Join(dir, "bench")
	b := &bench{ctx: ctx, rounds: o.rounds, nth: o.nth, containers: o.containers, profiles: o.profiles}
	parts, err := chooseNamed([]string{"snapshotters", "images", "conversion", "reads"}, o.parts,
		func(s string) string { return s })
	if err != nil {
		return err
	}
	if b.variants, err = chooseNamed(variants(cache), o.only, func(v *variant) string { return v.name }); err != nil {
		return err
	}
	if b.loads, err = chooseNamed(workloads(), o.images, func(w *workload) string { return w.name }); err != nil {
		return err
	}
	for _, w := range b.loads {
		if err := w.open(cache); err != nil {
			return err
		}
	}
	for _, d := range []string{o.out, o.profiles} {
		if d == "" {
			continue
		}
		if err := os.MkdirAll(d, 0o755); err != nil {
			return err
		}
	}
	if o.profiles != "" {
		for _, v := range b.variants {
			v.options.Config += profileConfig
		}
	}
	// Below the directory of the stacks: the next run removes what a killed run left there.
	if err := os.MkdirAll(filepath.Join(dir, "run"), 0o755); err != nil {
		return err
	}
	disk, err := os.MkdirTemp(filepath.Join(dir, "run"), "bench-")
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(disk)) }()
	daxfs, mkfs := filepath.Join(dir, "own", "daxfs"), filepath.Join(cache, "erofs", "mkfs.erofs")
	began, where := time.Now(), describe(cache)
	for _, part := range parts {
		var err error
		switch part {
		case "snapshotters":
			err = b.snapshotters(cache)
		case "images":
			err = b.imageSets()
		case "conversion":
			err = b.convert(daxfs, mkfs, disk)
		case "reads":
			err = b.read(daxfs, disk)
		}
		if ctx.Err() != nil {
			break
		}
		if err != nil {
			b.fail(err, "%s", part)
		}
	}
	b.took = time.Since(began)
	// Keep the measurements even if others failed.
	err = errors.Join(ctx.Err(), b.report(o.out, where))
	if err == nil && len(b.failures) > 0 {
		err = fmt.Errorf("not all could be measured; %q names what", filepath.Join(o.out, "results.md"))
	}
	return err
}

// snapshotters serves the images and pulls and runs all of them.
func (b *bench) snapshotters(cache string) (err error) {
	if b.registry, err = stack.NewRegistry(); err != nil {
		return err
	}
	defer func() { err = errors.Join(err, b.registry.Off()) }()
	for _, w := range b.loads {
		if w.gzip.ref, err = b.registry.Push(w.name, w.gzip.image); err != nil {
			return err
		}
		if !slices.ContainsFunc(b.variants, func(v *variant) bool { return v.esgz }) {
			continue
		}
		err := w.openStargz(b.ctx, cache)
		if err == nil {
			w.esgz.ref, err = b.registry.Push(w.name+"-estargz", w.esgz.image)
		}
		if err != nil {
			b.fail(err, "%s as eStargz", w.name)
		}
	}
	return b.run()
}

// chooseNamed returns those of all that a list names.
func chooseNamed[T any](all []T, list string, name func(T) string) ([]T, error) {
	if list == "" {
		return all, nil
	}
	var chosen []T
	for n := range strings.SplitSeq(list, ",") {
		i := slices.IndexFunc(all, func(x T) bool { return name(x) == n })
		if i < 0 {
			return nil, fmt.Errorf("there is no %q to compare", n)
		}
		chosen = append(chosen, all[i])
	}
	return chosen, nil
}
