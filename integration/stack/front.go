package stack

import (
	"errors"
	"io"
	"net"
	"sync"
	"sync/atomic"
	"time"
)

// front listens in place of a server that comes and goes, and forwards each connection when the server
// runs. So clients are never refused; some, like containerd, would then pause for a second.
type front struct {
	listener net.Listener
	server   string
	closing  chan struct{}
	running  sync.WaitGroup
	sent     atomic.Int64 // bytes sent by the server
}

// newFront listens at an address of a network ("unix", "tcp"), for a server at a Unix socket. The caller closes it.
func newFront(network, address, server string) (*front, error) {
	l, err := net.Listen(network, address)
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
	for _, way := range []struct {
		to   io.Writer
		from io.Reader
	}{{&counting{c, &f.sent}, s}, {s, c}} {
		go func() {
			io.Copy(way.to, way.from) // its error is that of a closed connection
			ended <- struct{}{}
		}()
	}
	select {
	case <-ended:
	case <-f.closing:
	}
}

type counting struct {
	io.Writer
	n *atomic.Int64
}

func (c *counting) Write(b []byte) (int, error) {
	n, err := c.Writer.Write(b)
	c.n.Add(int64(n))
	return n, err
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
