//go:build kubernetes

package kubernetes

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"fmt"
	"io"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"sigs.k8s.io/yaml"

	"github.com/daxfs/daxfs-snapshotter/integration/stack"
)

const token = "a-token-of-this-test"

// resources maps kinds of objects to the API server's paths; %s is the namespace.
var resources = map[string]string{
	"Namespace":      "/api/v1/namespaces",
	"ConfigMap":      "/api/v1/namespaces/%s/configmaps",
	"DaemonSet":      "/apis/apps/v1/namespaces/%s/daemonsets",
	"RuntimeClass":   "/apis/node.k8s.io/v1/runtimeclasses",
	"Pod":            "/api/v1/namespaces/%s/pods",
	"ServiceAccount": "/api/v1/namespaces/%s/serviceaccounts",
}

// A real API server, with validation and admission, accepts every object of docs/kubernetes, and knows every field.
func TestAPIServer(t *testing.T) {
	c := startAPIServer(t)
	docs := "../../docs/kubernetes/"
	kustomized, err := exec.Command(filepath.Join(cacheDir(t), "tools/kustomize"), "build", docs).Output()
	if err != nil {
		t.Fatal(err)
	}
	objects := bytes.Split(kustomized, []byte("\n---\n"))
	class, err := os.ReadFile(docs + "runtimeclass-gvisor.yaml")
	if err != nil {
		t.Fatal(err)
	}
	objects = append(objects, class)
	kinds := map[string]int{}
	for _, text := range objects {
		kind, status, answer := c.create(text, true)
		if status != http.StatusCreated {
			t.Errorf("%s: status %d: %s", kind, status, answer)
		}
		kinds[kind]++
		if kind == "Namespace" { // its contents need it
			if _, status, answer := c.create(text, false); status != http.StatusCreated {
				t.Fatalf("namespace: status %d: %s", status, answer)
			}
		}
		if kind != "DaemonSet" {
			continue
		}
		for _, bad := range []struct{ old, new, want string }{
			{"hostPID: true", "hostPid: true", "unknown field"},
			{"mountPropagation: Bidirectional", "mountPropagation: Both", "Unsupported value"},
		} {
			wrong := bytes.Replace(text, []byte(bad.old), []byte(bad.new), 1)
			if _, status, answer := c.create(wrong, true); status < 400 || !strings.Contains(answer, bad.want) {
				t.Errorf("with %q: status %d, %s; expected %q", bad.new, status, answer, bad.want)
			}
		}
	}
	if kinds["Namespace"] != 1 || kinds["ConfigMap"] != 1 || kinds["DaemonSet"] != 1 || kinds["RuntimeClass"] != 2 {
		t.Errorf("objects by kind: %v", kinds)
	}
}

func cacheDir(t *testing.T) string {
	t.Helper()
	cache, err := stack.CacheDir()
	if err != nil {
		t.Fatal(err)
	}
	return cache
}

type client struct {
	t    *testing.T
	http http.Client
}

const serverURL = "https://127.0.0.1:6443"

// create asks the server to create an object; a dry run stores nothing.
func (c *client) create(text []byte, dryRun bool) (kind string, status int, answer string) {
	c.t.Helper()
	var object struct {
		Kind     string
		Metadata struct{ Namespace string }
	}
	if err := yaml.Unmarshal(text, &object); err != nil {
		c.t.Fatal(err)
	}
	path, ok := resources[object.Kind]
	if !ok {
		c.t.Fatalf("an object of kind %q", object.Kind)
	}
	if strings.Contains(path, "%s") {
		path = fmt.Sprintf(path, object.Metadata.Namespace)
	}
	path += "?fieldValidation=Strict"
	if dryRun {
		path += "&dryRun=All"
	}
	status, answer, err := c.do(http.MethodPost, path, text)
	if err != nil {
		c.t.Fatal(err)
	}
	return object.Kind, status, answer
}

func (c *client) do(method, path string, body []byte) (status int, answer string, err error) {
	req, err := http.NewRequest(method, serverURL+path, bytes.NewReader(body))
	if err != nil {
		return 0, "", err
	}
	req.Header.Set("Authorization", "Bearer "+token)
	req.Header.Set("Content-Type", "application/yaml")
	resp, err := c.http.Do(req)
	if err != nil {
		return 0, "", err
	}
	defer resp.Body.Close()
	text, err := io.ReadAll(io.LimitReader(resp.Body, 1<<20))
	return resp.StatusCode, string(text), err
}

// startAPIServer starts etcd and kube-apiserver, which end with the test.
func startAPIServer(t *testing.T) *client {
	t.Helper()
	dir := t.TempDir()
	start(t, dir, "etcd", "--data-dir", filepath.Join(dir, "etcd"), "--unsafe-no-fsync")
	key := filepath.Join(dir, "key.pem")
	writeKey(t, key)
	tokens := filepath.Join(dir, "tokens.csv")
	if err := os.WriteFile(tokens, []byte(token+",test,test,system:masters\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	server := start(t, dir, "kube-apiserver", "--etcd-servers", "http://127.0.0.1:2379",
		"--cert-dir", filepath.Join(dir, "certs"),
		"--bind-address", "127.0.0.1", "--advertise-address", "127.0.0.1", "--service-cluster-ip-range", "10.0.0.0/24",
		"--service-account-issuer", "https://kubernetes.default.svc", "--service-account-key-file", key,
		"--service-account-signing-key-file", key, "--token-auth-file", tokens, "--authorization-mode", "RBAC",
		"--allow-privileged") // like kubeadm
	// It makes its own certificate, which is safe: this network namespace is private.
	c := &client{
		t:    t,
		http: http.Client{Transport: &http.Transport{TLSClientConfig: &tls.Config{InsecureSkipVerify: true}}},
	}
	for range 1200 {
		status, _, err := c.do(http.MethodGet, "/readyz", nil)
		if err == nil && status == http.StatusOK {
			return c
		}
		select {
		case <-server.ended:
			t.Fatal("kube-apiserver ended before it was ready")
		case <-time.After(100 * time.Millisecond):
		}
	}
	t.Fatal("kube-apiserver is not ready after two minutes")
	return nil
}

// program is a running program. The end of the test stops it if stop was not called.
type program struct {
	ended chan struct{} // closed when it has
	stop  func()
}

// start runs a program. Its log is shown if the test fails.
func start(t *testing.T, dir, name string, args ...string) *program {
	t.Helper()
	var log bytes.Buffer
	cmd := exec.Command(filepath.Join(cacheDir(t), "bin", name), args...)
	cmd.Dir, cmd.Stdout, cmd.Stderr = dir, &log, &log
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	p := &program{ended: make(chan struct{})}
	go func() {
		cmd.Wait()
		close(p.ended)
	}()
	p.stop = func() {
		cmd.Process.Signal(syscall.SIGTERM)
		select {
		case <-p.ended:
		case <-time.After(time.Minute):
			cmd.Process.Kill()
			<-p.ended
		}
	}
	t.Cleanup(func() {
		p.stop()
		if t.Failed() {
			t.Logf("%s ends with:\n%s", name, log.Bytes()[max(0, log.Len()-4000):])
		}
	})
	return p
}

// writeKey makes the key that signs the tokens of service accounts.
func writeKey(t *testing.T, name string) {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	der, err := x509.MarshalECPrivateKey(key)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(name, pem.EncodeToMemory(&pem.Block{Type: "EC PRIVATE KEY", Bytes: der}),
		0o600); err != nil {
		t.Fatal(err)
	}
}
