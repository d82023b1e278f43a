package stack

import (
	"net"
	"os"
	"path/filepath"
	"strings"
	"syscall"
)

// StartDaemon starts daxfs-snapshotter and waits until it accepts connections. If containerd runs with
// snapshots, it also waits until containerd has reconnected: after a failure containerd retries only seconds later.
func (s *Stack) StartDaemon() error {
	config := filepath.Join(s.Dir, "daxfs.toml")
	text := strings.NewReplacer("{{run}}", s.Run, "{{dir}}", s.Dir).Replace(s.options.Config)
	if err := os.WriteFile(config, []byte(text), 0o644); err != nil {
		return err
	}
	var err error
	s.daemon, err = startProcess("daxfs-snapshotter", s.DaemonLog(), s.env(),
		s.tools.path("daxfs-snapshotter"), "--config", config, "--log-level", "debug", "--root", s.DaemonRoot(),
		"--address", s.daemonSocket(), "--containerd-address", s.Run+"/containerd.sock")
	if err != nil {
		return err
	}
	return s.daemon.await(func() error {
		c, err := net.Dial("unix", s.daemonSocket())
		if err != nil {
			return err
		}
		c.Close()
		if s.containerd == nil || s.containerd.ended() {
			return nil
		}
		_, err = s.output("ctr", "snapshot", "--snapshotter", "daxfs", "ls")
		return err
	})
}

func (s *Stack) daemonSocket() string { return s.Run + "/daxfs.sock" }

// DaemonRoot returns the state directory of the daemon.
func (s *Stack) DaemonRoot() string { return filepath.Join(s.Dir, "daxfs") }

// DaemonLog returns the path of the daemon's log.
func (s *Stack) DaemonLog() string { return filepath.Join(s.Dir, "daxfs-snapshotter.log") }

// StopDaemon ends the daemon with sig: SIGTERM like an upgrade, SIGKILL like a crash.
func (s *Stack) StopDaemon(sig syscall.Signal) error { return s.daemon.stop(sig) }

// SignalDaemon sends sig to the daemon and does not wait.
func (s *Stack) SignalDaemon(sig syscall.Signal) error { return s.daemon.cmd.Process.Signal(sig) }

// SetConfig replaces the TOML that the next StartDaemon uses.
func (s *Stack) SetConfig(text string) { s.options.Config = text }
