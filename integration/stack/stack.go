package stack

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	v1 "github.com/google/go-containerregistry/pkg/v1"
)

// Namespace is the containerd namespace that the tests use unless they name another.
const Namespace = "daxfs-test"

// Mode selects how layers reach the snapshotter.
type Mode string

const (
	// None runs no daemon, for comparison with containerd's own snapshotters.
	None Mode = ""
	// Walking makes containerd unpack into directories; only the snapshot proxy is configured.
	Walking Mode = "walking"
	// Streaming hands layers to the daemon's differ.
	Streaming Mode = "streaming"
)

// Options configures a stack. Zero values are the defaults of the product; the zero Mode runs no daemon.
type Options struct {
	Mode Mode
	// ParallelUnpacks is the number of layers that containerd unpacks concurrently; 0 and 1 mean one.
	ParallelUnpacks int
	// Config is the daemon's configuration, TOML with the stack's Run and Dir for "{{run}}" and "{{dir}}".
	Config string
	// Containerd is TOML appended to containerd's configuration.
	Containerd string
	// Kubernetes enables containerd's plugins for Kubernetes. In Containerd, "{{run}}", "{{dir}}" and
	// "{{bin}}" are then replaced with the stack's Run and Dir, and the directory with the programs of
	// containerd and CNI.
	Kubernetes bool
	// Peer is the command line of another snapshotter, to which PeerSocket and PeerRoot are added. It
	// starts before containerd and ends after it. Empty runs none.
	Peer []string
	// Path is searched for programs before the machine's own directories, and after our programs.
	Path string
	// Patient makes containerd's connections wait while the daemon is away. Otherwise calls fail at once,
	// and for a second or more after the daemon is back.
	Patient bool
	// Registry is an existing registry, for successive stacks. It stays the caller's; nil makes a new one.
	Registry *Registry
	// Disk is the size in bytes of a separate file system for the stack's directory. Reboot would lose it.
	// 0 uses the file system of the cache.
	Disk int64
}

// Stack is a running registry, containerd and daxfs-snapshotter.
type Stack struct {
	// Dir is on a disk filesystem; state that survives a reboot is below it.
	Dir string
	// Run is on a tmpfs; sockets and the state of containerd are below it.
	Run string
	// Registry serves the pushed images.
	Registry *Registry

	options    Options
	tools      tools
	containerd *process
	daemon     *process
	peer       *process
	front      *front // nil unless Patient

	distribution      *process // nil unless started
	distributionFront *front

	before footprint
	execs  int
	closed bool
}

// Require skips the test where New would, before the test prepares much.
func Require(t testing.TB) {
	t.Helper()
	if unavailable != "" {
		t.Skip("no containerd stack: " + unavailable)
	}
}

// New starts a stack and stops it when the test ends. The test fails if a mount, a loop device or a process is left.
func New(t testing.TB, o Options) *T {
	t.Helper()
	Require(t)
	s, err := Start(o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if t.Failed() {
			s.dumpLogs(t)
		}
		if err := s.Close(); err != nil {
			t.Error(err)
		}
	})
	return &T{Stack: s, t: t}
}

// Start starts a stack outside a test, but inside Main or Isolated. The caller must call Close.
func Start(o Options) (_ *Stack, err error) {
	if unavailable != "" {
		return nil, errors.New(unavailable)
	}
	cache, err := CacheDir()
	if err != nil {
		return nil, err
	}
	s := &Stack{
		options: o,
		tools:   tools{cache: cache, bin: filepath.Join(cache, "bin"), own: filepath.Join(cache, "own")},
	}
	if err := os.MkdirAll(filepath.Join(cache, "run"), 0o755); err != nil {
		return nil, err
	}
	if s.before, err = takeFootprint(); err != nil {
		return nil, err
	}
	if s.Dir, err = os.MkdirTemp(filepath.Join(cache, "run"), "stack-"); err != nil {
		return nil, err
	}
	if s.Run, err = os.MkdirTemp("/run", "s-"); err != nil { // short, because sockets have 107 bytes
		return nil, errors.Join(err, os.RemoveAll(s.Dir))
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, s.Close())
		}
	}()
	if o.Disk > 0 {
		if err := s.makeDisk(o.Disk); err != nil {
			return nil, err
		}
	}
	// The root user of a user namespace must be able to traverse these directories.
	for _, dir := range []string{s.Dir, s.Run} {
		if err := os.Chmod(dir, 0o711); err != nil {
			return nil, err
		}
	}
	if err := os.Mkdir(filepath.Join(s.Dir, "tmp"), 0o1777); err != nil {
		return nil, err
	}
	if s.Registry = o.Registry; s.Registry == nil {
		if s.Registry, err = NewRegistry(); err != nil {
			return nil, err
		}
	}
	if o.Patient {
		if s.front, err = newFront("unix", s.Run+"/front.sock", s.daemonSocket()); err != nil {
			return nil, err
		}
	}
	if o.Mode != None {
		if err := s.StartDaemon(); err != nil {
			return nil, err
		}
	}
	if len(o.Peer) > 0 {
		if err := s.StartPeer(); err != nil {
			return nil, err
		}
	}
	return s, s.StartContainerd()
}

// Push uploads an image and returns the reference for pulling it.
func (s *Stack) Push(repository string, img v1.Image) (string, error) {
	return s.Registry.Push(repository, img)
}

// Close ends everything in the order of a machine's shutdown: containers, containerd, daemon, mounts.
// Its error names unexpected leftovers. A second call does nothing. It ends every process in the
// namespaces of Main, so stacks can follow one another.
func (s *Stack) Close() error {
	if s.closed {
		return nil
	}
	s.closed = true
	var errs []error
	if s.containerd != nil {
		errs = append(errs, s.removeContainers(), s.containerd.stop(syscall.SIGTERM))
	}
	if s.daemon != nil {
		errs = append(errs, s.daemon.stop(syscall.SIGTERM))
	}
	if s.peer != nil {
		errs = append(errs, s.peer.stop(syscall.SIGTERM))
	}
	if s.front != nil {
		errs = append(errs, s.front.Close())
	}
	errs = append(errs, s.stopDistribution(), s.unmountAll())
	if s.Registry != nil && s.options.Registry == nil {
		errs = append(errs, s.Registry.Off())
	}
	// Leftovers count against this stack and not against the next one.
	errs = append(errs, s.leaks(), killOwn(), os.RemoveAll(s.Run), os.RemoveAll(s.Dir), os.RemoveAll(s.diskFile()))
	return errors.Join(errs...)
}

// dumpLogs logs the end of the programs' output.
func (s *Stack) dumpLogs(t testing.TB) {
	for _, name := range []string{"containerd", "daxfs-snapshotter"} {
		t.Logf("the log of %s ends with:\n%s", name, tail(filepath.Join(s.Dir, name+".log")))
	}
}

// T is a Stack whose methods fail the test instead of returning errors.
type T struct {
	*Stack
	t testing.TB
}

// Push uploads an image and returns the reference to pull it by.
func (s *T) Push(repository string, img v1.Image) string {
	s.t.Helper()
	ref, err := s.Stack.Push(repository, img)
	s.must(err)
	return ref
}

// Ctr runs ctr and returns its standard output.
func (s *T) Ctr(args ...string) string { s.t.Helper(); return s.run("ctr", args...) }

// Nerdctl runs nerdctl with the daxfs snapshotter and returns its standard output.
func (s *T) Nerdctl(args ...string) string {
	s.t.Helper()
	return s.run("nerdctl", append([]string{"--snapshotter", "daxfs"}, args...)...)
}

// Pull pulls and unpacks an image.
func (s *T) Pull(ref, snapshotter string) {
	s.t.Helper()
	s.Ctr("image", "pull", "--plain-http", "--snapshotter", snapshotter, ref)
}

// Run runs a container of a pulled image until it ends, and returns its output.
func (s *T) Run(ref, snapshotter, id string, args ...string) string {
	s.t.Helper()
	return s.Ctr(append([]string{"run", "--rm", "--snapshotter", snapshotter, ref, id}, args...)...)
}

func (s *T) run(name string, args ...string) string {
	s.t.Helper()
	out, err := s.output(name, args...)
	s.must(err)
	return out
}

func (s *T) must(err error) {
	s.t.Helper()
	if err != nil {
		s.t.Fatal(err)
	}
}

// Try runs ctr or nerdctl and returns its standard output, for calls that may fail.
func (s *Stack) Try(name string, args ...string) (string, error) { return s.output(name, args...) }

// removeContainers kills and removes all containers in all namespaces of the tests.
func (s *Stack) removeContainers() error {
	namespaces, err := s.output("ctr", "namespace", "ls", "-q")
	if err != nil {
		return fmt.Errorf("containerd does not answer any more: %w", err)
	}
	var errs []error
	for _, ns := range strings.Fields(namespaces) {
		for _, kind := range []struct{ list, remove []string }{
			{[]string{"task", "ls", "-q"}, []string{"task", "rm", "--force"}},
			{[]string{"container", "ls", "-q"}, []string{"container", "rm"}},
		} {
			ids, err := s.output("ctr", append([]string{"--namespace", ns}, kind.list...)...)
			errs = append(errs, err)
			if list := strings.Fields(ids); len(list) > 0 {
				_, err := s.output("ctr", append(append([]string{"--namespace", ns}, kind.remove...), list...)...)
				errs = append(errs, err)
			}
		}
	}
	return errors.Join(errs...)
}

// Reboot does what a power failure and a boot do: every process ends at once, memory is lost (mounts,
// and everything below Run), and the daemons start again. lost, if not nil, is called while nothing
// runs, to remove other contents of memory. The registry stays as it is.
func (s *Stack) Reboot(lost func()) error {
	if err := killOwn(); err != nil {
		return err
	}
	<-s.containerd.done
	if s.daemon != nil {
		<-s.daemon.done
	}
	if err := s.unmountAll(); err != nil {
		return err
	}
	for _, dir := range []string{s.Run, "/run/containerd", "/run/nerdctl"} {
		if err := os.RemoveAll(dir); err != nil {
			return err
		}
	}
	if err := os.Mkdir(s.Run, 0o755); err != nil {
		return err
	}
	if lost != nil {
		lost()
	}
	if s.daemon != nil {
		if err := s.StartDaemon(); err != nil {
			return err
		}
	}
	return s.StartContainerd()
}

// killOwn kills every process of this PID namespace except PID 1 and this one.
func killOwn() error {
	for range 100 { // a shim may start one more meanwhile
		pids, err := ownProcesses()
		if err != nil {
			return err
		}
		if len(pids) == 0 {
			break
		}
		for _, p := range pids {
			var pid int
			if _, err := fmt.Sscan(p, &pid); err != nil {
				return err
			}
			if err := syscall.Kill(pid, syscall.SIGKILL); err != nil && !errors.Is(err, syscall.ESRCH) {
				return fmt.Errorf("kill %s: %w", p, err)
			}
		}
		time.Sleep(20 * time.Millisecond)
	}
	return nil
}

// Exec runs a command in a running container and returns its output.
func (s *Stack) Exec(id string, args ...string) (string, error) {
	s.execs++
	return s.output("ctr",
		append([]string{"task", "exec", "--exec-id", fmt.Sprintf("exec-%d", s.execs), id}, args...)...)
}

// Collect runs containerd's garbage collection and waits for it.
func (s *Stack) Collect() error {
	_, err := s.output("ctr", "content", "prune", "references")
	return err
}

// Must fails the test on an error.
func (s *T) Must(err error) { s.t.Helper(); s.must(err) }
