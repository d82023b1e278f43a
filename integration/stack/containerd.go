package stack

import (
	"bytes"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"text/template"

	containerd "github.com/containerd/containerd/v2/client"
)

// containerdTemplate is the configuration of the private containerd. What containerd does for Kubernetes is off: it
// wants devices and directories that tests have no use for.
var containerdTemplate = template.Must(template.New("config.toml").Parse(`version = 3
root = "{{.Dir}}/containerd/root"
state = "{{.Run}}/state"
temp = "{{.Dir}}/containerd/temp"
imports = []
disabled_plugins = [
  "io.containerd.grpc.v1.cri",
  "io.containerd.cri.v1.images",
  "io.containerd.cri.v1.runtime",
  "io.containerd.podsandbox.controller.v1.podsandbox",
  "io.containerd.nri.v1.nri",
  "io.containerd.tracing.processor.v1.otlp",
  "io.containerd.internal.v1.tracing",
]
[grpc]
  address = "{{.Run}}/containerd.sock"
[ttrpc]
  address = "{{.Run}}/containerd.sock.ttrpc"

[proxy_plugins.daxfs]
  type = "snapshot"
  address = "{{.Daemon}}"
  capabilities = ["remap-ids", "only-remap-ids", "rebase"]
  [proxy_plugins.daxfs.exports]
    root = "{{.Dir}}/daxfs"
    enable_remote_snapshot_annotations = "true"
{{- if eq .Mode "streaming"}}
[proxy_plugins.daxfs-diff]
  type = "diff"
  address = "{{.Daemon}}"
{{- end}}

[plugins."io.containerd.transfer.v1.local"]
  max_concurrent_unpacks = {{.Unpacks}}
[[plugins."io.containerd.transfer.v1.local".unpack_config]]
  platform = "linux"
  snapshotter = "overlayfs"
  differ = "walking"
[[plugins."io.containerd.transfer.v1.local".unpack_config]]
  platform = "linux"
  snapshotter = "daxfs"
  differ = "{{if eq .Mode "streaming"}}daxfs-diff{{else}}walking{{end}}"
  optional = true
{{.More}}`))

// containerdConfig is where StartContainerd leaves the configuration.
func (s *Stack) containerdConfig() string { return filepath.Join(s.Dir, "containerd.toml") }

// StartContainerd starts the private containerd and waits until it answers.
func (s *Stack) StartContainerd() error {
	var text bytes.Buffer
	daemon := s.daemonSocket()
	if s.front != nil {
		daemon = s.front.listener.Addr().String()
	}
	err := containerdTemplate.Execute(&text, map[string]any{
		"Dir": s.Dir, "Run": s.Run, "Mode": s.options.Mode, "Unpacks": max(1, s.options.ParallelUnpacks),
		"More": s.options.Containerd, "Daemon": daemon,
	})
	if err != nil {
		return err
	}
	config := s.containerdConfig()
	if err := os.WriteFile(config, text.Bytes(), 0o644); err != nil {
		return err
	}
	s.containerd, err = startProcess("containerd", filepath.Join(s.Dir, "containerd.log"), s.env(),
		s.tools.path("containerd"), "--config", config, "--log-level", "warn")
	if err != nil {
		return err
	}
	return s.containerd.await(func() error {
		_, err := s.output("ctr", "version")
		return err
	})
}

// StopContainerd ends containerd with sig. Shims and their containers go on.
func (s *Stack) StopContainerd(sig syscall.Signal) error { return s.containerd.stop(sig) }

// env is the environment of everything that runs in the stack: our programs first on the path (but for those in first),
// and nothing that would point nerdctl or containerd at the machine's own.
func (s *Stack) env(first ...string) []string {
	path := strings.Join(append(first, s.tools.own, s.tools.bin), ":")
	if s.options.Path != "" {
		path += ":" + s.options.Path
	}
	return []string{
		"PATH=" + path + ":/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
		"HOME=" + s.Dir,
		"TMPDIR=" + filepath.Join(s.Dir, "tmp"),
		"XDG_RUNTIME_DIR=" + s.Run,
		"LANG=C.UTF-8",
	}
}

// command makes one of the client programs, with the flags that keep it private.
func (s *Stack) command(name string, args ...string) *exec.Cmd {
	var flags []string
	switch name {
	case "ctr":
		flags = []string{"--address", s.Run + "/containerd.sock", "--namespace", Namespace}
	case "nerdctl":
		flags = []string{
			"--address", s.Run + "/containerd.sock", "--namespace", Namespace, "--data-root", s.Dir + "/nerdctl",
			"--cni-path", s.tools.bin, "--cni-netconfpath", s.Dir + "/cni", "--hosts-dir", s.Dir + "/hosts",
			"--insecure-registry", "--cgroup-manager", "cgroupfs",
		}
	}
	cmd := exec.Command(s.tools.path(name), append(flags, args...)...)
	cmd.Env = s.env()
	cmd.Dir = s.Dir
	return cmd
}

// Client is connected to the private containerd, in the namespace of the tests. The caller closes it.
func (s *Stack) Client() (*containerd.Client, error) {
	return containerd.New(s.Run+"/containerd.sock", containerd.WithDefaultNamespace(Namespace))
}

// output runs a program and returns what it wrote to its standard output. The error holds all that it wrote.
func (s *Stack) output(name string, args ...string) (string, error) {
	cmd := s.command(name, args...)
	var stdout, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	if err := cmd.Run(); err != nil {
		return stdout.String(), fmt.Errorf("%s %s: %w\n%s%s", name, strings.Join(args, " "), err, stdout.String(), stderr.String())
	}
	return stdout.String(), nil
}
