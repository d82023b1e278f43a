package daemon

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"syscall"
	"time"

	diffapi "github.com/containerd/containerd/api/services/diff/v1"
	snapshotsapi "github.com/containerd/containerd/api/services/snapshots/v1"
	"github.com/containerd/containerd/v2/contrib/diffservice"
	"github.com/containerd/containerd/v2/contrib/snapshotservice"
	"github.com/containerd/containerd/v2/core/diff"
	"github.com/containerd/log"
	"github.com/coreos/go-systemd/v22/activation"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc"
	"google.golang.org/grpc/health"
	healthapi "google.golang.org/grpc/health/grpc_health_v1"

	"github.com/daxfs/daxfs-snapshotter/daemon/api"
)

// stopTimeout is how long calls may continue after the daemon was told to stop. Clients retry a pull that is cut off.
const stopTimeout = 5 * time.Second

// Serve answers on the configured addresses until ctx ends. ready, if not nil, is called once Serve listens.
func (d *Daemon) Serve(ctx context.Context, ready func()) error {
	if err := d.takeSockets(ctx); err != nil {
		return err
	}
	l, err := d.listen(d.cfg.Address)
	if err != nil {
		return err
	}
	defer l.Close()
	stopHTTP, err := d.metrics.serve(ctx, d.cfg.Metrics)
	if err != nil {
		return err
	}
	defer stopHTTP()
	stopControl, err := d.serveControl(ctx)
	if err != nil {
		return err
	}
	defer stopControl()
	sctx, stopScrub := context.WithCancel(ctx)
	scrubbed := make(chan struct{})
	go func() {
		defer close(scrubbed)
		d.scrubLoop(sctx, int64(d.cfg.Pool.Scrub), scrubDelay, scrubInterval)
	}()
	published := make(chan struct{})
	go func() {
		defer close(published)
		d.publishLoop(sctx)
	}()
	defer func() { // before the pool is closed
		stopScrub()
		<-scrubbed
		<-published
	}()
	stopShared := d.watchShared(ctx)
	defer stopShared()
	log.G(ctx).WithField("address", d.cfg.Address).Info("serving")
	if ready != nil {
		ready()
	}
	err = serveGRPC(ctx, l, d.grpcServer(d.differ))
	d.cleanupLast(context.WithoutCancel(ctx))
	return err
}

// cleanupLast frees what nobody holds any more. The kernel frees an overlay a moment after its last user is gone, which
// may be after the last cleanup that containerd asked for, and a stopped daemon unmounts nothing: an operator who
// removes all images and stops the daemon would find one still mounted.
func (d *Daemon) cleanupLast(ctx context.Context) {
	ctx, cancel := context.WithTimeout(ctx, stopTimeout)
	defer cancel()
	if err := d.sn.Cleanup(ctx); err != nil {
		log.G(ctx).WithError(err).Warn("the last cleanup failed; the next start does it again")
	}
}

// grpcServer returns a server of the snapshotter and a differ.
func (d *Daemon) grpcServer(differ interface {
	diff.Applier
	diff.Comparer
},
) *grpc.Server {
	// Handlers must end before the pool below them is closed.
	srv := grpc.NewServer(grpc.MaxRecvMsgSize(maxMessage), grpc.MaxSendMsgSize(maxMessage), grpc.WaitForHandlers(true),
		grpc.Creds(peerCredentials{}), grpc.ChainUnaryInterceptor(plainError, logFailure, d.checkVisible))
	snapshotsapi.RegisterSnapshotsServer(srv, snapshotservice.FromSnapshotter(d.sn))
	diffapi.RegisterDiffServer(srv, diffservice.FromApplierAndComparer(differ, differ))
	healthapi.RegisterHealthServer(srv, health.NewServer())
	return srv
}

// serveGRPC serves until ctx ends, then lets running calls finish.
func serveGRPC(ctx context.Context, l net.Listener, srv *grpc.Server) error {
	failed := make(chan error, 1)
	go func() { failed <- srv.Serve(l) }()
	select {
	case err := <-failed:
		return fmt.Errorf("serve %s: %w", l.Addr(), err)
	case <-ctx.Done():
	}
	timer := time.AfterFunc(stopTimeout, srv.Stop)
	defer timer.Stop()
	srv.GracefulStop()
	if err := <-failed; err != nil && !errors.Is(err, grpc.ErrServerStopped) {
		return err
	}
	return nil
}

// takeSockets takes over systemd's sockets, if any. They outlive the daemon, so callers wait for its restart.
func (d *Daemon) takeSockets(ctx context.Context) error {
	list, err := activation.Listeners()
	if err != nil {
		return fmt.Errorf("sockets of systemd: %w", err)
	}
	d.sockets = map[string]net.Listener{}
	for _, l := range list {
		if l == nil {
			continue // not a stream socket
		}
		address := l.Addr().String()
		if address != d.cfg.Address && address != api.Socket(d.cfg.Address) {
			log.G(ctx).WithField("socket", address).WithField("address", d.cfg.Address).
				Warn("systemd made a socket that nothing is served on; make the unit and the configuration agree")
			l.Close()
			continue
		}
		d.sockets[address] = l
	}
	return nil
}

// listen returns a socket made by systemd, or makes one.
func (d *Daemon) listen(address string) (net.Listener, error) {
	if l := d.sockets[address]; l != nil {
		return l, nil
	}
	return listen(address)
}

// listen makes the socket, for root alone. It replaces the socket file of a dead process, not of a living one.
func listen(address string) (net.Listener, error) {
	if err := os.MkdirAll(filepath.Dir(address), 0o700); err != nil {
		return nil, err
	}
	if conn, err := net.DialTimeout("unix", address, time.Second); err == nil {
		conn.Close()
		return nil, fmt.Errorf("socket %q: another process answers there", address)
	}
	if st, err := os.Lstat(address); err == nil {
		if st.Mode().Type() != os.ModeSocket {
			return nil, fmt.Errorf("socket %q: there is something else of type %s", address, st.Mode().Type())
		}
		if err := os.Remove(address); err != nil {
			return nil, err
		}
	}
	// Set the mode before the socket gets its name: until then anyone could connect.
	config := net.ListenConfig{Control: func(_, _ string, c syscall.RawConn) error {
		var merr error
		err := c.Control(func(fd uintptr) { merr = unix.Fchmod(int(fd), 0o600) })
		return errors.Join(err, merr)
	}}
	l, err := config.Listen(context.Background(), "unix", address)
	if err != nil {
		return nil, err
	}
	l.(*net.UnixListener).SetUnlinkOnClose(false)
	return l, nil
}
