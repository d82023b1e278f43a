package daemon

import (
	"archive/tar"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	diffapi "github.com/containerd/containerd/api/services/diff/v1"
	snapshotsapi "github.com/containerd/containerd/api/services/snapshots/v1"
	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/core/diff"
	diffproxy "github.com/containerd/containerd/v2/core/diff/proxy"
	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/core/snapshots/proxy"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/containerd/v2/plugins/content/local"
	"google.golang.org/grpc"
	"google.golang.org/grpc/backoff"
	"google.golang.org/grpc/credentials/insecure"

	"github.com/daxfs/daxfs-snapshotter/config"
	"github.com/daxfs/daxfs-snapshotter/internal/slow"
	"github.com/daxfs/daxfs-snapshotter/snapshotter"
)

// job is the task of a daemon in its own process, passed in the environment.
type job struct {
	Config  *config.Config
	Content string // directory of a content store in place of containerd's
	// Do is the task: "serve", "verify" that everything is consistent, or "purge", which removes all
	// snapshots and verifies that nothing remains. The test itself never opens the pool: processes that it
	// forks for other tests would hold the pool's lock until they exec.
	Do string
}

const jobEnv = "DAXFS_TEST_DAEMON"

// runJob runs the daemon in its own process.
func runJob(text string) error {
	var j job
	if err := json.Unmarshal([]byte(text), &j); err != nil {
		return err
	}
	ctx := context.Background()
	store, err := local.NewStore(j.Content)
	if err != nil {
		return err
	}
	if key, ok := strings.CutPrefix(j.Do, "prepare "); ok {
		return prepareFrom(ctx, j.Config.Address, key)
	}
	s, err := Open(ctx, j.Config)
	if err != nil {
		return err
	}
	c := &client{Daemon: s}
	switch j.Do {
	case "verify":
		return errors.Join(c.settle(ctx), s.Close())
	case "purge":
		return errors.Join(c.purge(ctx), s.Close())
	}
	l, err := listen(j.Config.Address)
	if err != nil {
		return err
	}
	return serveGRPC(ctx, l, s.grpcServer(snapshotter.NewDiffer(s.Snapshotter(), store)))
}

// machine is a computer with a disk, a memory, and a daemon that can be killed.
type machine struct {
	t     *testing.T
	cfg   *config.Config
	store content.Store
	dir   string
	cmd   *exec.Cmd
	ended chan struct{}
	conn  *grpc.ClientConn
	sn    snapshots.Snapshotter
	ap    diff.Applier
	names int
	// calls, if set, is called before each call to the daemon.
	calls func()
}

func newMachine(t *testing.T, f flavour) *machine {
	t.Helper()
	f.need(t)
	m := &machine{t: t, dir: t.TempDir()}
	m.cfg = f.config(m.dir)
	var err error
	m.store, err = local.NewStore(filepath.Join(m.dir, "content"))
	m.must(err)
	t.Cleanup(func() {
		if m.cmd != nil {
			m.kill()
		}
		if err := errors.Join(m.do("purge"), removePool(m.cfg)); err != nil {
			t.Error(err)
		}
	})
	return m
}

func (m *machine) must(err error) {
	m.t.Helper()
	if err != nil {
		m.t.Fatal(err)
	}
}

// boot starts the daemon and connects to it.
func (m *machine) boot() {
	m.t.Helper()
	ctx, cancel := context.WithTimeout(m.t.Context(), 5*time.Minute) // far longer than any machine needs
	defer cancel()
	out := m.launch()
	go func(ended chan struct{}) {
		select {
		case <-ended:
			cancel()
		case <-ctx.Done():
		}
	}(m.ended)
	var err error
	// The default delay after a failed connection is a second.
	params := grpc.ConnectParams{
		MinConnectTimeout: time.Minute,
		Backoff: backoff.Config{
			BaseDelay: 5 * time.Millisecond, Multiplier: 1,
			MaxDelay: 5 * time.Millisecond,
		},
	}
	m.conn, err = grpc.NewClient("unix://"+m.cfg.Address, grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithConnectParams(params), grpc.WithUnaryInterceptor(m.call))
	m.must(err)
	m.sn = proxy.NewSnapshotter(snapshotsapi.NewSnapshotsClient(m.conn), "daxfs")
	m.ap = diffproxy.NewDiffApplier(diffapi.NewDiffClient(m.conn)).(diff.Applier)
	if _, err := snapshotsapi.NewSnapshotsClient(m.conn).Cleanup(ctx, &snapshotsapi.CleanupRequest{},
		grpc.WaitForReady(true)); err != nil {
		m.t.Fatalf("the daemon does not answer: %v\n%s", err, out)
	}
}

func (m *machine) call(ctx context.Context, method string, req, reply any, conn *grpc.ClientConn,
	invoke grpc.UnaryInvoker, opts ...grpc.CallOption,
) error {
	if m.calls != nil {
		m.calls()
	}
	return invoke(ctx, method, req, reply, conn, opts...)
}

// launch starts the daemon without waiting for it. Read its log only after it has ended.
func (m *machine) launch() (out *bytes.Buffer) {
	m.t.Helper()
	cmd, err := m.command("serve")
	m.must(err)
	out = new(bytes.Buffer)
	cmd.Stderr = out
	m.must(cmd.Start())
	ended := make(chan struct{})
	go func() {
		cmd.Wait()
		close(ended)
	}()
	m.cmd, m.ended = cmd, ended
	return out
}

func (m *machine) kill() {
	m.t.Helper()
	if m.conn != nil {
		m.conn.Close()
		m.conn = nil
	}
	m.cmd.Process.Kill() // it may have ended
	<-m.ended
	m.cmd = nil
}

// reboot ends everything and drops the contents of memory.
func (m *machine) reboot() {
	m.t.Helper()
	m.kill()
	m.must(loseMemory(m.cfg))
	m.boot()
}

// verify checks the state that the daemon left. The daemon must not run.
func (m *machine) verify() {
	m.t.Helper()
	m.must(m.do("verify"))
}

// command returns the daemon's process.
func (m *machine) command(do string) (*exec.Cmd, error) {
	text, err := json.Marshal(job{m.cfg, filepath.Join(m.dir, "content"), do})
	if err != nil {
		return nil, err
	}
	self, err := os.Executable()
	if err != nil {
		return nil, err
	}
	cmd := exec.Command(self)
	cmd.Env = append(os.Environ(), jobEnv+"="+string(text))
	return cmd, nil
}

// do runs the daemon's process until it ends.
func (m *machine) do(what string) error {
	cmd, err := m.command(what)
	if err != nil {
		return err
	}
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("%s: %w\n%s", what, err, out)
	}
	return nil
}

type file struct {
	name string
	body []byte
}

func random(seed uint64, n int) []byte {
	b := make([]byte, n)
	r := rand.NewChaCha8([32]byte{byte(seed), byte(seed >> 8), 1})
	r.Read(b)
	return b
}

func makeTar(files ...file) []byte {
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	for _, f := range files {
		if err := w.WriteHeader(&tar.Header{
			Name: f.name, Mode: 0o644, Size: int64(len(f.body)),
			Typeflag: tar.TypeReg,
		}); err != nil {
			panic(err)
		}
		if _, err := w.Write(f.body); err != nil {
			panic(err)
		}
	}
	if err := w.Close(); err != nil {
		panic(err)
	}
	return b.Bytes()
}

// pull commits a chain of layers, streamed or walked, and returns the name of its top.
func (m *machine) pull(ctx context.Context, stream bool, layers ...[]file) (string, error) {
	st := &streaming{m.sn, m.ap, m.store}
	parent := ""
	for _, files := range layers {
		m.names++
		name, key := fmt.Sprintf("default/%d/layer", m.names), fmt.Sprintf("default/%d/extract-1-x layer", m.names)
		if stream {
			desc, diffID, err := st.put(ctx, makeTar(files...))
			if err != nil && !strings.Contains(err.Error(), "already exists") {
				return "", err
			}
			if err := st.unpack(ctx, desc, diffID, name, key, parent); err != nil {
				return "", err
			}
		} else if err := m.walk(ctx, name, key, parent, files); err != nil {
			return "", err
		}
		parent = name
	}
	return parent, nil
}

func (m *machine) walk(ctx context.Context, name, key, parent string, files []file) error {
	mounts, err := m.sn.Prepare(ctx, key, parent)
	if err != nil {
		return err
	}
	dir := mounts[0].Source
	for _, o := range mounts[0].Options {
		if v, ok := strings.CutPrefix(o, "upperdir="); ok {
			dir = v
		}
	}
	for _, f := range files {
		if err := os.WriteFile(filepath.Join(dir, f.name), f.body, 0o644); err != nil {
			return err
		}
	}
	return m.sn.Commit(ctx, name, key)
}

// compare fails the test unless the mounts show exactly files.
func (m *machine) compare(mounts []mount.Mount, files ...file) {
	m.t.Helper()
	err := mount.WithTempMount(m.t.Context(), mounts, func(root string) error { return compareTree(root, files) })
	if err != nil {
		m.t.Fatalf("%v: %v", mounts, err)
	}
}

func compareTree(root string, files []file) error {
	want := map[string][]byte{}
	for _, f := range files {
		want[f.name] = f.body
	}
	err := fs.WalkDir(os.DirFS(root), ".", func(p string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		body, ok := want[p]
		if !ok {
			return fmt.Errorf("file %q should not be there", p)
		}
		delete(want, p)
		got, err := os.ReadFile(filepath.Join(root, p))
		if err == nil && !bytes.Equal(got, body) {
			err = fmt.Errorf("file %q: %d bytes that differ from the expected %d", p, len(got), len(body))
		}
		return err
	})
	for p := range want {
		err = errors.Join(err, fmt.Errorf("file %q is missing", p))
	}
	return err
}

// TestKilledWithContainers kills the daemon below a container, which continues, and so does the next daemon.
func TestKilledWithContainers(t *testing.T) {
	for _, f := range flavours {
		for _, stream := range []bool{false, true} {
			t.Run(fmt.Sprintf("%s/stream=%v", f.name, stream), func(t *testing.T) {
				if f != flavours[0] {
					slow.Skip(t, "starts daemons, for each pool and driver")
				}
				t.Parallel()
				m := newMachine(t, f)
				m.boot()
				ctx := namespaces.WithNamespace(t.Context(), "default")
				a, b := file{"a", random(1, 100_000)}, file{"b", random(2, 3_000_000)}
				top, err := m.pull(ctx, stream, []file{a}, []file{b})
				m.must(err)
				before, err := m.sn.Prepare(ctx, "default/100/c", top)
				m.must(err)
				root := filepath.Join(m.dir, "container")
				m.must(os.Mkdir(root, 0o755))
				m.must(mount.All(before, root))
				defer func() { m.must(mount.UnmountAll(root, 0)) }()
				m.must(compareTree(root, []file{a, b}))
				for range 3 {
					m.kill()
					m.must(compareTree(root, []file{a, b}))
					m.boot()
					after, err := m.sn.Mounts(ctx, "default/100/c")
					if err != nil || fmt.Sprint(after) != fmt.Sprint(before) {
						t.Fatalf("after a restart the mounts are %v, %v; they were %v", after, err, before)
					}
				}
				m.must(compareTree(root, []file{a, b}))
				m.kill()
				m.verify()
				m.boot()
			})
		}
	}
}

func upperOf(mounts []mount.Mount) string {
	for _, o := range mounts[0].Options {
		if dir, ok := strings.CutPrefix(o, "upperdir="); ok {
			return dir
		}
	}
	return ""
}

// TestReboot loses memory and mounts, with registries turned off and the blobs gone from containerd.
func TestReboot(t *testing.T) {
	for _, f := range flavours {
		for _, stream := range []bool{false, true} {
			t.Run(fmt.Sprintf("%s/stream=%v", f.name, stream), func(t *testing.T) {
				if f != flavours[0] {
					slow.Skip(t, "starts daemons, for each pool and driver")
				}
				t.Parallel()
				m := newMachine(t, f)
				m.boot()
				ctx := namespaces.WithNamespace(t.Context(), "default")
				a, b, c := file{"a", random(1, 5000)}, file{"b", random(2, 2_500_000)}, file{"c", random(3, 17)}
				top, err := m.pull(ctx, stream, []file{a, {"b", random(9, 100)}}, []file{b})
				m.must(err)
				mounts, err := m.sn.Prepare(ctx, "default/100/c", top)
				m.must(err)
				m.must(mount.WithTempMount(ctx, mounts, func(root string) error {
					return os.WriteFile(filepath.Join(root, c.name), c.body, 0o644)
				}))
				m.must(os.RemoveAll(filepath.Join(m.dir, "content/blobs")))
				for range 2 {
					m.reboot()
					again, err := m.sn.Mounts(ctx, "default/100/c")
					m.must(err)
					if len(again) != 1 || upperOf(again) != upperOf(mounts) || upperOf(again) == "" {
						t.Fatalf("after a reboot the mounts are %v; they were %v", again, mounts)
					}
					m.compare(again, a, b, c)
				}
				m.kill()
				m.verify()
				m.boot()
			})
		}
	}
}
