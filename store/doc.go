// Package store is the image store of a host. It keeps layers and images in a pool, mounts images, and
// records who holds them. The daemon and the command line both use it; one process at a time owns a
// store.
//
//	s, err := store.Open(ctx, store.Config{
//		Root: root, Pool: store.Pool{Kind: region.KindFile}, Drivers: drivers.All(),
//	})
//	...
//	defer s.Close()
//	info, err := s.Put(ctx, image, "docker.io/library/debian:12") // held by pin/docker.io/library/debian:12
//
// # Identity
//
// A streamed layer is named by the diff ID that this store computed when it read the layer:
// "blob/sha256:…". An unpacked layer has a key that its owner chose: "dir/…". An image is named by the
// keys of its layers, see ImageKey. A caller who only claims a diff ID gets a stored layer only if he
// has a blob for which the store once computed that diff ID; otherwise the store reads his own blob.
// So a claim can neither obtain another caller's bytes nor plant any.
//
// # Holders
//
// The index of the pool records the holders of layers and images: "containerd/<namespace>",
// "pin/<name>", "mount/<directory>" and "reader/<id>". Sweep frees what nobody holds. The
// snapshotter's records decide about the holders of containerd's namespaces; other programs rely on
// the index for them.
//
// # How space becomes free
//
// An image without holders is unmounted once no use of it is visible, then removed from the pool.
// Contents that no layer and no image holds are dead. Their inodes are erased, then the kernel is
// asked for each one whether it is open or mapped. Contents without users become free space. Undecided
// cases wait for the next sweep, at the latest until nothing is mounted, when the pool may begin a new
// epoch.
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
// Memory does not survive a reboot, but containerd's view of its snapshots does. An unpacked layer can
// be restored from its directory; a streamed layer has none. So if the region does not survive a
// reboot, the blob of a streamed layer is copied to packs/ during the read, and synced before
// containerd learns that the layer is applied. The pack is the unchanged blob: it takes a fraction of
// the space of the contents, costs no more to write than to receive, and its diff ID proves it when it
// is read again. If a pack is missing or damaged, containerd is asked for the blob.
package store
