package stack

import (
	"errors"
	"io"
	"net"
	"sync"
	"time"
)

// front stands before a socket whose server comes and goes: it takes connections at any time, and passes each on as soon as
// there is a server. A client that pauses after a connection was refused, as containerd does for a second, has none refused.
type front struct {
	listener net.Listener
	server   string
	closing  chan struct{}
	running  sync.WaitGroup
}

// newFront listens at address. The caller closes it.
func newFront(address, server string) (*front, error) {
	l, err := net.Listen("unix", address)
	if err != nil {
		return nil, err
	}
	f := &front{listener: l, server: server, closing: make(chan struct{})}
	f.running.Go(func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			f.running.Go(func() { f.pass(c) })
		}
	})
	return f, nil
}

// pass connects c with the server until either of them ends the connection.
func (f *front) pass(c net.Conn) {
	defer c.Close()
	var s net.Conn
	for {
		var err error
		if s, err = net.Dial("unix", f.server); err == nil {
			break
		}
		select {
		case <-f.closing:
			return
		case <-time.After(2 * time.Millisecond):
		}
	}
	defer s.Close()
	ended := make(chan struct{}, 2)
	for _, way := range [][2]net.Conn{{c, s}, {s, c}} {
		go func() {
			io.Copy(way[0], way[1]) // its error is that of a connection that ended
			ended <- struct{}{}
		}()
	}
	select {
	case <-ended:
	case <-f.closing:
	}
}

// Close ends all connections.
func (f *front) Close() error {
	close(f.closing)
	err := f.listener.Close()
	f.running.Wait()
	if errors.Is(err, net.ErrClosed) {
		return nil
	}
	return err
}
