// Package snapshotter is a containerd snapshotter whose containers share one read-only lower per image, and the differ
// that goes with it.
//
// It knows directories, mounts and the life of snapshots; it does not know what an image is made of. Whatever turns
// layers into a mounted directory is behind [Lowers]; package snapshotter/service supplies the real one.
//
// # Vocabulary
//
// A snapshot is active (a container's root, or a layer that is being unpacked), a view, or committed. A committed
// snapshot contributes layers to its chain: those that the [Differ] streamed, then its own directory if anything was
// written to it. A chain is everything from the first layer up to one committed snapshot; its key is the chain ID when
// the name of the snapshot carries one, so that namespaces share it, else a name of our own.
//
// # Two ways in
//
// Walking: containerd unpacks a layer into <root>/snapshots/<id>/fs. After Commit a worker hands the directory to Lowers.
//
// Streaming: containerd hands the blob of the layer to [Differ.Apply], which hands it to Lowers. The directory stays
// empty. What was streamed is durable before Apply returns, so that Commit only records.
//
// Nothing is converted inside Commit: containerd calls it from within its own metadata write transaction.
//
// # What an active snapshot stands on
//
// The lower of a snapshot is chosen at Prepare, written down and never changed, because inode numbers must not change
// below a running container. It is an image for everything that runs; for a layer that is being unpacked it is the
// directories of the layers below, which the unpacker looks at but never mounts. Mounts makes the recorded lower again
// where it is gone, after a reboot for instance, at the same path.
//
// # State and crashes
//
// All metadata is in one bbolt file: containerd's core/snapshots/storage, and beside it in the same transactions a bucket
// of our own (see store.go). Directories are made inside the transaction that records them and removed after the one
// that forgets them; Cleanup removes what no record names. Everything that Lowers holds is found by mark and sweep from
// these records, so there are no counters that a crash could leave wrong.
//
// Close leaves every mount alone: containers go on, and the next start finds the mounts again.
package snapshotter
