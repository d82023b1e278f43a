package integration

import (
	"fmt"
	"strings"
	"syscall"
	"testing"

	"github.com/daxfs/daxfs-snapshotter/integration/stack"
	"github.com/daxfs/daxfs-snapshotter/integration/testimage"
)

// The daemon, containerd, or both are killed while a pull by files waits for the tables of a layer, or
// for contents. After their restart the same pull succeeds, with the tree of a full pull; daemon and
// containerd are consistent, and in the end nothing is left.
func TestKilledInPartialPull(t *testing.T) {
	stack.Require(t)
	first, _ := versions(t, 300, 40)
	old, err := testimage.Chunked(first...)
	if err != nil {
		t.Fatal(err)
	}
	for name, parallel := range map[string]int{"exists": 1, "staged": 3} {
		t.Run(name, func(t *testing.T) {
			s := stack.New(t, stack.Options{Mode: stack.Streaming, ParallelUnpacks: parallel, Patient: true})
			refs := []string{s.Push("killed-old", old)}
			s.Pull(refs[0], "daxfs")
			for round, c := range []struct {
				daemon, containerd bool
				request            int // the awaited request
			}{
				{daemon: true, request: 1},
				{daemon: true, request: 3},
				{containerd: true, request: 1},
				{containerd: true, request: 3},
				{daemon: true, containerd: true, request: 2},
			} {
				layers := [][]testimage.Entry{first[0]}
				for _, l := range first[1:] {
					layers = append(layers, testimage.Updated(l, 17+round))
				}
				img, err := testimage.Chunked(layers...)
				s.Must(err)
				ref := s.Push(fmt.Sprintf("killed-%d", round), img)
				refs = append(refs, ref)
				held, release := s.Registry.HoldRange(c.request)
				pulled := make(chan error, 1)
				go func() {
					_, err := s.Try("ctr", "image", "pull", "--plain-http", "--snapshotter", "daxfs", ref)
					pulled <- err
				}()
				select {
				case <-held:
				case err := <-pulled:
					t.Fatalf("round %d: the pull ended before request %d: %v", round, c.request, err)
				}
				if c.daemon {
					s.Must(s.StopDaemon(syscall.SIGKILL))
				}
				if c.containerd {
					s.Must(s.StopContainerd(syscall.SIGKILL))
				}
				release()
				if c.daemon {
					s.Must(s.StartDaemon())
				}
				if c.containerd {
					s.Must(s.StartContainerd())
				}
				t.Logf("round %d: %v", round, <-pulled)
				s.Pull(ref, "daxfs")
				s.Pull(ref, "overlayfs")
				s.Compare(ref)
			}
			if got := pulledByFiles(t, s); got == 0 {
				t.Error("no layer was pulled by its files")
			}
			for _, lease := range strings.Fields(s.Ctr("leases", "ls", "-q")) {
				s.Ctr("leases", "rm", lease)
			}
			s.Pull(refs[0], "overlayfs")
			// The next garbage collection that removes something also removes snapshots that only the daemon knows.
			tiny := push(t, s, "tiny")
			s.Pull(tiny, "daxfs")
			s.Ctr("image", "rm", "--sync", tiny)
			if parallel > 1 { // containerd has another name than the daemon for a snapshot committed for it
				agree(t, s)
			}
			for _, ref := range refs {
				s.Ctr("image", "rm", "--sync", ref)
			}
			nothingLeft(t, s)
		})
	}
}
