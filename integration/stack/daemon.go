package stack

import (
	"fmt"
	"net"
	"os"
	"path/filepath"
	"syscall"
)

// DaemonConfig is the path of the daemon's configuration. Tests may change the file while the daemon is stopped.
func (s *Stack) DaemonConfig() string { return filepath.Join(s.Dir, "daxfs.toml") }

// StartDaemon starts daxfs-snapshotter and waits until it takes connections.
func (s *Stack) StartDaemon() error {
	if !exists(s.DaemonConfig()) {
		text := fmt.Sprintf("root = %q\nsocket = %q\ncontainerd_socket = %q\n%s\n",
			s.Dir+"/daxfs", s.Run+"/daxfs.sock", s.Run+"/containerd.sock", s.options.Config)
		if err := os.WriteFile(s.DaemonConfig(), []byte(text), 0o644); err != nil {
			return err
		}
	}
	var err error
	s.daemon, err = startProcess("daxfs-snapshotter", filepath.Join(s.Dir, "daxfs-snapshotter.log"), s.env(),
		s.tools.path("daxfs-snapshotter"), "--config", s.DaemonConfig())
	if err != nil {
		return err
	}
	return s.daemon.await(func() error {
		c, err := net.Dial("unix", s.Run+"/daxfs.sock")
		if err == nil {
			c.Close()
		}
		return err
	})
}

// StopDaemon ends the daemon with sig: SIGTERM as an upgrade would, SIGKILL as a crash.
func (s *Stack) StopDaemon(sig syscall.Signal) error { return s.daemon.stop(sig) }

// DaemonDied tells whether the daemon ended without being asked to.
func (s *Stack) DaemonDied() bool {
	select {
	case <-s.daemon.done:
		return true
	default:
		return false
	}
}
