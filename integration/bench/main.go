// Command bench compares daxfs with containerd's own snapshotters on this machine: pulling, starting, memory and disk, on a
// real containerd; and daxfs convert with other programs that make file system images.
//
//	make bench
//	make bench BENCH="-rounds 3 -only daxfs,overlayfs -images python"
//
// All variants have their turn in every round, each on a containerd and a disk state of its own, so that whatever else
// slows the machine down slows all of them. The result is a Markdown table with ratios first, the samples as CSV, and
// charts, in a directory. It needs root; integration/bench/prepare makes the images and mkfs.erofs beforehand.
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

	"golang.org/x/sys/unix"

	"github.com/daxfs/daxfs-snapshotter/integration/stack"
)

// options of a run.
type options struct {
	out        string
	rounds     int
	nth        int
	containers int
	conversion bool
	only       string
	images     string
	profiles   string
}

func main() {
	var o options
	flag.StringVar(&o.out, "out", "bench-out", "directory for the results")
	flag.IntVar(&o.rounds, "rounds", 5, "rounds; 0 leaves containerd out")
	flag.IntVar(&o.nth, "nth", 19, "containers that are started one after the other, after the first")
	flag.IntVar(&o.containers, "containers", 20, "containers of the memory test; 0 leaves it out")
	flag.BoolVar(&o.conversion, "conversion", true, "compare daxfs convert with other programs")
	flag.StringVar(&o.only, "only", "", "variants to compare, separated by commas (all)")
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
	mkfs := filepath.Join(cache, "erofs")
	if b.variants, err = choose(variants(mkfs), o.only, func(v *variant) string { return v.name }); err != nil {
		return err
	}
	if b.loads, err = choose(workloads(), o.images, func(w *workload) string { return w.name }); err != nil {
		return err
	}
	if b.registry, err = stack.NewRegistry(); err != nil {
		return err
	}
	defer func() { err = errors.Join(err, b.registry.Off()) }()
	for _, w := range b.loads {
		if err := w.open(cache); err != nil {
			return err
		}
		if w.ref, err = b.registry.Push(w.name, w.image); err != nil {
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
	err = b.run()
	if err == nil && o.conversion {
		err = b.convert(mkfs)
	}
	// What was measured is worth keeping also when the rest failed.
	return errors.Join(err, b.report(o.out))
}

// choose returns those of all that a list names.
func choose[T any](all []T, list string, name func(T) string) ([]T, error) {
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
