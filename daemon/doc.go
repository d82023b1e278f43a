// Package daemon puts the daemon together: configuration, store, snapshotter, the gRPC services for containerd on one
// socket, the control socket for people, metrics and health.
//
//	d, err := daemon.Open(ctx, cfg)
//	if err != nil {
//		return err
//	}
//	defer d.Close()
//	return d.Serve(ctx, nil)
//
// Below the root are the snapshots (package snapshotter: metadata.db, snapshots/) and what package store keeps.
package daemon
