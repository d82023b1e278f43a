package daemon

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/sys/unix"

	"github.com/daxfs/daxfs-snapshotter/config"
	"github.com/daxfs/daxfs-snapshotter/daemon/api"
	"github.com/daxfs/daxfs-snapshotter/internal/slow"
	"github.com/daxfs/daxfs-snapshotter/snapshotter"
)

// A user of an image keeps it: a mount that the daemon made for a user, a mount made by hand, or a
// container with mapped owners whose snapshot is gone. Its bytes stay the same while other images come
// and go; when the user is gone, the space is free again.
func TestHoldersKeepBytes(t *testing.T) {
	slow.Skip(t, "fills a pool many times, for each kind of holder")
	for name, hold := range map[string]func(h *holding) (release func()){
		"mounted by the daemon":            (*holding).asked,
		"mounted by hand":                  (*holding).bound,
		"mounted by hand and detached":     (*holding).detached,
		"in another mount namespace":       (*holding).elsewhere,
		"container with mapped owners":     (*holding).idmapped,
		"container that was detached":      (*holding).container,
		"working directory in a container": (*holding).workingDirectory,
	} {
		for _, f := range fewFlavours(2) {
			t.Run(name+"/"+f.name, func(t *testing.T) {
				cl, m := inside(t, f, func(c *config.Config) { c.Pool.Size = 64 << 20 })
				h := &holding{client: cl, m: m, file: file{"a", random(1, 3_000_000)}, dir: t.TempDir()}
				h.ctx = namespaces.WithNamespace(t.Context(), "default")
				var err error
				h.top, err = m.pull(h.ctx, true, []file{h.file})
				m.must(err)
				_, err = m.sn.Prepare(h.ctx, "default/90/first", h.top)
				m.must(err)
				m.must(m.sn.Remove(h.ctx, "default/90/first"))
				m.must(cl.sn.Flush(h.ctx))
				release := hold(h)
				m.must(m.sn.Remove(h.ctx, h.top))
				m.must(cl.sn.Cleanup(h.ctx))
				for i := range 12 { // more than fit into the pool at a time
					top, err := m.pull(h.ctx, true, []file{{"other", random(uint64(50+i), 4_000_000)}})
					m.must(err)
					key := fmt.Sprintf("default/%d/c", 200+i)
					_, err = m.sn.Prepare(h.ctx, key, top)
					m.must(err)
					m.must(errors.Join(m.sn.Remove(h.ctx, key), m.sn.Remove(h.ctx, top), cl.sn.Cleanup(h.ctx)))
				}
				h.look()
				release()
			})
		}
	}
}

// holding is a user of an image that containerd is about to remove.
type holding struct {
	*client
	m    *machine
	ctx  context.Context
	top  string
	file file
	dir  string
	// look rereads the file, past the page cache, and fails the test if it has changed.
	look func()
}

// see makes look read the file through an open descriptor or a path.
func (h *holding) see(path string) {
	h.look = func() {
		h.m.t.Helper()
		uncache(h.m.t, path)
		got, err := os.ReadFile(path)
		if err != nil || !bytes.Equal(got, h.file.body) {
			h.m.t.Errorf("%q: %d bytes, %v; expected what was there before", path, len(got), err)
		}
	}
	h.look()
}

func (h *holding) imageDir() string { return h.store.Mounted()[0].Dir }

func (h *holding) asked() func() {
	key := h.store.Mounted()[0].Key
	_, err := h.store.MountAt(h.ctx, key, h.dir, true)
	h.m.must(err)
	h.see(filepath.Join(h.dir, "a"))
	return func() { h.m.must(h.store.UnmountAt(h.ctx, h.dir)) }
}

func (h *holding) bound() func() {
	h.m.must(unix.Mount(h.imageDir(), h.dir, "", unix.MS_BIND, ""))
	h.see(filepath.Join(h.dir, "a"))
	return func() {
		h.m.must(unix.Unmount(h.dir, 0))
		dropCaches(h.m.t)
	}
}

func (h *holding) detached() func() {
	h.m.must(unix.Mount(h.imageDir(), h.dir, "", unix.MS_BIND, ""))
	f, err := os.Open(filepath.Join(h.dir, "a"))
	h.m.must(err)
	h.m.must(unix.Unmount(h.dir, unix.MNT_DETACH))
	h.see(fmt.Sprintf("/proc/self/fd/%d", f.Fd()))
	return func() {
		h.m.must(f.Close())
		dropCaches(h.m.t)
	}
}

// elsewhere holds a mount in a namespace that was created while the image was mounted, like other tools on a node.
func (h *holding) elsewhere() func() {
	p := sleepInNamespace(h.m.t)
	h.see(fmt.Sprintf("/proc/%d/root%s", p.Pid, filepath.Join(h.imageDir(), "a")))
	f, err := os.Open(fmt.Sprintf("/proc/%d/root%s", p.Pid, filepath.Join(h.imageDir(), "a")))
	h.m.must(err)
	h.see(fmt.Sprintf("/proc/self/fd/%d", f.Fd()))
	return func() {
		h.m.must(f.Close())
		h.m.must(p.Kill())
		_, err := p.Wait()
		h.m.must(err)
		dropCaches(h.m.t)
	}
}

func (h *holding) mounted(opts ...snapshots.Opt) (root string) {
	mounts, err := h.m.sn.Prepare(h.ctx, "default/100/c", h.top, opts...)
	h.m.must(err)
	h.m.must(mount.All(mounts, h.dir))
	h.m.must(h.m.sn.Remove(h.ctx, "default/100/c"))
	return h.dir
}

func (h *holding) idmapped() func() {
	const mapping = "0:100000:65536"
	root := h.mounted(snapshots.WithLabels(map[string]string{
		snapshots.LabelSnapshotUIDMapping: mapping, snapshots.LabelSnapshotGIDMapping: mapping,
	}))
	h.see(filepath.Join(root, "a"))
	return func() { h.m.must(mount.UnmountAll(root, 0)) }
}

func (h *holding) container() func() {
	root := h.mounted()
	f, err := os.Open(filepath.Join(root, "a"))
	h.m.must(err)
	h.m.must(unix.Unmount(root, unix.MNT_DETACH))
	h.see(fmt.Sprintf("/proc/self/fd/%d", f.Fd()))
	return func() { h.m.must(f.Close()) }
}

// workingDirectory opens a file for the first time after the container was detached.
func (h *holding) workingDirectory() func() {
	root := h.mounted()
	dir, err := os.Open(root)
	h.m.must(err)
	h.m.must(unix.Unmount(root, unix.MNT_DETACH))
	h.look = func() {
		fd, err := unix.Openat(int(dir.Fd()), "a", unix.O_RDONLY, 0)
		h.m.must(err)
		f := os.NewFile(uintptr(fd), "a")
		defer f.Close()
		if got, err := io.ReadAll(f); err != nil || !bytes.Equal(got, h.file.body) {
			h.m.t.Errorf("%d bytes, %v; expected what was there before", len(got), err)
		}
	}
	return func() { h.m.must(dir.Close()) }
}

// dropCaches makes the kernel forget unused inodes, as it does under memory pressure. Contents seen
// through mounts that nothing can vouch for stay until then.
func dropCaches(t *testing.T) {
	t.Helper()
	if err := os.WriteFile("/proc/sys/vm/drop_caches", []byte("2"), 0o200); err != nil {
		t.Fatal(err)
	}
}

// sleepInNamespace starts a process with a mount namespace of its own.
func sleepInNamespace(t *testing.T) *os.Process {
	t.Helper()
	sleep, err := exec.LookPath("unshare")
	if err != nil {
		t.Skip("makes a mount namespace: ", err)
	}
	own, err := os.Readlink("/proc/self/ns/mnt")
	if err != nil {
		t.Fatal(err)
	}
	p, err := os.StartProcess(sleep,
		[]string{"unshare", "-m", "--propagation", "private", "sleep", "1000"}, &os.ProcAttr{})
	if err != nil {
		t.Fatal(err)
	}
	for range 1000 {
		if ns, err := os.Readlink("/proc/" + strconv.Itoa(p.Pid) + "/ns/mnt"); err == nil && ns != own {
			return p
		}
		time.Sleep(10 * time.Millisecond)
	}
	t.Fatal("the process made no mount namespace")
	return nil
}

type noBlob struct{ content.Provider }

func (noBlob) ReaderAt(context.Context, ocispec.Descriptor) (content.ReaderAt, error) {
	return nil, fmt.Errorf("no such blob: %w", errdefs.ErrNotFound)
}

// A client that only claims the diff ID of another namespace's layer does not get that layer. A client
// with a blob of it does, and the blob is not read.
func TestClaimedDiffID(t *testing.T) {
	cl, m := inside(t, flavours[0], func(*config.Config) {})
	ctx := namespaces.WithNamespace(t.Context(), "victim")
	secret := file{"secret", random(1, 50_000)}
	tar := makeTar(secret)
	_, err := m.pull(ctx, true, []file{secret})
	m.must(err)
	id := digest.FromBytes(tar)
	blob, _, err := (&streaming{store: m.store}).put(ctx, tar)
	if err != nil && !errdefs.IsAlreadyExists(err) {
		t.Fatal(err)
	}
	ctx = namespaces.WithNamespace(t.Context(), "attacker")
	prepare := func(n int) []mount.Mount {
		labels := snapshots.WithLabels(map[string]string{snapshots.LabelSnapshotRef: "x", labelDiff: id.String()})
		mounts, err := m.sn.Prepare(ctx, fmt.Sprintf("attacker/%d/extract-1-x y", n), "", labels)
		m.must(err)
		return mounts
	}
	mounts := prepare(900)
	fake := ocispec.Descriptor{
		MediaType: ocispec.MediaTypeImageLayerGzip,
		Digest:    digest.FromString("another"), Size: 17,
	}
	for name, desc := range map[string]ocispec.Descriptor{
		"a blob of something else":     fake,
		"a blob that he does not have": blob,
	} {
		got, err := snapshotter.NewDiffer(cl.Snapshotter(), noBlob{}).Apply(ctx, desc, mounts)
		if !errdefs.IsNotFound(err) {
			t.Errorf("with %s: %+v, %v", name, got, err)
		}
	}
	counted := &counting{Provider: m.store}
	_, err = snapshotter.NewDiffer(cl.Snapshotter(), counted).Apply(ctx, blob, prepare(901))
	if err != nil || counted.read != 0 {
		t.Errorf("with the blob: %v, %d bytes were read", err, counted.read)
	}
}

type counting struct {
	content.Provider
	read int
}

func (c *counting) ReaderAt(ctx context.Context, desc ocispec.Descriptor) (content.ReaderAt, error) {
	ra, err := c.Provider.ReaderAt(ctx, desc)
	return countingReader{ra, c}, err
}

type countingReader struct {
	content.ReaderAt
	c *counting
}

func (r countingReader) ReadAt(p []byte, off int64) (int, error) {
	n, err := r.ReaderAt.ReadAt(p, off)
	r.c.read += n
	return n, err
}

// A chain ID that one namespace gave to other contents is not trusted in another namespace.
func TestChainNameIsNotBelieved(t *testing.T) {
	cl, m := inside(t, flavours[0], func(*config.Config) {})
	ctx := namespaces.WithNamespace(t.Context(), "one")
	good, evil := file{"f", []byte("good")}, file{"f", []byte("evil")}
	tar := makeTar(good)
	chain := digest.FromBytes(tar).String() // for a single layer, the chain ID is the diff ID
	m.must(m.walk(ctx, "one/1/"+chain, "one/2/k", "", []file{evil}))
	_, err := m.sn.Prepare(ctx, "one/3/c", "one/1/"+chain)
	m.must(err)
	m.must(cl.sn.Flush(ctx))
	ctx = namespaces.WithNamespace(t.Context(), "two")
	st := &streaming{m.sn, m.ap, m.store}
	desc, id, err := st.put(ctx, tar)
	m.must(err)
	m.must(st.unpack(ctx, desc, id, "two/3/"+chain, "two/4/extract-1-x y", ""))
	view, err := m.sn.View(ctx, "two/5/v", "two/3/"+chain)
	m.must(err)
	m.compare(view, good)
}

// The health check sees a dead server, and starting a container replaces the server.
func TestHealthSeesDeadServer(t *testing.T) {
	cl, m := inside(t, flavours[2], func(*config.Config) {})
	ctx := namespaces.WithNamespace(t.Context(), "default")
	a := file{"a", random(1, 5000)}
	top, err := m.pull(ctx, true, []file{a})
	m.must(err)
	_, err = m.sn.Prepare(ctx, "default/100/c", top)
	m.must(err)
	m.must(cl.Healthy(ctx))
	m.must(killServers(m.cfg.Root))
	if err := cl.Healthy(ctx); err == nil {
		t.Error("healthy although the server is dead")
	}
	mounts, err := m.sn.Mounts(ctx, "default/100/c")
	m.must(err)
	m.must(cl.Healthy(ctx))
	m.compare(mounts, a)
}

// killServers kills the FUSE servers of a daemon's mounts and waits until they are gone.
func killServers(root string) error {
	procs, err := filepath.Glob("/proc/[0-9]*/cmdline")
	if err != nil {
		return err
	}
	killed := 0
	for _, p := range procs {
		raw, err := os.ReadFile(p)
		if err != nil || !bytes.Contains(raw, []byte("--foreground")) || !bytes.Contains(raw, []byte(root)) {
			continue
		}
		pid, err := strconv.Atoi(filepath.Base(filepath.Dir(p)))
		if err != nil {
			return err
		}
		if err := unix.Kill(pid, unix.SIGKILL); err != nil {
			return err
		}
		killed++
		for range 3000 {
			if raw, err := os.ReadFile(p); err != nil || len(raw) == 0 {
				break
			}
			time.Sleep(10 * time.Millisecond)
		}
	}
	if killed == 0 {
		return errors.New("no server was found")
	}
	return nil
}

// The control socket mounts, pins and lists, and reports errors.
func TestControl(t *testing.T) {
	cl, m := inside(t, flavours[0], func(*config.Config) {})
	ctx, stop := context.WithCancel(t.Context())
	end, err := cl.serveControl(ctx)
	m.must(err)
	defer end()
	defer stop()
	top, err := m.pull(namespaces.WithNamespace(ctx, "default"), true, []file{{"a", random(1, 5000)}})
	m.must(err)
	_, err = m.sn.Prepare(namespaces.WithNamespace(ctx, "default"), "default/100/c", top)
	m.must(err)
	socket := api.Socket(m.cfg.Address)
	if st, err := os.Stat(socket); err != nil || st.Mode().Perm() != 0o600 {
		t.Errorf("control socket: %v, %v", st, err)
	}
	web := &http.Client{Transport: &http.Transport{
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			return (&net.Dialer{}).DialContext(ctx, "unix", socket)
		},
		DisableKeepAlives: true,
	}}
	ask := func(method, path, body string, want int) string {
		t.Helper()
		req, err := http.NewRequestWithContext(ctx, method, "http://daemon"+path, strings.NewReader(body))
		m.must(err)
		resp, err := web.Do(req)
		m.must(err)
		defer resp.Body.Close()
		text, err := io.ReadAll(resp.Body)
		if err != nil || resp.StatusCode != want || !json.Valid(text) {
			t.Errorf("%s %s %s: %d %s, %v; expected %d", method, path, body, resp.StatusCode, text, err, want)
		}
		return string(text)
	}
	key := cl.store.Images()[0].Key
	dir := t.TempDir()
	mountBody := fmt.Sprintf(`{"image":%q,"dir":%q}`, key, dir)
	ask("POST", "/v1/mounts", mountBody, 200)
	if got := ask("GET", "/v1/mounts", "", 200); !strings.Contains(got, dir) {
		t.Errorf("mounts %s", got)
	}
	m.must(compareTree(dir, []file{{"a", random(1, 5000)}}))
	ask("DELETE", "/v1/mounts", fmt.Sprintf(`{"dir":%q}`, dir), 200)
	ask("DELETE", "/v1/mounts", fmt.Sprintf(`{"dir":%q}`, dir), 404)
	src := t.TempDir()
	m.must(os.WriteFile(filepath.Join(src, "f"), []byte("x"), 0o644))
	ask("POST", "/v1/pins", fmt.Sprintf(`{"source":"rootfs:%s","name":"mine"}`, src), 200)
	if got := ask("GET", "/v1/images", "", 200); !strings.Contains(got, "pin/mine") {
		t.Errorf("images %s", got)
	}
	ask("DELETE", "/v1/pins", `{"name":"mine"}`, 200)
	ask("DELETE", "/v1/pins", `{"name":"mine"}`, 404)
	ask("POST", "/v1/sweep", "", 200)
	if got := ask("GET", "/v1/pool", "", 200); !strings.Contains(got, m.cfg.Root) {
		t.Errorf("pool %s", got)
	}
	ask("POST", "/v1/mounts", `{"image":"nothing","dir":"/tmp"}`, 404)
	ask("POST", "/v1/mounts", `{"image":"nothing","dir":"tmp"}`, 400)
	ask("POST", "/v1/mounts", `{"imagee":"x"}`, 400)
	ask("POST", "/v1/pins", `{"source":"what","name":"x"}`, 400)
}
