package stack

import (
	"errors"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"syscall"
)

// PeerSocket is where a snapshotter that is not ours listens, for the configuration of containerd. There is one /run for
// all stacks of a process, and one stack with a peer at a time.
const PeerSocket = "/run/daxfs-peer.sock"

// PeerRoot is the state directory of such a snapshotter.
func (s *Stack) PeerRoot() string { return filepath.Join(s.Dir, "peer") }

// StopPeer ends the snapshotter that is not ours with sig.
func (s *Stack) StopPeer(sig syscall.Signal) error { return s.peer.stop(sig) }

// StartPeer starts the snapshotter that is not ours and waits until it takes connections.
func (s *Stack) StartPeer() error {
	if err := os.Remove(PeerSocket); err != nil && !errors.Is(err, fs.ErrNotExist) { // of the stack before
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
