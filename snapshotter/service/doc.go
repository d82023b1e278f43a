// Package service puts the daemon together: configuration, pool, mounts, snapshotter and the gRPC services on one socket.
//
//	s, err := service.Open(ctx, cfg)
//	if err != nil {
//		return err
//	}
//	defer s.Close()
//	return s.Serve(ctx)
//
// # Below the root
//
//	metadata.db      snapshots (package snapshotter)
//	snapshots/<id>/  upper and work directories
//	images/<id>/mnt  mounted images (package mount)
//	pool/index.db    what the pool holds (package pool)
//	pool/region      the pool itself, if it is a file without another path
//	packs/<digest>   layer packs
//
// # Layer packs
//
// Memory does not survive a reboot, containerd's view of its snapshots does. A layer that was unpacked can be stored again from its
// directory; a layer that was streamed has none. Where the region under the pool does not survive a reboot, the blob is
// copied to packs/ while it is streamed and synced before containerd is told that the layer is applied. The pack is the blob
// as it came: it takes a fraction of the space of the contents, it costs no more to write than to receive, and its diff ID
// proves it when it is read again. Rebuilding decompresses once more, which only happens after a reboot, or when memory was
// so short that the layer was dropped. Where there is no pack, or a damaged one, containerd is asked for the blob.
package service
