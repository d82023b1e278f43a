// Package stack runs the real thing for tests: containerd, ctr, nerdctl, runc and CNI plugins at pinned versions, a
// registry on 127.0.0.1, and the daxfs-snapshotter of this tree, all of it private.
//
//	func TestMain(m *testing.M) { os.Exit(stack.Main(m)) }
//
//	func TestPull(t *testing.T) {
//		s := stack.New(t, stack.Options{Mode: stack.Streaming})
//		ref := s.Push("tiny", image)
//		s.Ctr("image", "pull", "--plain-http", "--snapshotter", "daxfs", ref)
//	}
//
// # Isolation
//
// Main runs the tests in a second process that has its own mount, network, PID, IPC and UTS namespace. Shims, CNI and
// nerdctl keep state outside of the directories that they are told (/run/containerd, /var/lib/cni, iptables chains,
// links); in there it dies with the namespaces, and so does every process, however the tests end. A developer's own
// containerd is never touched. What the kernel has only once is checked and cleaned: loop devices, cgroups.
//
// # Cache
//
// DAXFS_TEST_CACHE (default: daxfs-test below the user's cache directory) holds what is slow to make: the programs in
// bin/, images, and the directories of running tests in run/. It must be on a disk filesystem that can hold the pool of
// the snapshotter, and is safe to delete when no test runs.
//
// Without root, New skips the test with that reason.
package stack
