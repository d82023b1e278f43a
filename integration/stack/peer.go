package stack

import (
	"errors"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"syscall"
)

// PeerSocket is the address of a third-party snapshotter, for the configuration of containerd. All
// stacks of a process share /run, so only one stack with a peer can run at a time.
const PeerSocket = "/run/daxfs-peer.sock"

// PeerRoot returns the state directory of the third-party snapshotter.
func (s *Stack) PeerRoot() string { return filepath.Join(s.Dir, "peer") }

// StopPeer ends the third-party snapshotter with sig.
func (s *Stack) StopPeer(sig syscall.Signal) error { return s.peer.stop(sig) }

// StartPeer starts the third-party snapshotter and waits until it accepts connections.
func (s *Stack) StartPeer() error {
	if err := os.Remove(PeerSocket); err != nil && !errors.Is(err, fs.ErrNotExist) { // from an earlier stack
		return err
	}
	if err := os.MkdirAll(s.PeerRoot(), 0o711); err != nil {
		return err
	}
	argv := append(s.options.Peer[:len(s.options.Peer):len(s.options.Peer)], PeerSocket, s.PeerRoot())
	var err error
	if s.peer, err = startProcess(filepath.Base(argv[0]), filepath.Join(s.Dir, "peer.log"), s.env(),
		argv...); err != nil {
		return err
	}
	return s.peer.await(func() error {
		c, err := net.Dial("unix", PeerSocket)
		if err != nil {
			return err
		}
		return c.Close()
	})
}
