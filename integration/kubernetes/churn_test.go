//go:build kubernetes

package kubernetes

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sync/errgroup"

	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/daxfs/daxfs-snapshotter/integration/stack"
)

const (
	busybox = "registry.k8s.io/" + shellImage
	named   = "gcr.io/k8s-staging-cri-tools/test-image-1:latest" // has the file /name
)

// checkDaemon checks that the state of a stopped daemon is consistent, and starts it again.
func checkDaemon(t *testing.T, s *stack.T) {
	t.Helper()
	s.Must(s.StopDaemon(syscall.SIGTERM))
	if _, err := s.CheckDaemon(); err != nil {
		t.Error(err)
	}
	s.Must(s.StartDaemon())
}

// Many pods start and end concurrently, while an image is removed below running containers and pulled
// again, and the same image comes and goes in another namespace. Nothing fails, and nothing is left.
func TestChurn(t *testing.T) {
	s := startCRI(t, "daxfs")
	r := connect(t, s)
	s.Must(r.pull(t.Context(), busybox))
	const pods = 120
	var started atomic.Int64
	var removed, elsewhere int
	g, ctx := errgroup.WithContext(t.Context())
	for range 6 {
		g.Go(func() error {
			for {
				n := started.Add(1)
				if n > pods {
					return nil
				}
				sandbox, container, err := r.run(ctx, fmt.Sprint("pod-", n), busybox)
				if err == nil {
					err = r.prints(ctx, container, "root:x:0:0:root:/root:/bin/sh\n", "head", "-n", "1", "/etc/passwd")
				}
				if err == nil {
					err = r.remove(ctx, sandbox)
				}
				if err != nil {
					return fmt.Errorf("pod %d: %w", n, err)
				}
			}
		})
	}
	g.Go(func() error {
		for started.Load() <= pods {
			if err := r.withoutImage(ctx, fmt.Sprint("named-", removed)); err != nil {
				return fmt.Errorf("an image that is removed below a container, round %d: %w", removed, err)
			}
			removed++
		}
		return nil
	})
	g.Go(func() error {
		ref := s.Registry.Addr() + "/k8s-staging-cri-tools/test-image-1:latest"
		for started.Load() <= pods && ctx.Err() == nil {
			_, err := s.Try("ctr", "image", "pull", "--plain-http", "--snapshotter", "daxfs", ref)
			if err == nil {
				var out string
				out, err = s.Try("ctr", "run", "--rm", "--snapshotter", "daxfs", ref, "elsewhere", "cat", "/name")
				if err == nil && out != "1" {
					err = fmt.Errorf("it printed %q", out)
				}
			}
			if err == nil {
				_, err = s.Try("ctr", "image", "rm", "--sync", ref)
			}
			if err != nil {
				return fmt.Errorf("the image in another namespace, round %d: %w", elsewhere, err)
			}
			elsewhere++
		}
		return nil
	})
	if err := g.Wait(); err != nil {
		t.Error(err)
	}
	t.Logf("%d pods; an image was removed %d times below its container, and %d times in another namespace", pods,
		removed, elsewhere)
	if removed < 3 || elsewhere < 3 {
		t.Error("too few to prove anything")
	}
	s.Must(r.removeAll(t.Context()))
	idle(t, s)
	checkDaemon(t, s)
}

// withoutImage runs a pod and removes its image meanwhile.
func (r *runtime) withoutImage(ctx context.Context, name string) error {
	if err := r.pull(ctx, named); err != nil {
		return err
	}
	sandbox, container, err := r.run(ctx, name, named)
	if err != nil {
		return err
	}
	_, err = r.images.RemoveImage(ctx, &cri.RemoveImageRequest{Image: &cri.ImageSpec{Image: named}})
	return errors.Join(err, r.prints(ctx, container, "1", "cat", "/name"), r.remove(ctx, sandbox))
}

// containerd is killed repeatedly while pods start. Running pods continue, interrupted starts leave
// nothing behind, and the next pod runs.
func TestKilledContainerd(t *testing.T) {
	s := startCRI(t, "daxfs")
	r := connect(t, s)
	ctx := t.Context()
	s.Must(r.pull(ctx, busybox))
	var survivors []string
	for round := range 6 {
		var mu sync.Mutex
		var wg sync.WaitGroup
		begin, enough, refused := len(survivors), make(chan struct{}), make(chan error, 4)
		for worker := range 4 {
			wg.Go(func() {
				for i := 0; ; i++ {
					_, container, err := r.run(ctx, fmt.Sprintf("pod-%d-%d-%d", round, worker, i), busybox)
					if err != nil {
						refused <- err // interrupted, at best
						return
					}
					mu.Lock()
					survivors = append(survivors, container)
					if len(survivors) == begin+4 {
						close(enough)
					}
					mu.Unlock()
				}
			})
		}
		select {
		case <-enough:
		case err := <-refused:
			t.Fatalf("a pod did not start: %v", err)
		}
		time.Sleep(time.Duration(rand.IntN(1500)) * time.Millisecond) // during the next starts
		s.Must(s.StopContainerd(syscall.SIGKILL))
		wg.Wait()
		s.Must(s.StartContainerd())
		r = connect(t, s) // the broken connection waits before it is made again
	}
	t.Logf("%d pods had started when containerd was killed", len(survivors))
	for _, container := range survivors {
		if err := r.prints(ctx, container, "root\n", "id", "-un"); err != nil {
			t.Error(err)
		}
	}
	s.Must(r.removeAll(ctx))
	idle(t, s)
	sandbox, _, err := r.run(ctx, "last", busybox)
	s.Must(err)
	s.Must(r.remove(ctx, sandbox))
	checkDaemon(t, s)
	endShims(t)
}

// endShims ends the shims that containerd was starting when it was killed and has forgotten, a problem
// with any snapshotter. The pods' shims have ended, and other tests' are in other namespaces.
func endShims(t *testing.T) {
	t.Helper()
	shims, err := filepath.Glob("/proc/[0-9]*/cmdline")
	if err != nil {
		t.Fatal(err)
	}
	for _, file := range shims {
		cmdline, _ := os.ReadFile(file) // fails if it has ended
		if program, _, _ := strings.Cut(string(cmdline), "\x00"); filepath.Base(program) != "containerd-shim-runc-v2" {
			continue
		}
		pid, err := strconv.Atoi(filepath.Base(filepath.Dir(file)))
		if err != nil {
			t.Fatal(err)
		}
		t.Logf("left by containerd: process %d", pid)
		if err := syscall.Kill(pid, syscall.SIGKILL); err != nil && !errors.Is(err, syscall.ESRCH) {
			t.Error(err)
		}
	}
}

// Pods that start while the daemon hangs complete when it continues. While it is gone they fail with
// an error that names its socket; when it is back, the next one starts.
func TestAbsentDaemon(t *testing.T) {
	s := startCRI(t, "daxfs")
	r := connect(t, s)
	ctx := t.Context()
	s.Must(r.pull(ctx, busybox))

	s.Must(s.SignalDaemon(syscall.SIGSTOP))
	g := errgroup.Group{}
	for i := range 8 {
		g.Go(func() error {
			_, container, err := r.run(ctx, fmt.Sprint("waits-", i), busybox)
			if err != nil {
				return err
			}
			return r.prints(ctx, container, "root\n", "id", "-un")
		})
	}
	time.Sleep(30 * time.Second)
	s.Must(s.SignalDaemon(syscall.SIGCONT))
	if err := g.Wait(); err != nil {
		t.Errorf("a pod that started while the daemon hung: %v", err)
	}

	s.Must(s.StopDaemon(syscall.SIGKILL))
	if sandbox, _, err := r.run(ctx, "fails", busybox); err == nil {
		t.Errorf("pod %s runs without the daemon", sandbox)
	} else {
		t.Logf("without the daemon: %v", err)
	}
	s.Must(s.StartDaemon())
	// After a failure containerd reconnects only some seconds later.
	var container string
	var err error
	for i := range 60 {
		if _, container, err = r.run(ctx, fmt.Sprint("after-", i), busybox); err == nil {
			break
		}
		time.Sleep(time.Second)
	}
	s.Must(err)
	s.Must(r.prints(ctx, container, "root\n", "id", "-un"))
	s.Must(r.removeAll(ctx))
	idle(t, s)
	checkDaemon(t, s)
}
