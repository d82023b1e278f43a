package integration

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/daxfs/daxfs-snapshotter/integration/stack"
	"github.com/daxfs/daxfs-snapshotter/integration/testimage"
)

// crashes is how often the daemon is killed: DAXFS_TEST_CRASHES, or few enough for every run.
func crashes(t *testing.T) int {
	v := os.Getenv("DAXFS_TEST_CRASHES")
	if v == "" {
		return 12
	}
	n, err := strconv.Atoi(v)
	if err != nil {
		t.Fatalf("DAXFS_TEST_CRASHES: %v", err)
	}
	return n
}

// The daemon is killed at random moments while clients pull, run and remove. What clients ask for may fail while it is
// away; what succeeds is right. In the end everything can be pulled and shows the right tree, and after everything was
// removed nothing is left.
func TestCrashLoop(t *testing.T) {
	modes(t, func(t *testing.T, m stack.Mode) {
		s := stack.New(t, stack.Options{Mode: m, ParallelUnpacks: 2})
		seed := uint64(time.Now().UnixNano())
		t.Logf("seed %d", seed)
		const count = 4
		refs, wants := make([]string, count), make([]string, count)
		for i := range refs {
			files := testimage.SmallFiles(300, uint64(i%3))
			base, err := testimage.Busybox()
			if err != nil {
				t.Fatal(err)
			}
			img, err := testimage.Image(base, files, []testimage.Entry{
				testimage.Dir("node_modules", 0o755),
				testimage.File("own", 0o644, fmt.Appendf(nil, "%d\n", i)), testimage.Whiteout("node_modules/package-0002"),
			})
			if err != nil {
				t.Fatal(err)
			}
			refs[i] = s.Push(fmt.Sprintf("crash-%d", i), img)
			wants[i] = fmt.Sprintf("%d\n%s  /node_modules/package-0001/lib/file-50.js\n", i,
				sumOf(files, "node_modules/package-0001/lib/file-50.js"))
		}
		stop := make(chan struct{})
		var wg sync.WaitGroup
		var done, failed int
		var mu sync.Mutex
		for i := range count {
			random := rand.New(rand.NewPCG(seed, uint64(i)))
			wg.Add(1)
			go func() {
				defer wg.Done()
				for n := 0; ; n++ {
					select {
					case <-stop:
						return
					default:
					}
					err := useImage(s.Stack, refs[i], wants[i], fmt.Sprintf("crash-%d-%d", i, n), random)
					mu.Lock()
					if done++; err != nil {
						failed++
					}
					mu.Unlock()
					if errors.Is(err, errWrong) {
						t.Errorf("image %d: %v", i, err)
						return
					}
				}
			}()
		}
		random := rand.New(rand.NewPCG(seed, count))
		for range crashes(t) {
			time.Sleep(time.Duration(random.Int64N(int64(3 * time.Second))))
			s.Must(s.StopDaemon(syscall.SIGKILL))
			s.Must(s.StartDaemon())
		}
		await(t, "a round of the clients succeeds", func() bool {
			mu.Lock()
			defer mu.Unlock()
			return done > failed
		})
		close(stop)
		wg.Wait()
		t.Logf("%d rounds of clients, %d met a dead daemon", done, failed)

		for i, ref := range refs {
			s.Pull(ref, "overlayfs")
			s.Pull(ref, "daxfs")
			s.Compare(ref)
			if out := s.Run(ref, "daxfs", fmt.Sprintf("last-%d", i), "sh", "-c", script); out != wants[i] {
				t.Errorf("image %d in the end: %q", i, out)
			}
		}
		for _, id := range strings.Fields(s.Ctr("container", "ls", "-q")) {
			s.Try("ctr", "task", "rm", "--force", id) // there may be none
			s.Ctr("container", "rm", id)
		}
		for _, ref := range refs {
			s.Ctr("image", "rm", "--sync", ref)
		}
		// A crash between containerd and daemon can leave snapshots that only the daemon knows; the next collection
		// that has something to remove takes them along.
		ref := push(t, s, "tiny")
		s.Pull(ref, "daxfs")
		s.Ctr("image", "rm", "--sync", ref)
		nothingLeft(t, s)
	})
}

// errWrong marks contents that are not what they must be. No crash excuses them.
var errWrong = errors.New("wrong contents")

// script prints what shows that an image is the right one, or nothing that looks so.
const script = "cat /own && test ! -e /node_modules/package-0002 && sha256sum /node_modules/package-0001/lib/file-50.js"

// useImage pulls an image, runs it, and sometimes removes it.
func useImage(s *stack.Stack, ref, want, id string, random *rand.Rand) error {
	if _, err := s.Try("ctr", "image", "pull", "--plain-http", "--snapshotter", "daxfs", ref); err != nil {
		return err
	}
	out, err := s.Try("ctr", "run", "--rm", "--snapshotter", "daxfs", ref, id, "sh", "-c", script)
	if err == nil && out != want {
		return fmt.Errorf("%w: %q, want %q", errWrong, out, want)
	}
	if random.IntN(2) == 0 {
		_, rmErr := s.Try("ctr", "image", "rm", "--sync", ref)
		err = errors.Join(err, rmErr)
	}
	return err
}
