// Package store is the image store of a host: it keeps layers and images in a pool, mounts images, and knows who holds
// what. The daemon and the command line use it alike; one process at a time owns a store.
//
//	s, err := store.Open(ctx, store.Config{Root: root, Pool: store.Pool{Kind: region.KindFile}, Drivers: drivers.All()})
//	...
//	defer s.Close()
//	info, err := s.Put(ctx, image, "docker.io/library/debian:12") // held by pin/docker.io/library/debian:12
//
// # Identity
//
// A streamed layer is named by its diff ID, which this store computed when it read the layer: "blob/sha256:…". An
// unpacked layer has a key that its owner chose: "dir/…". An image is named by the keys of its layers, see ImageKey. A
// caller who merely claims a diff ID is given a layer that is stored only if he has a blob of which the store once
// computed that diff ID; else his own blob is read. So no claim gives anybody another one's bytes, or plants some.
//
// # Holders
//
// Layers and images have holders, which are recorded in the index of the pool: "containerd/<namespace>", "pin/<name>",
// "mount/<directory>" and "reader/<id>". Sweep frees what nobody holds. The snapshotter's records decide what the
// holders of containerd's namespaces are; other programs go by what the index says of them.
//
// # How space becomes free
//
// An image that nobody holds is unmounted when nothing is seen to stand on it, then taken out of the pool. Contents
// that no layer and no image holds are dead: their inodes are erased, then the kernel is asked for each of them whether
// somebody has it open or mapped. What is free of users is free space. What can not be decided waits for the next
// sweep, at the latest until nothing is mounted, when the pool may begin a new epoch.
//
// # Below the root
//
//	images/, live/          mounts (package mount)
//	pool/                   the index of each pool, and the pool itself if it is a file without another path
//	packs/<digest>          layer packs
//	plain/<hash>            copies of images for which there was no room in the pool
//
// # Layer packs
//
// Memory does not survive a reboot, containerd's view of its snapshots does. A layer that was unpacked can be restored
// from its directory; a layer that was streamed has none. Where the region under the pool does not survive a reboot,
// the blob is copied to packs/ while it is streamed and synced before containerd is told that the layer is applied. The
// pack is the blob as it came: it takes a fraction of the space of the contents, it costs no more to write than to
// receive, and its diff ID proves it when it is read again. Where there is no pack, or a damaged one, containerd is
// asked for the blob.
package store
