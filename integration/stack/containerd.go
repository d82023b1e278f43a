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

// containerdTemplate is the configuration of the private containerd. The plugins for Kubernetes are
// off, because they need devices and directories that most tests do not use.
var containerdTemplate = template.Must(template.New("config.toml").Parse(`version = 3
root = "{{.Dir}}/containerd/root"
state = "{{.Run}}/state"
temp = "{{.Dir}}/containerd/temp"
imports = []
disabled_plugins = [
{{- if not .Kubernetes}}
  "io.containerd.grpc.v1.cri",
  "io.containerd.cri.v1.images",
  "io.containerd.cri.v1.runtime",
  "io.containerd.podsandbox.controller.v1.podsandbox",
{{- end}}
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
    root = "{{.Root}}"
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

// ContainerdConfig returns the path of the configuration that StartContainerd writes.
func (s *Stack) ContainerdConfig() string { return filepath.Join(s.Dir, "containerd.toml") }

// ContainerdConfig returns the configuration of a containerd with its state in dir and its sockets in
// run. It uses the daxfs-snapshotter at the socket daemon, which keeps its state in root.
func (o Options) ContainerdConfig(dir, run, daemon, root string) ([]byte, error) {
	var text bytes.Buffer
	err := containerdTemplate.Execute(&text, map[string]any{
		"Dir": dir, "Run": run, "Mode": o.Mode, "Unpacks": max(1, o.ParallelUnpacks), "More": o.Containerd,
		"Daemon": daemon,
		"Root":   root, "Kubernetes": o.Kubernetes,
	})
	return text.Bytes(), err
}

// StartContainerd starts the private containerd and waits until it answers.
func (s *Stack) StartContainerd() error { return s.startContainerd(nil) }

// RestartContainerd restarts containerd with the configuration changed by edit, unless edit is nil.
func (s *Stack) RestartContainerd(edit func(config string) string) error {
	if err := s.containerd.stop(syscall.SIGTERM); err != nil {
		return err
	}
	return s.startContainerd(edit)
}

// StartContainerdApart starts containerd in its own mount namespace, to which no mount of the daemon propagates.
func (s *Stack) StartContainerdApart() error {
	return s.startContainerd(nil, "unshare", "--mount", "--propagation", "private")
}

func (s *Stack) startContainerd(edit func(string) string, with ...string) error {
	daemon := s.daemonSocket()
	if s.front != nil {
		daemon = s.front.listener.Addr().String()
	}
	o := s.options
	o.Containerd = strings.NewReplacer("{{run}}", s.Run, "{{dir}}", s.Dir, "{{bin}}", s.tools.bin).Replace(o.Containerd)
	text, err := o.ContainerdConfig(s.Dir, s.Run, daemon, s.DaemonRoot())
	if err != nil {
		return err
	}
	config, lines := s.ContainerdConfig(), string(text)
	if edit != nil {
		lines = edit(lines)
	}
	if err := os.WriteFile(config, []byte(lines), 0o644); err != nil {
		return err
	}
	argv := append(with, s.tools.path("containerd"), "--config", config, "--log-level", "warn")
	s.containerd, err = startProcess("containerd", filepath.Join(s.Dir, "containerd.log"), s.env(), argv...)
	if err != nil {
		return err
	}
	return s.containerd.await(func() error {
		_, err := s.output("ctr", "version")
		return err
	})
}

// StopContainerd ends containerd with sig. Shims and their containers continue.
func (s *Stack) StopContainerd(sig syscall.Signal) error { return s.containerd.stop(sig) }

// env returns the environment of everything in the stack: our programs come first on the path, after
// those in first, and no variable points nerdctl or containerd at the machine's own.
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

// command returns a command of a client program, with the flags that keep it private.
func (s *Stack) command(name string, args ...string) *exec.Cmd {
	var flags []string
	switch name {
	case "ctr":
		flags = []string{"--address", s.Run + "/containerd.sock", "--namespace", Namespace}
	case "nerdctl":
		flags = []string{
			"--address", s.Run + "/containerd.sock", "--namespace", Namespace, "--data-root", s.Dir + "/nerdctl",
			"--cni-path", s.tools.bin, "--cni-netconfpath", s.Dir + "/cni", "--hosts-dir", s.HostsDir(),
			"--insecure-registry", "--cgroup-manager", "cgroupfs",
		}
	}
	cmd := exec.Command(s.tools.path(name), append(flags, args...)...)
	cmd.Env = s.env()
	cmd.Dir = s.Dir
	return cmd
}

// Client connects to the private containerd, in the namespace of the tests. The caller closes the client.
func (s *Stack) Client() (*containerd.Client, error) {
	return containerd.New(s.Run+"/containerd.sock", containerd.WithDefaultNamespace(Namespace))
}

// output runs a program and returns its standard output. An error contains all of its output.
func (s *Stack) output(name string, args ...string) (string, error) {
	cmd := s.command(name, args...)
	var stdout, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	if err := cmd.Run(); err != nil {
		return stdout.String(),
			fmt.Errorf("%s %s: %w\n%s%s", name, strings.Join(args, " "), err, stdout.String(), stderr.String())
	}
	return stdout.String(), nil
}
