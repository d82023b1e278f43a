package live

import (
	"bufio"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"sync"
	"testing"

	"golang.org/x/sys/unix"
)

// A helper never runs goroutines on its first thread: threads with their own working directory or
// mount namespace must end, and the first thread cannot.
func init() {
	if os.Getenv(envHelper) != "" {
		runtime.LockOSThread()
	}
}

// order is a task for a worker process.
type order struct {
	ID int
	Do string // "verify", "look", "hold", "check" or "end"

	Dir   string // shows image N
	Shape string
	Seed  uint64
	N     int

	Rnd   uint64 // for choices
	Over  string // directory for overlays; "" means none
	Tries int    // of "look"

	Hold int   // number of the holding
	How  grasp // of "hold"
}

// answer is the result of an order.
type answer struct {
	ID      int
	Objects int    // number of verified names
	Lost    int    // held names that no longer open
	Err     string // the error
	Foreign bool   // foreign bytes were read
}

// work is the helper "worker": it follows orders until its input ends.
func work(args []string) error {
	if err := join(args[0], os.Getpid()); err != nil {
		return err
	}
	in, out := json.NewDecoder(os.Stdin), json.NewEncoder(os.Stdout)
	var mu sync.Mutex
	h := holders{list: map[int]*holding{}}
	for {
		var o order
		if err := in.Decode(&o); errors.Is(err, io.EOF) {
			return nil
		} else if err != nil {
			return err
		}
		go func() {
			a := answer{ID: o.ID}
			if err := o.run(&h, &a); err != nil {
				a.Err, a.Foreign = err.Error(), errors.Is(err, errForeign)
			}
			mu.Lock()
			defer mu.Unlock()
			out.Encode(a)
		}()
	}
}

func (o *order) run(h *holders, a *answer) (err error) {
	want := func() map[string]entry { return image(shapes[o.Shape], o.Seed, o.N) }
	rnd := rand.New(rand.NewPCG(o.Rnd, 2))
	switch o.Do {
	case "verify":
		if o.Over == "" {
			a.Objects, err = verify(o.Dir, want(), rnd, false)
			return err
		}
		m, err := overlay(o.Dir, o.Over, true)
		if err != nil {
			return err
		}
		a.Objects, err = verify(m, want(), rnd, true)
		return errors.Join(err, unix.Unmount(m, 0), os.RemoveAll(o.Over))
	case "look":
		return o.look(want(), rnd, a)
	case "hold":
		return h.add(o.Hold, o, want(), rnd)
	case "check":
		return h.check(o.Hold, a)
	case "end":
		return h.end(o.Hold)
	}
	return fmt.Errorf("order %q", o.Do)
}

const erofsMagic = 0xe0f5e1e2

// look polls a directory where an image is about to appear, and verifies the image at the first moment.
func (o *order) look(want map[string]entry, rnd *rand.Rand, a *answer) (err error) {
	for range o.Tries {
		var st unix.Stat_t
		var fs unix.Statfs_t
		there := unix.Statfs(o.Dir, &fs) == nil && (fs.Type == erofsMagic || fs.Type == unix.FUSE_SUPER_MAGIC)
		if there && unix.Stat(o.Dir, &st) == nil {
			a.Objects, err = verify(o.Dir, want, rnd, false)
			return err
		}
		runtime.Gosched()
	}
	return nil
}

// overlay mounts an overlay over an image, and returns its mount point. Its directories are below dir.
func overlay(image, dir string, upper bool) (string, error) {
	m, u, w := filepath.Join(dir, "m"), filepath.Join(dir, "u"), filepath.Join(dir, "w")
	for _, d := range []string{m, u, w} {
		if err := os.MkdirAll(d, 0o755); err != nil {
			return "", err
		}
	}
	opts := fmt.Sprintf("lowerdir=%s,upperdir=%s,workdir=%s", image, u, w)
	if !upper {
		opts = fmt.Sprintf("lowerdir=%s:%s", image, u)
	}
	if err := unix.Mount("overlay", m, "overlay", 0, opts); err != nil {
		return "", fmt.Errorf("overlay over %q: %w", image, err)
	}
	return m, nil
}

// worker is the test's handle of a worker process.
type worker struct {
	cmd *exec.Cmd
	in  *json.Encoder

	mu      sync.Mutex
	next    int
	waiting map[int]chan answer
	ended   bool
}

// newWorker starts a worker in a memory cgroup.
func newWorker(t *testing.T, g *cgroup) *worker {
	t.Helper()
	w := &worker{cmd: command("worker", g.dir), waiting: map[int]chan answer{}}
	in, err := w.cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	out, err := w.cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	w.cmd.Stderr = os.Stderr
	w.in = json.NewEncoder(in)
	if err := w.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		w.receive(bufio.NewReader(out))
	}()
	t.Cleanup(func() {
		in.Close()
		<-done
		if err := w.cmd.Wait(); err != nil {
			t.Errorf("worker: %v", err)
		}
	})
	return w
}

func (w *worker) receive(r io.Reader) {
	for d := json.NewDecoder(r); ; {
		var a answer
		if d.Decode(&a) != nil {
			break
		}
		w.mu.Lock()
		c := w.waiting[a.ID]
		delete(w.waiting, a.ID)
		w.mu.Unlock()
		c <- a
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	w.ended = true
	for id, c := range w.waiting {
		c <- answer{ID: id, Err: "the worker has ended"}
	}
}

func (w *worker) start(o order) chan answer {
	c := make(chan answer, 1)
	w.mu.Lock()
	defer w.mu.Unlock()
	w.next++
	o.ID = w.next
	if w.ended {
		c <- answer{Err: "the worker has ended"}
		return c
	}
	w.waiting[o.ID] = c
	if err := w.in.Encode(o); err != nil {
		delete(w.waiting, o.ID)
		c <- answer{Err: err.Error()}
	}
	return c
}

func (w *worker) do(o order) answer { return <-w.start(o) }
