package integration

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/daxfs/daxfs-snapshotter/integration/listing"
	"github.com/daxfs/daxfs-snapshotter/integration/stack"
	"github.com/daxfs/daxfs-snapshotter/integration/testimage"
)

// crashes is the number of kills: DAXFS_TEST_CRASHES, or a number small enough for every run.
func crashes(t *testing.T) int {
	v := os.Getenv("DAXFS_TEST_CRASHES")
	if v == "" {
		return 50
	}
	n, err := strconv.Atoi(v)
	if err != nil {
		t.Fatalf("DAXFS_TEST_CRASHES: %v", err)
	}
	return n
}

// The daemon, containerd, or both are killed at random moments while clients pull, run and remove, and
// an older container continues. Requests of clients may fail when one of them dies; successful ones
// have the right result. In the end containerd, the daemon and the pool are consistent, every
// committed snapshot and every image shows the right tree, and nothing is left after everything was removed.
func TestCrashLoop(t *testing.T) {
	modes(t, func(t *testing.T, m stack.Mode) {
		s := stack.New(t, stack.Options{Mode: m, ParallelUnpacks: 2, Patient: true})
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
			build := testimage.Image
			if i%2 == 1 { // pulled by files: the image that stays has most of them
				build, files = testimage.Chunked, testimage.Updated(testimage.SmallFiles(300, 0), 7+i)
			}
			img, err := build(base, files, []testimage.Entry{
				testimage.Dir("node_modules", 0o755),
				testimage.File("own", 0o644, fmt.Appendf(nil, "%d\n", i)),
				testimage.Whiteout("node_modules/package-0002"),
			})
			if err != nil {
				t.Fatal(err)
			}
			refs[i] = s.Push(fmt.Sprintf("crash-%d", i), img)
			wants[i] = fmt.Sprintf("%d\n%s  /node_modules/package-0001/lib/file-50.js\n", i,
				sumOf(files, "node_modules/package-0001/lib/file-50.js"))
		}
		kept, err := testimage.Image(testimage.SmallFiles(300, 0))
		s.Must(err)
		stays := s.Push("crash-stays", kept)
		s.Pull(stays, "daxfs")
		witness := push(t, s, "special")
		s.Pull(witness, "daxfs")
		s.Ctr("run", "--detach", "--snapshotter", "daxfs", witness, "witness", "sleep", "1000000")

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
			time.Sleep(lifetime(random))
			kill(s, random)
		}
		await(t, "a round of the clients succeeds", func() bool {
			mu.Lock()
			defer mu.Unlock()
			return done > failed
		})
		close(stop)
		wg.Wait()
		t.Logf("%d rounds of clients, %d met a dead daemon; %d layers were pulled by their files", done, failed,
			pulledByFiles(t, s))
		// Leases of pulls that a crash of containerd interrupted last for a day.
		for _, lease := range strings.Fields(s.Ctr("leases", "ls", "-q")) {
			s.Ctr("leases", "rm", lease)
		}

		// This file was not read before: it comes through the mount of the first daemon now.
		if out, err := s.Exec("witness", "sha256sum", "/s/size-5242880"); err != nil ||
			out != sumOf(testimage.SpecialLayers()[0], "s/size-5242880")+"  /s/size-5242880\n" {
			t.Errorf("the container from before: %q, %v", out, err)
		}
		for i, ref := range refs {
			s.Pull(ref, "overlayfs")
			s.Pull(ref, "daxfs")
			s.Compare(ref)
			if out := s.Run(ref, "daxfs", fmt.Sprintf("last-%d", i), "sh", "-c", script); out != wants[i] {
				t.Errorf("image %d in the end: %q", i, out)
			}
		}
		s.Pull(witness, "overlayfs")
		s.Pull(stays, "overlayfs")
		// A crash between containerd and the daemon can leave snapshots that only the daemon knows. The next
		// garbage collection that removes something removes them too.
		tiny := push(t, s, "tiny")
		s.Pull(tiny, "daxfs")
		s.Ctr("image", "rm", "--sync", tiny)
		agree(t, s)

		for _, id := range strings.Fields(s.Ctr("container", "ls", "-q")) {
			s.Try("ctr", "task", "rm", "--force", id) // there may be none
			s.Ctr("container", "rm", id)
		}
		s.Must(s.EndLostShims())
		for _, ref := range append(refs, witness, stays) {
			s.Ctr("image", "rm", "--sync", ref)
		}
		nothingLeft(t, s)
	})
}

// kill kills the daemon, containerd, or both, and restarts them.
func kill(s *stack.T, random *rand.Rand) {
	victim := random.IntN(10) // 0: containerd, 1: both, else the daemon
	if victim != 0 {
		s.Must(s.StopDaemon(syscall.SIGKILL))
	}
	if victim <= 1 {
		s.Must(s.StopContainerd(syscall.SIGKILL))
	}
	if victim != 0 {
		s.Must(s.StartDaemon())
	}
	if victim <= 1 {
		s.Must(s.StartContainerd())
	}
}

// pulledByFiles returns the number of layers pulled by files, from the daemon's log.
func pulledByFiles(t *testing.T, s *stack.T) int {
	t.Helper()
	log, err := os.ReadFile(s.DaemonLog())
	if err != nil {
		t.Fatal(err)
	}
	return strings.Count(string(log), "pulled the files of a layer that the pool did not have")
}

// lifetime returns how long a daemon lives before it is killed. Half of the daemons die while they
// recover, most of the others during a pull, a few later.
func lifetime(random *rand.Rand) time.Duration {
	most := 150 * time.Millisecond
	switch n := random.IntN(10); {
	case n == 9:
		most = 2500 * time.Millisecond
	case n >= 5:
		most = 800 * time.Millisecond
	}
	return time.Duration(random.Int64N(int64(most)))
}

// agree fails the test unless containerd and the daemon have the same snapshots, the daemon's records
// are consistent with the real state, and every committed snapshot shows the same tree with daxfs as
// with overlayfs, which must have it too. It stops the daemon and starts it again.
func agree(t *testing.T, s *stack.T) {
	t.Helper()
	s.Must(s.Collect())
	want, err := s.Snapshots("daxfs")
	s.Must(err)
	s.Must(s.StopDaemon(syscall.SIGTERM))
	left, err := s.CheckDaemon()
	if err != nil {
		t.Errorf("what the daemon has does not agree: %v", err)
	}
	s.Must(s.StartDaemon())
	slices.Sort(want)
	if slices.Sort(left.Keys); len(want) == 0 || !slices.Equal(want, left.Keys) {
		t.Errorf("containerd has the snapshots %q, the daemon has %q", want, left.Keys)
	}
	for name, got := range left.Trees {
		want, err := s.OverlayTree(name)
		s.Must(err)
		if err := listing.Diff(want, got); err != nil {
			t.Errorf("snapshot %q: %v", name, err)
		}
	}
}

// errWrong marks wrong contents, which no crash excuses.
var errWrong = errors.New("wrong contents")

// script prints output that identifies the right image.
const script = "cat /own && test ! -e /node_modules/package-0002 && sha256sum /node_modules/package-0001/lib/file-50.js"

// useImage pulls an image, runs it, and sometimes removes it.
func useImage(s *stack.Stack, ref, want, id string, random *rand.Rand) error {
	if _, err := s.Try("ctr", "image", "pull", "--plain-http", "--snapshotter", "daxfs", ref); err != nil {
		return err
	}
	out, err := s.Try("ctr", "run", "--rm", "--snapshotter", "daxfs", ref, id, "sh", "-c", script)
	switch {
	case err == nil && out == "": // see wants
		err = errors.New("ctr lost what the container printed")
	case err == nil && out != want:
		return fmt.Errorf("%w: %q, want %q", errWrong, out, want)
	}
	if random.IntN(2) == 0 {
		_, rmErr := s.Try("ctr", "image", "rm", "--sync", ref)
		err = errors.Join(err, rmErr)
	}
	return err
}
