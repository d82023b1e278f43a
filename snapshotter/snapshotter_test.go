package snapshotter_test

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/errdefs"

	"github.com/daxfs/daxfs-snapshotter/snapshotter"
)

// env is a snapshotter over fake lowers that can be closed and reopened.
type env struct {
	*snapshotter.Snapshotter
	t    *testing.T
	root string
	fake *fakeLowers
	opts snapshotter.Options

	mu      sync.Mutex
	reasons []string // of fallbacks to plain directories, in order
}

func newEnv(t *testing.T, opts snapshotter.Options) *env {
	t.Helper()
	needRoot(t)
	e := &env{t: t, root: t.TempDir(), opts: opts}
	e.fake = newFakeLowers(filepath.Join(e.root, "fake"))
	e.opts.Fallback = func(reason string) {
		e.mu.Lock()
		defer e.mu.Unlock()
		e.reasons = append(e.reasons, reason)
	}
	e.open()
	t.Cleanup(func() {
		if err := errors.Join(e.Cleanup(context.Background()), e.check(), e.Close(), e.fake.reboot()); err != nil {
			t.Error(err)
		}
	})
	return e
}

func (e *env) open() {
	e.t.Helper()
	s, err := snapshotter.New(context.Background(), e.root, e.fake, e.opts)
	if err != nil {
		e.t.Fatal(err)
	}
	e.Snapshotter = s
}

// fallbacks returns the reasons of fallbacks to plain directories so far.
func (e *env) fallbacks() []string {
	e.mu.Lock()
	defer e.mu.Unlock()
	return slices.Clone(e.reasons)
}

func (e *env) restart() {
	e.t.Helper()
	e.must(e.Close())
	e.open()
}

func (e *env) check() error {
	var errs []error
	_, err := e.Check(context.Background(), func(msg string) { errs = append(errs, errors.New(msg)) })
	return errors.Join(append(errs, err)...)
}

func (e *env) must(err error) {
	e.t.Helper()
	if err != nil {
		e.t.Fatal(err)
	}
}

// eventually waits until f returns "". Until then f returns what is missing. Only a hang exceeds the wait.
func (e *env) eventually(f func() string) {
	e.t.Helper()
	missing := f()
	for range 3000 {
		if missing == "" {
			return
		}
		time.Sleep(20 * time.Millisecond)
		missing = f()
	}
	e.t.Error(missing)
}

func labels(kv ...string) snapshots.Opt {
	m := map[string]string{}
	for i := 0; i < len(kv); i += 2 {
		m[kv[i]] = kv[i+1]
	}
	return snapshots.WithLabels(m)
}

func (e *env) prepare(key, parent string, opts ...snapshots.Opt) []mount.Mount {
	e.t.Helper()
	m, err := e.Prepare(e.t.Context(), key, parent, opts...)
	e.must(err)
	return m
}

func option(mounts []mount.Mount, name string) string {
	for _, m := range mounts {
		for _, o := range m.Options {
			if v, ok := strings.CutPrefix(o, name+"="); ok {
				return v
			}
		}
	}
	return ""
}

// extractKey returns the key under which containerd unpacks the layer "<namespace>/<n>/<chain ID>".
func extractKey(name string) string {
	i := strings.LastIndex(name, "/") + 1
	return name[:i] + "extract-1-abcd " + name[i:]
}

// layer commits a snapshot unpacked by walking: one file with its own name as contents.
func (e *env) layer(name, parent, file string, opts ...snapshots.Opt) {
	e.t.Helper()
	key := extractKey(name)
	m := e.prepare(key, parent, opts...)
	dir := option(m, "upperdir")
	if dir == "" {
		dir = m[0].Source
	}
	e.must(os.WriteFile(filepath.Join(dir, file), []byte(file), 0o644))
	e.must(e.Commit(e.t.Context(), name, key, opts...))
}

// files returns the names in the root directory of the mounts.
func (e *env) files(mounts []mount.Mount) string {
	e.t.Helper()
	var names []string
	err := mount.WithTempMount(e.t.Context(), mounts, func(root string) error {
		entries, err := os.ReadDir(root)
		for _, d := range entries {
			names = append(names, d.Name())
		}
		return err
	})
	e.must(err)
	return strings.Join(names, " ")
}

func (e *env) expectFiles(mounts []mount.Mount, want string) {
	e.t.Helper()
	if got := e.files(mounts); got != want {
		e.t.Fatalf("mounts %v show %q, expected %q", mounts, got, want)
	}
}

const (
	chainA = "sha256:aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa"
	chainB = "sha256:bbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbb"
)

func TestMountShapes(t *testing.T) {
	e := newEnv(t, snapshotter.Options{})
	e.layer("default/1/"+chainA, "", "a")
	e.layer("default/2/"+chainB, "default/1/"+chainA, "b")

	m := e.prepare("default/3/c", "default/2/"+chainB)
	if len(m) != 1 || m[0].Type != "overlay" || strings.Contains(option(m, "lowerdir"), ":") {
		t.Errorf("a container stands on %v, expected one overlay over one directory", m)
	}
	e.expectFiles(m, "a b")
	v, err := e.View(t.Context(), "default/4/v", "default/2/"+chainB)
	e.must(err)
	if len(v) != 1 || v[0].Type != "overlay" || !v[0].ReadOnly() || option(v, "upperdir") == "" ||
		option(v, "workdir") == "" {
		t.Errorf("a view is %v, expected one read-only overlay with an upper directory", v)
	}
	if option(v, "lowerdir") != option(m, "lowerdir") {
		t.Errorf("the view is of %q, the container stands on %q", option(v, "lowerdir"), option(m, "lowerdir"))
	}
	e.expectFiles(v, "a b")
	// Mount the view as nerdctl and containerd do.
	e.must(mount.WithReadonlyTempMount(t.Context(), v, func(root string) error {
		_, err := os.Stat(filepath.Join(root, "b"))
		return err
	}))
	for _, mounts := range [][]mount.Mount{m, v} {
		if option(mounts, "xino") != "on" {
			t.Errorf("%v is without xino=on", mounts)
		}
	}
	x := e.prepare("default/5/extract-1-abcd sha256:ccc", "default/2/"+chainB)
	if got := strings.Count(option(x, "lowerdir"), "/fs"); got != 2 {
		t.Errorf("a layer is unpacked over %q, expected two directories", option(x, "lowerdir"))
	}
	if got, err := e.Mounts(t.Context(), "default/3/c"); err != nil || fmt.Sprint(got) != fmt.Sprint(m) {
		t.Errorf("Mounts returned %v, %v after Prepare returned %v", got, err, m)
	}
	if _, err := e.Mounts(t.Context(), "default/2/"+chainB); !errdefs.IsFailedPrecondition(err) {
		t.Errorf("Mounts of a committed snapshot: %v", err)
	}
}

// In parallel unpacking only Commit names the parent. With a bind mount, containerd's applier would
// delete the file that a whiteout names, and lose the whiteout.
func TestRebase(t *testing.T) {
	e := newEnv(t, snapshotter.Options{})
	base := e.prepare("default/1/extract-1-a "+chainA, "", labels(snapshots.LabelSnapshotRef, chainA))
	top := e.prepare("default/2/extract-1-b "+chainB, "",
		labels(snapshots.LabelSnapshotRef, chainB, "containerd.io/snapshot/parent-chain-id", chainA))
	if base[0].Type != "bind" {
		t.Errorf("the first layer is unpacked to %v, expected a bind mount", base)
	}
	upper := option(top, "upperdir")
	if top[0].Type != "overlay" || upper == "" || option(top, "lowerdir") != "" {
		t.Fatalf("a layer above is unpacked to %v, expected an overlay with an upper directory alone", top)
	}
	e.must(os.WriteFile(filepath.Join(base[0].Source, "gone"), nil, 0o644))
	e.must(os.WriteFile(filepath.Join(base[0].Source, "kept"), nil, 0o644))
	e.must(syscall.Mknod(filepath.Join(upper, "gone"), syscall.S_IFCHR, 0))
	e.must(e.Commit(t.Context(), "default/3/"+chainA, "default/1/extract-1-a "+chainA))
	e.must(e.Commit(t.Context(), "default/4/"+chainB, "default/2/extract-1-b "+chainB,
		snapshots.WithParent("default/3/"+chainA)))
	e.expectFiles(e.prepare("default/5/c", "default/4/"+chainB), "kept")
}

// Two namespaces with the same image: it is built once, and freed with the last of them.
func TestNamespacesShare(t *testing.T) {
	e := newEnv(t, snapshotter.Options{})
	p := newPull(e)
	p.stream("one/1/"+chainA, "", tarOf("a"))
	p.stream("two/2/"+chainA, "", tarOf("a"))
	a := e.prepare("one/3/c", "one/1/"+chainA)
	b := e.prepare("two/4/c", "two/2/"+chainA)
	if option(a, "lowerdir") != option(b, "lowerdir") || e.fake.state().builds[1] != 1 {
		t.Errorf("%q and %q, built %d times", option(a, "lowerdir"), option(b, "lowerdir"), e.fake.state().builds[1])
	}
	for _, key := range []string{"one/3/c", "one/1/" + chainA} {
		e.must(e.Remove(t.Context(), key))
	}
	e.must(e.Cleanup(t.Context()))
	e.expectFiles(b, "a")
	for _, key := range []string{"two/4/c", "two/2/" + chainA} {
		e.must(e.Remove(t.Context(), key))
	}
	e.must(e.Flush(t.Context()))
	e.must(e.Cleanup(t.Context()))
	if len(e.fake.state().images)+len(e.fake.state().layers) != 0 {
		t.Errorf("images %v and layers %v are left over", e.fake.state().images, e.fake.state().layers)
	}
}

// A namespace does not get what another namespace unpacked under the name of a chain.
func TestNamesAreNotBelieved(t *testing.T) {
	e := newEnv(t, snapshotter.Options{})
	e.layer("one/1/"+chainA, "", "evil")
	e.layer("two/2/"+chainA, "", "good")
	p := newPull(e)
	p.stream("three/3/"+chainA, "", tarOf("streamed"))
	e.expectFiles(e.prepare("one/4/c", "one/1/"+chainA), "evil")
	e.expectFiles(e.prepare("two/5/c", "two/2/"+chainA), "good")
	e.expectFiles(e.prepare("three/6/c", "three/3/"+chainA), "streamed")
}

func TestBuiltAheadOfContainers(t *testing.T) {
	e := newEnv(t, snapshotter.Options{})
	inner := labels("containerd.io/snapshot/cri.layer-digest", "d1", "containerd.io/snapshot/cri.image-layers", "d1,d2")
	top := labels("containerd.io/snapshot/cri.layer-digest", "d2", "containerd.io/snapshot/cri.image-layers", "d2")
	e.layer("k8s.io/1/"+chainA, "", "a", inner)
	e.layer("k8s.io/2/"+chainB, "k8s.io/1/"+chainA, "b", top)
	e.layer("plain/3/one", "", "a")
	e.layer("plain/4/two", "plain/3/one", "b")
	e.layer("plain/5/three", "plain/4/two", "c")
	e.must(e.Flush(t.Context()))
	if e.fake.state().builds[1] != 0 || e.fake.state().builds[2] != 1 {
		t.Errorf("with labels: inner layer built %d times, top %d times", e.fake.state().builds[1],
			e.fake.state().builds[2])
	}
	if e.fake.state().builds[3] != 0 {
		t.Error("without labels an image was built that nobody asked for")
	}
	if len(e.fake.state().layers) != 5 {
		t.Errorf("stored %v, expected five layers", e.fake.state().layers)
	}
}

// The lower of a snapshot stays the same after a restart of the process or a loss of memory.
func TestLowerIsKept(t *testing.T) {
	e := newEnv(t, snapshotter.Options{})
	e.layer("default/1/"+chainA, "", "a")
	before := e.prepare("default/2/c", "default/1/"+chainA)
	e.fake.setFull(true)
	e.layer("default/3/"+chainB, "default/1/"+chainA, "b")
	plain := e.prepare("default/4/c", "default/3/"+chainB)
	e.fake.setFull(false)
	if strings.Count(option(plain, "lowerdir"), "/fs") != 2 || strings.Join(e.fallbacks(), " ") != "full" {
		t.Fatalf("without room a container stands on %v, fallbacks %q", plain, e.fallbacks())
	}
	e.expectFiles(plain, "a b")
	e.must(e.Flush(t.Context()))
	for range 2 {
		e.restart()
		e.must(e.fake.reboot())
		for key, want := range map[string][]mount.Mount{"default/2/c": before, "default/4/c": plain} {
			got, err := e.Mounts(t.Context(), key)
			if err != nil || fmt.Sprint(got) != fmt.Sprint(want) {
				t.Fatalf("%s: %v, %v; it was %v", key, got, err, want)
			}
		}
		e.expectFiles(before, "a")
		e.expectFiles(plain, "a b")
	}
}

func TestRestartTakesUpWork(t *testing.T) {
	e := newEnv(t, snapshotter.Options{})
	e.fake.setFail(errors.New("the disk is tired"))
	top := labels("containerd.io/snapshot/cri.layer-digest", "d2", "containerd.io/snapshot/cri.image-layers", "d2")
	e.layer("default/1/"+chainA, "", "a", top)
	e.must(e.Flush(t.Context()))
	if len(e.fake.state().layers) != 0 {
		t.Fatalf("stored %v", e.fake.state().layers)
	}
	e.must(os.MkdirAll(filepath.Join(e.root, "snapshots", "new-1234", "fs"), 0o700))
	e.must(os.MkdirAll(filepath.Join(e.root, "snapshots", "77", "fs"), 0o700))
	e.fake.setFail(nil)
	e.restart()
	e.must(e.Flush(t.Context()))
	if len(e.fake.state().layers) != 1 || e.fake.state().builds[1] != 1 {
		t.Errorf("after a restart layers %v are stored and images %v built", e.fake.state().layers,
			e.fake.state().builds)
	}
	e.must(e.check())
}

func TestErrorWithoutFallback(t *testing.T) {
	e := newEnv(t, snapshotter.Options{})
	e.layer("default/1/a", "", "a")
	if _, err := e.Prepare(t.Context(), "default/2/c", "default/9/nothing"); !errdefs.IsNotFound(err) {
		t.Errorf("unknown parent: %v", err)
	}
	e.prepare("default/3/c", "default/1/a")
	if _, err := e.Prepare(t.Context(), "default/4/d", "default/3/c"); !errdefs.IsInvalidArgument(err) {
		t.Errorf("parent that is not committed: %v", err)
	}
	if _, err := e.Prepare(t.Context(), "default/3/c", "default/1/a"); !errdefs.IsAlreadyExists(err) {
		t.Errorf("key in use: %v", err)
	}
	if err := e.Remove(t.Context(), "default/1/a"); !errdefs.IsFailedPrecondition(err) {
		t.Errorf("removal of a parent: %v", err)
	}
	if err := e.Commit(t.Context(), "default/5/x", "default/1/a"); !errdefs.IsFailedPrecondition(err) {
		t.Errorf("commit of a committed snapshot: %v", err)
	}
}

func TestUserNamespace(t *testing.T) {
	mapping := []snapshots.Opt{labels(snapshots.LabelSnapshotUIDMapping, "0:100000:65536",
		snapshots.LabelSnapshotGIDMapping, "1:5:9,0:200000:65536")}
	for _, remap := range []bool{true, false} {
		t.Run(fmt.Sprint(remap), func(t *testing.T) {
			e := newEnv(t, snapshotter.Options{RemapIDs: remap})
			e.layer("default/1/a", "", "a")
			m := e.prepare("default/2/c", "default/1/a", mapping...)
			st, err := os.Stat(option(m, "upperdir"))
			e.must(err)
			sys := st.Sys().(*syscall.Stat_t)
			if remap &&
				(option(m, "uidmap") != "0:100000:65536" || option(m, "gidmap") != "1:5:9,0:200000:65536" ||
					sys.Uid != 100000 || sys.Gid != 200000) {
				t.Errorf("mount %v with upper directory of %d:%d", m, sys.Uid, sys.Gid)
			}
			if !remap && (option(m, "uidmap") != "" || sys.Uid != 0 || sys.Gid != 0) {
				t.Errorf("without the capability: mount %v with upper directory of %d:%d", m, sys.Uid, sys.Gid)
			}
			if !remap {
				return
			}
			for _, bad := range []string{"0:1", "x:0:1", "5:0:9", "0:-1:5"} {
				_, err := e.Prepare(t.Context(), "default/3/c", "default/1/a",
					labels(snapshots.LabelSnapshotUIDMapping, bad))
				if !errdefs.IsInvalidArgument(err) {
					t.Errorf("mapping %q: %v", bad, err)
				}
			}
		})
	}
}

func TestRootAttributes(t *testing.T) {
	e := newEnv(t, snapshotter.Options{})
	m := e.prepare("default/1/extract-1-x a", "")
	e.must(os.Chmod(m[0].Source, 0o1711|os.ModeSticky))
	e.must(os.Chown(m[0].Source, 7, 8))
	e.must(e.Commit(t.Context(), "default/2/a", "default/1/extract-1-x a"))
	c := e.prepare("default/3/c", "default/2/a")
	st, err := os.Stat(option(c, "upperdir"))
	e.must(err)
	sys := st.Sys().(*syscall.Stat_t)
	if st.Mode() != os.ModeDir|os.ModeSticky|0o711 || sys.Uid != 7 || sys.Gid != 8 {
		t.Errorf("the container's root is %s of %d:%d", st.Mode(), sys.Uid, sys.Gid)
	}
}

func TestMountOptions(t *testing.T) {
	needRoot(t)
	for _, bad := range []string{"lowerdir=/x", "upperdir=/x", "workdir=/x", "uidmap=0:0:1", ""} {
		_, err := snapshotter.New(t.Context(), t.TempDir(), newFakeLowers(t.TempDir()),
			snapshotter.Options{MountOptions: []string{bad}})
		if err == nil || !strings.Contains(err.Error(), fmt.Sprintf("%q", bad)) {
			t.Errorf("option %q: %v", bad, err)
		}
	}
	e := newEnv(t, snapshotter.Options{MountOptions: []string{"volatile", "index=on"}})
	e.layer("default/1/a", "", "a")
	m := e.prepare("default/2/c", "default/1/a")
	all := strings.Join(m[0].Options, ",")
	if !strings.Contains(all, "volatile,index=on") || strings.Contains(all, "index=off") {
		t.Errorf("options %q", all)
	}
}

func TestUsage(t *testing.T) {
	e := newEnv(t, snapshotter.Options{})
	m := e.prepare("default/1/extract-1-x a", "")
	e.must(os.WriteFile(filepath.Join(m[0].Source, "big"), make([]byte, 1<<20), 0o644))
	active, err := e.Usage(t.Context(), "default/1/extract-1-x a")
	e.must(err)
	e.must(e.Commit(t.Context(), "default/2/a", "default/1/extract-1-x a"))
	committed, err := e.Usage(t.Context(), "default/2/a")
	e.must(err)
	if active != committed || active.Size < 1<<20 || active.Inodes != 2 {
		t.Errorf("active %+v, committed %+v", active, committed)
	}
	e.prepare("default/3/c", "default/2/a")
	if u, err := e.Usage(t.Context(), "default/3/c"); err != nil || u.Size >= 1<<20 {
		t.Errorf("a new container uses %+v, %v", u, err)
	}
}
