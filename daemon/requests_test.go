package daemon

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"reflect"
	"runtime"
	"strings"
	"testing"
	"time"

	"github.com/containerd/containerd/v2/pkg/namespaces"
	"golang.org/x/sys/unix"

	"github.com/daxfs/daxfs-snapshotter/config"
	"github.com/daxfs/daxfs-snapshotter/daemon/api"
)

// dialogue sends bytes to a socket and returns the whole answer.
func dialogue(t *testing.T, socket, send string) string {
	t.Helper()
	conn, err := net.Dial("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	if err := conn.SetDeadline(time.Now().Add(time.Minute)); err != nil {
		t.Fatal(err)
	}
	_, _ = conn.Write([]byte(send)) // the daemon may answer and close before all bytes are sent
	got, _ := io.ReadAll(conn)
	return string(got)
}

// request returns a complete HTTP request.
func request(line, body string) string {
	return fmt.Sprintf("%s HTTP/1.1\r\nHost: d\r\nConnection: close\r\nContent-Length: %d\r\n\r\n%s", line,
		len(body), body)
}

// controlled starts a daemon with an image and a container, and returns its control socket.
func controlled(t *testing.T) (cl *client, m *machine, socket string) {
	t.Helper()
	cl, m = inside(t, flavours[0], func(*config.Config) {})
	ctx, stop := context.WithCancel(t.Context())
	end, err := cl.serveControl(ctx)
	m.must(err)
	t.Cleanup(func() {
		stop()
		end()
	})
	ctx = namespaces.WithNamespace(ctx, "default")
	top, err := m.pull(ctx, true, []file{{"a", random(1, 5000)}})
	m.must(err)
	_, err = m.sn.Prepare(ctx, "default/100/c", top)
	m.must(err)
	m.must(cl.sn.Flush(ctx))
	return cl, m, api.Socket(m.cfg.Address)
}

// Garbage, huge, slow and partial requests are refused with a reason, and change nothing.
func TestControlRefuses(t *testing.T) {
	old := requestTimeout
	requestTimeout = time.Second
	defer func() { requestTimeout = old }()
	cl, _, socket := controlled(t)
	images, usage := cl.store.Images(), cl.pool().Usage()
	key := images[0].Key
	huge := `{"name":"x","source":"` + strings.Repeat("x", 1<<20) + `"}`
	large := t.TempDir()
	f, err := os.Create(filepath.Join(large, "larger than the pool"))
	if err := errors.Join(err, f.Truncate(2*usage.Size), f.Close()); err != nil {
		t.Fatal(err)
	}
	for name, tc := range map[string]struct{ send, want string }{
		"garbage":       {string(random(9, 4096)) + "\r\n\r\n", "400 Bad Request"},
		"no JSON":       {request("POST /v1/pins", "what"), `400 Bad Request`},
		"another type":  {request("POST /v1/pins", `["x"]`), `cannot unmarshal array`},
		"unknown field": {request("POST /v1/pins", `{"nome":"x"}`), `unknown field`},
		"two values": {
			request("POST /v1/pins", fmt.Sprintf(`{"image":%q,"name":"x"}{}`, key)),
			`there is more data after the value`,
		},
		"no value":      {request("DELETE /v1/pins", ""), `400 Bad Request`},
		"needless body": {request("POST /v1/sweep", "{}"), `takes no body`},
		"huge":          {request("POST /v1/pins", huge), `413 Request Entity Too Large`},
		"huge header": {
			"GET /v1/pool HTTP/1.1\r\nHost: d\r\nX: " + strings.Repeat("x", 1<<20),
			"431 Request Header Fields Too Large",
		},
		"half a body": {
			"POST /v1/pins HTTP/1.1\r\nHost: d\r\nContent-Length: 100\r\n\r\n{\"name\"",
			"400 Bad Request",
		},
		"half a header":  {"POST /v1/sweep HTTP/1.1\r\nHost", ""},
		"another path":   {request("GET /v2/pool", ""), `404 Not Found`},
		"another method": {request("PUT /v1/pins", "{}"), `404 Not Found`},
		"no name":        {request("POST /v1/pins", fmt.Sprintf(`{"image":%q}`, key)), `is pinned under a name`},
		"source and": {
			request("POST /v1/pins", fmt.Sprintf(`{"image":%q,"source":"rootfs:/","name":"x"}`, key)),
			`expected one`,
		},
		"too large": {
			request("POST /v1/pins", fmt.Sprintf(`{"source":%q,"name":"x"}`, "rootfs:"+large)),
			`507 Insufficient Storage`,
		},
		"nothing to pin":  {request("POST /v1/pins", `{"image":"image/ffff","name":"x"}`), `404 Not Found`},
		"nothing to drop": {request("DELETE /v1/pins", `{"name":"x"}`), `404 Not Found`},
	} {
		t.Run(name, func(t *testing.T) {
			if got := dialogue(t, socket, tc.send); !strings.Contains(got, tc.want) {
				t.Errorf("answer %q, expected %q in it", got, tc.want)
			}
		})
	}
	if now := cl.store.Images(); !reflect.DeepEqual(now, images) {
		t.Errorf("images were %+v and are %+v", images, now)
	}
	if now := cl.pool().Usage(); now != usage {
		t.Errorf("the pool held %+v and holds %+v", usage, now)
	}
	if got := dialogue(t, socket, request("GET /v1/pool", "")); !strings.Contains(got, "200 OK") {
		t.Errorf("after all of it: %q", got)
	}
}

// Only root may connect: the socket's mode refuses others, and so does the daemon if somebody changed the mode.
func TestControlIsRoots(t *testing.T) {
	cl, m, socket := controlled(t)
	ask := func() (answer string, err error) {
		done := make(chan struct{})
		go func() {
			defer close(done)
			runtime.LockOSThread() // never unlocked: the thread, and with it the user, ends with the goroutine
			const nobody = 65534
			keep := ^uintptr(0)
			if _, _, errno := unix.RawSyscall(unix.SYS_SETRESUID, keep, nobody, keep); errno != 0 {
				err = errno
				return
			}
			fd, serr := unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
			if err = serr; err != nil {
				return
			}
			defer unix.Close(fd)
			if err = unix.Connect(fd, &unix.SockaddrUnix{Name: socket}); err != nil {
				return
			}
			if _, err = unix.Write(fd, []byte(request("POST /v1/sweep", ""))); err != nil {
				return
			}
			var all bytes.Buffer
			_, err = io.Copy(&all, fdReader(fd))
			answer = all.String()
		}()
		<-done
		return answer, err
	}
	// Everybody may reach the socket.
	for dir := m.dir; dir != "/tmp" && dir != "/"; dir = filepath.Dir(dir) {
		m.must(os.Chmod(dir, 0o755))
	}
	if answer, err := ask(); err != unix.EACCES {
		t.Errorf("nobody connected: %q, %v; expected %v", answer, err, unix.EACCES)
	}
	m.must(os.Chmod(socket, 0o666))
	answer, err := ask()
	if err != nil || !strings.Contains(answer, "403 Forbidden") || !strings.Contains(answer, "only root may ask") {
		t.Errorf("nobody was answered %q, %v", answer, err)
	}
	if got := dialogue(t, socket, request("POST /v1/sweep", "")); !strings.Contains(got, "200 OK") {
		t.Errorf("root was answered %q", got)
	}
	if n := len(cl.store.Images()); n != 1 {
		t.Errorf("%d images, expected 1", n)
	}
}

type fdReader int

func (fd fdReader) Read(p []byte) (int, error) {
	n, err := unix.Read(int(fd), p)
	if n == 0 && err == nil {
		err = io.EOF
	}
	return max(n, 0), err
}

// asked sends a request and decodes the answer.
func asked[T any](t *testing.T, socket, line, body string) (out T) {
	t.Helper()
	got := dialogue(t, socket, strings.Replace(request(line, body), "HTTP/1.1", "HTTP/1.0", 1)) // not chunked
	_, text, _ := strings.Cut(got, "\r\n\r\n")
	if err := json.Unmarshal([]byte(text), &out); err != nil || !strings.Contains(got, "200 OK") {
		t.Fatalf("%s: %q: %v", line, got, err)
	}
	return out
}

// The daemon reports its real state, images and containers.
func TestControlTells(t *testing.T) {
	cl, m, socket := controlled(t)
	ctx := namespaces.WithNamespace(t.Context(), "default")
	s := asked[api.Status](t, socket, "GET /v1/status", "")
	if s.PID != os.Getpid() || s.Health != "" || s.Containers != 1 || s.Unshared != 0 || s.Mounted != 1 ||
		s.Pool.Usage.Images != 1 ||
		s.Memory <= 0 || s.Taken <= 0 || s.Fallbacks["full"] != 0 || len(s.Failures) != len(phases) {
		t.Errorf("status %+v", s)
	}
	var st unix.Statfs_t
	m.must(unix.Statfs(m.cfg.Root, &st))
	disk := int64(st.Bavail) * st.Bsize
	if s.Free != min(s.Room.Pool, s.Room.Disk) || s.Room.Disk < disk/2 || s.Room.Disk > disk*2 {
		t.Errorf("free %d, room %+v; the disk has %d", s.Free, s.Room, disk)
	}
	if len(s.Drivers) != 1 || !s.Drivers[0].Picked || s.Drivers[0].Driver != "erofs-file" {
		t.Errorf("drivers %+v", s.Drivers)
	}
	images := asked[[]api.Image](t, socket, "GET /v1/images", "")
	if len(images) != 1 || !reflect.DeepEqual(images[0].Containers, []string{"default/c"}) ||
		images[0].Driver != "erofs-file" ||
		images[0].Usage.Extents != 8192 || images[0].Brought != 8192+images[0].Usage.Tree {
		t.Fatalf("images %+v", images)
	}
	list := asked[[]api.Container](t, socket, "GET /v1/containers", "")
	if len(list) != 1 || list[0].Namespace != "default" || list[0].Name != "c" || !list[0].Shared ||
		list[0].Image != images[0].Key ||
		time.Since(list[0].Since) > time.Hour || list[0].Driver != "erofs-file" {
		t.Errorf("containers %+v", list)
	}
	if a := asked[api.Check](t, socket, "POST /v1/check", ""); a.Findings == nil || len(a.Findings) != 0 {
		t.Errorf("check %+v", a)
	}

	// A pin holds an image that containerd has forgotten.
	asked[api.Image](t, socket, "POST /v1/pins", fmt.Sprintf(`{"image":%q,"name":"mine"}`, images[0].Key))
	m.must(m.sn.Remove(ctx, "default/100/c"))
	m.must(m.sn.Remove(ctx, "default/1/layer"))
	m.must(cl.sn.Cleanup(ctx))
	images = asked[[]api.Image](t, socket, "GET /v1/images", "")
	if len(images) != 1 || !reflect.DeepEqual(images[0].Holders, []string{"pin/mine"}) ||
		len(images[0].Containers) != 0 {
		t.Errorf("images after containerd removed all of its own: %+v", images)
	}
	asked[struct{}](t, socket, "DELETE /v1/pins", `{"name":"mine"}`)
	asked[struct{}](t, socket, "POST /v1/sweep", "")
	if images = asked[[]api.Image](t, socket, "GET /v1/images", ""); len(images) != 0 {
		t.Errorf("images after the pin is gone: %+v", images)
	}
}

// A container on plain directories is marked, with the reason.
func TestControlTellsWhy(t *testing.T) {
	cl, m := inside(t, flavours[0], func(c *config.Config) { c.Pool.Size = 16 << 20 })
	ctx := namespaces.WithNamespace(t.Context(), "default")
	top, err := m.pull(ctx, false, []file{{"big", random(2, 20<<20)}})
	m.must(err)
	_, err = m.sn.Prepare(ctx, "default/100/c", top)
	m.must(err)
	list, err := cl.containers(ctx)
	m.must(err)
	if len(list) != 1 || list[0].Shared || list[0].Directories != 1 || !strings.Contains(list[0].Why, "pool is full") {
		t.Errorf("containers %+v", list)
	}
	s, err := cl.status(ctx)
	if err != nil || s.Unshared != 1 || s.Fallbacks["full"] != 1 {
		t.Errorf("status %+v, %v", s, err)
	}
}
