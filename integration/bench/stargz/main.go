// Command stargz is stargz-snapshotter and its converter, for the comparison. It is a module of its
// own, so that its dependencies are not those of daxfs. The upstream command is not usable: its
// directory is a module that the Go module proxy does not serve.
//
//	stargz serve SOCKET ROOT           serves the snapshotter, on its own defaults
//	stargz convert LAYER.tar.gz OUT    writes the layer as eStargz and prints the digest of its table of contents
package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/signal"

	snapshotsapi "github.com/containerd/containerd/api/services/snapshots/v1"
	"github.com/containerd/containerd/v2/contrib/snapshotservice"
	"github.com/containerd/stargz-snapshotter/estargz"
	"github.com/containerd/stargz-snapshotter/service"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc"
)

func main() {
	if err := run(os.Args[1:]); err != nil {
		fmt.Fprintln(os.Stderr, "stargz:", err)
		os.Exit(1)
	}
}

func run(args []string) error {
	switch {
	case len(args) == 3 && args[0] == "serve":
		return serve(args[1], args[2])
	case len(args) == 3 && args[0] == "convert":
		return convert(args[1], args[2])
	default:
		return errors.New("usage: stargz serve SOCKET ROOT | stargz convert LAYER.tar.gz OUT")
	}
}

func serve(socket, root string) error {
	ctx, stop := signal.NotifyContext(context.Background(), unix.SIGTERM, unix.SIGINT)
	defer stop()
	var c service.Config
	c.Direct = true               // the default of the configuration file
	c.ForceSingleRangeMode = true // our registry answers only the first range of a request
	sn, err := service.NewStargzSnapshotterService(ctx, root, &c)
	if err != nil {
		return err
	}
	server := grpc.NewServer()
	snapshotsapi.RegisterSnapshotsServer(server, snapshotservice.FromSnapshotter(sn))
	l, err := net.Listen("unix", socket)
	if err != nil {
		return errors.Join(err, sn.Close())
	}
	go func() {
		<-ctx.Done()
		server.Stop()
	}()
	return errors.Join(server.Serve(l), sn.Close())
}

func convert(from, to string) (err error) {
	in, err := os.Open(from)
	if err != nil {
		return err
	}
	defer in.Close()
	info, err := in.Stat()
	if err != nil {
		return err
	}
	b, err := estargz.Build(io.NewSectionReader(in, 0, info.Size()))
	if err != nil {
		return fmt.Errorf("convert %q: %w", from, err)
	}
	defer b.Close()
	out, err := os.Create(to)
	if err != nil {
		return err
	}
	if _, err := io.Copy(out, b); err != nil {
		return errors.Join(err, out.Close())
	}
	if err := errors.Join(out.Sync(), out.Close()); err != nil {
		return err
	}
	fmt.Println(b.TOCDigest())
	return nil
}
