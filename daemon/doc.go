// Package daemon combines configuration, store, snapshotter, the gRPC services for containerd on one
// socket, the control socket for people, metrics and health.
//
//	d, err := daemon.Open(ctx, cfg)
//	if err != nil {
//		return err
//	}
//	defer d.Close()
//	return d.Serve(ctx, nil)
//
// The root holds the snapshots (package snapshotter: metadata.db, snapshots/) and the files of package store.
package daemon
