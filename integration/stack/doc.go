// Package stack runs real programs for tests: containerd, ctr, nerdctl, runc and CNI plugins at pinned
// versions, a registry on 127.0.0.1, and the daxfs-snapshotter of this tree, all of them private.
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
// Main runs the tests in a second process with its own mount, network, PID, IPC and UTS namespace.
// Shims, CNI and nerdctl keep state outside their configured directories (/run/containerd,
// /var/lib/cni, iptables chains, links). That state ends with the namespaces, and so does every
// process, however the tests end. A developer's own containerd is never touched. Resources without a
// namespace are checked and cleaned up: loop devices, cgroups.
//
// # Cache
//
// DAXFS_TEST_CACHE (default: daxfs-test below the user's cache directory) holds what is slow to make:
// the programs in bin/, images, and the directories of running tests in run/. It must be on a disk
// filesystem with room for the snapshotter's pool. It can be deleted safely when no test runs.
//
// Without root, New skips the test with that reason.
package stack
