package main

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/daxfs/daxfs-snapshotter/integration/stack"
)

// Metrics. Seconds, unless their name says MiB.
const (
	mPull  = "pull"      // ctr image pull, which includes unpacking
	mReady = "ready"     // from pull until a container could be created: the image is built and mounted
	mCPU   = "ready cpu" // processor time of containerd, the snapshotter and their children for that
	mFirst = "first"     // the application in the first container
	mAll   = "ready + first"
	mNth   = "nth"       // a small program in each further container; median of one round
	mDisk  = "disk MiB"  // the snapshotter's files on disk
	mCache = "cache MiB" // growth of Cached (with Shmem) for the containers of the memory test, from cold
	mShmem = "shmem MiB" // growth of Shmem
	mAvail = "used MiB"  // shrinkage of MemAvailable
	mPss   = "pss MiB"   // sum of Pss of the applications
	mFile  = "pss file MiB"
)

// sample is one value of one round.
type sample struct {
	Workload, Variant, Metric string
	Round                     int
	Value                     float64
}

type bench struct {
	ctx        context.Context
	registry   *stack.Registry
	loads      []*workload
	variants   []*variant
	nth        int // number of containers started one after the other
	containers int // of the memory test; 0: none
	rounds     int
	samples    []sample
	failures   []failure
	took       time.Duration
	profiles   string // directory for the daemon's profiles; "" takes none
}

// failure is a measurement that failed, wholly or partly.
type failure struct {
	what string
	err  error
}

// fail records a failure for the report; the run continues.
func (b *bench) fail(err error, format string, args ...any) {
	f := failure{fmt.Sprintf(format, args...), err}
	b.failures = append(b.failures, f)
	fmt.Printf("FAILED  %s: %v\n", f.what, err)
}

// run runs all rounds. Each round runs every variant with every workload.
func (b *bench) run() error {
	for round := range b.rounds {
		for _, w := range b.loads {
			for _, v := range b.variants {
				if err := b.ctx.Err(); err != nil {
					return err
				}
				if err := b.turn(round, w, v); err != nil && b.ctx.Err() == nil {
					b.fail(err, "%s with %s", w.name, v.name)
				}
			}
		}
	}
	return b.ctx.Err()
}

// turn runs one variant with one workload on its own new stack.
func (b *bench) turn(round int, w *workload, v *variant) (err error) {
	if v.image(w).ref == "" {
		return errors.New("the image could not be made")
	}
	o := v.options
	o.Registry = b.registry
	s, err := stack.Start(o)
	if err != nil {
		return err
	}
	t := &turn{bench: b, Stack: s, w: w, v: v, img: v.image(w), round: round}
	defer func() { err = errors.Join(err, s.Close()) }()
	steps := []func() error{t.pull, t.first, t.further, t.disk, t.memory}
	if v.pullOnly {
		steps = steps[:2]
	}
	for _, step := range steps {
		if err := errors.Join(b.ctx.Err(), step()); err != nil {
			return err
		}
	}
	fmt.Printf("%s  round %d  %-7s %-14s", time.Now().Format(time.TimeOnly), round+1, w.name, v.name)
	for _, x := range t.taken {
		fmt.Printf("  %s %.2f", x.Metric, x.Value)
	}
	fmt.Println()
	return nil
}

type turn struct {
	*bench
	*stack.Stack
	w     *workload
	v     *variant
	img   packed
	round int
	ready float64
	taken []sample
}

func (t *turn) add(metric string, value float64) {
	x := sample{t.w.name, t.v.name, metric, t.round, value}
	t.samples, t.taken = append(t.samples, x), append(t.taken, x)
}

// pull pulls a new image, then requests a container's root as the first container will.
func (t *turn) pull() error {
	unix.Sync() // so that earlier writes do not count
	defer t.profile()()
	before, err := daemonsCPU()
	if err != nil {
		return err
	}
	began := time.Now()
	if _, err := t.Try("ctr", "image", "pull", "--plain-http", "--snapshotter", t.v.snapshotter,
		t.img.ref); err != nil {
		return err
	}
	t.add(mPull, time.Since(began).Seconds())
	if _, err := t.Try("ctr", "snapshot", "--snapshotter", t.v.snapshotter, "prepare", "bench-ready",
		t.img.chain); err != nil {
		return err
	}
	t.ready = time.Since(began).Seconds()
	t.add(mReady, t.ready)
	after, err := daemonsCPU()
	if err != nil {
		return err
	}
	t.add(mCPU, after-before)
	_, err = t.Try("ctr", "snapshot", "--snapshotter", t.v.snapshotter, "rm", "bench-ready")
	return err
}

// run runs a container to its end and returns the time in seconds.
func (t *turn) run(id string, command []string) (float64, error) {
	began := time.Now()
	_, err := t.Try("ctr",
		append([]string{"run", "--rm", "--snapshotter", t.v.snapshotter, t.img.ref, id}, command...)...)
	return time.Since(began).Seconds(), err
}

// first runs the application in the first container.
func (t *turn) first() error {
	took, err := t.run("first", t.w.app)
	if err != nil {
		return err
	}
	t.add(mFirst, took)
	t.add(mAll, t.ready+took)
	return nil
}

// further runs containers one after the other.
func (t *turn) further() error {
	var times []float64
	for n := range t.nth {
		if err := t.ctx.Err(); err != nil {
			return err
		}
		took, err := t.run(fmt.Sprintf("nth-%d", n+2), t.w.small)
		if err != nil {
			return err
		}
		times = append(times, took)
	}
	if len(times) > 0 {
		t.add(mNth, median(times))
	}
	return nil
}

// disk sums the blocks of the snapshotter's files after containerd's garbage collection.
func (t *turn) disk() error {
	if err := t.Collect(); err != nil {
		return err
	}
	var bytes int64
	for _, root := range t.v.roots(t.Stack) {
		var top unix.Stat_t
		if err := unix.Lstat(root, &top); err != nil {
			return fmt.Errorf("stat %q: %w", root, err)
		}
		seen := map[uint64]bool{}
		err := filepath.WalkDir(root, func(p string, d fs.DirEntry, err error) error {
			if errors.Is(err, fs.ErrNotExist) {
				return nil
			}
			if err != nil {
				return err
			}
			info, err := d.Info()
			if errors.Is(err, fs.ErrNotExist) {
				return nil
			}
			if err != nil {
				return err
			}
			st := info.Sys().(*syscall.Stat_t)
			if uint64(st.Dev) != top.Dev { // mounted images
				if d.IsDir() {
					return fs.SkipDir
				}
				return nil
			}
			if !seen[st.Ino] {
				seen[st.Ino] = true
				bytes += st.Blocks * 512
			}
			return nil
		})
		if err != nil {
			return err
		}
	}
	t.add(mDisk, float64(bytes)/(1<<20))
	return nil
}

// memory starts long-running containers with an empty page cache, and measures the memory.
func (t *turn) memory() error {
	if t.containers == 0 {
		return nil
	}
	unix.Sync()
	if err := os.WriteFile("/proc/sys/vm/drop_caches", []byte("3"), 0o200); err != nil {
		return err
	}
	// The reads of the client and of runc are the same for all variants, and would count as the image's.
	if _, err := t.Try("ctr", "run", "--rm", "--snapshotter", t.v.snapshotter, t.img.ref, "warm",
		"/bin/true"); err != nil {
		return err
	}
	before, err := meminfo()
	if err != nil {
		return err
	}
	var ids []string
	for n := range t.containers {
		if err := t.ctx.Err(); err != nil {
			return err
		}
		id := fmt.Sprintf("stays-%d", n+1)
		ids = append(ids, id)
		_, err := t.Try("ctr",
			append([]string{"run", "--detach", "--snapshotter", t.v.snapshotter, t.img.ref, id}, t.w.wait...)...)
		if err != nil {
			return err
		}
	}
	for _, id := range ids {
		if err := t.await(filepath.Join(t.Rootfs(id), "tmp/ready")); err != nil {
			return fmt.Errorf("container %q: %w", id, err)
		}
	}
	after, err := meminfo()
	if err != nil {
		return err
	}
	pss, file, err := t.pss()
	if err != nil {
		return err
	}
	const kiB = 1.0 / 1024
	t.add(mCache, float64(after["Cached"]-before["Cached"])*kiB)
	t.add(mShmem, float64(after["Shmem"]-before["Shmem"])*kiB)
	t.add(mAvail, float64(before["MemAvailable"]-after["MemAvailable"])*kiB)
	t.add(mPss, float64(pss)*kiB)
	t.add(mFile, float64(file)*kiB)
	return nil
}

// await waits for a file. The limit is only a safeguard.
func (t *turn) await(path string) error {
	limit := time.After(2 * time.Minute)
	for {
		if _, err := os.Stat(path); err == nil {
			return nil
		}
		select {
		case <-t.ctx.Done():
			return t.ctx.Err()
		case <-limit:
			return errors.New("its program is not ready after two minutes")
		case <-time.After(20 * time.Millisecond):
		}
	}
}

// pss returns the sum of the Pss of the programs in the containers, in KiB: each page counts divided by its users.
func (t *turn) pss() (total, file int64, err error) {
	out, err := t.Try("ctr", "task", "ls")
	if err != nil {
		return 0, 0, err
	}
	for line := range strings.Lines(out) {
		f := strings.Fields(line)
		if len(f) != 3 || f[2] != "RUNNING" {
			continue
		}
		fields, err := kilobytes("/proc/" + f[1] + "/smaps_rollup")
		if err != nil {
			return 0, 0, err
		}
		total += fields["Pss"]
		file += fields["Pss_File"]
	}
	return total, file, nil
}

// daemonsCPU returns the processor time of containerd and the snapshotter so far, in seconds. Unlike
// elapsed time it hardly depends on other load.
func daemonsCPU() (float64, error) {
	paths, err := filepath.Glob("/proc/[0-9]*/stat")
	if err != nil {
		return 0, err
	}
	var ticks int64
	for _, p := range paths {
		raw, err := os.ReadFile(p)
		if err != nil { // the process ended
			continue
		}
		// pid (name) state, and 10 fields before the times of itself and of its children.
		_, rest, _ := strings.Cut(string(raw), "(")
		name, rest, _ := strings.Cut(rest, ") ")
		if fields := strings.Fields(rest); (name == "containerd" || name == "daxfs-snapshott" || name == "stargz") &&
			len(fields) > 15 {
			for _, f := range fields[11:15] {
				n, err := strconv.ParseInt(f, 10, 64)
				if err != nil {
					return 0, fmt.Errorf("%s: %w", p, err)
				}
				ticks += n
			}
		}
	}
	return float64(ticks) / 100, nil // USER_HZ is 100 on every architecture that containerd runs on
}

func meminfo() (map[string]int64, error) { return kilobytes("/proc/meminfo") }

// kilobytes reads lines like "Cached:  123 kB".
func kilobytes(path string) (map[string]int64, error) {
	raw, err := os.ReadFile(path)
	if err != nil {
		return nil, err
	}
	m := map[string]int64{}
	for line := range strings.Lines(string(raw)) {
		name, rest, ok := strings.Cut(line, ":")
		var n int64
		if _, err := fmt.Sscan(rest, &n); ok && err == nil {
			m[name] = n
		}
	}
	return m, nil
}
