// Package snapshotter is a containerd snapshotter whose containers share one read-only lower per image, and the differ
// that goes with it.
//
// It knows directories, mounts and the life of snapshots; it does not know what an image is made of. Whatever turns
// layers into a mounted directory is behind [Lowers]; package store has the real one.
//
// # Vocabulary
//
// A snapshot is active (a container's root, or a layer that is being unpacked), a view, or committed. A committed
// snapshot contributes layers to its chain: those that the [Differ] streamed, then its own directory if anything was
// written to it. A chain is everything from the first layer up to one committed snapshot. The keys of its layers name
// its image: a streamed layer is named by the diff ID that was computed when it was read, an unpacked one by its
// snapshot. Names of snapshots say nothing about contents, so no namespace is given what another one merely called so.
//
// # Two ways in
//
// Walking: containerd unpacks a layer into <root>/snapshots/<id>/fs. After Commit a worker hands the directory to
// Lowers. Where Lowers keeps it durably, the directory is removed once the chain is complete and nothing stands on it.
//
// Streaming: containerd hands the blob of the layer to [Differ.Apply], which hands it to Lowers. The directory stays
// empty. What was streamed is durable before Apply returns, so that Commit only records.
//
// A layer above a streamed one is prepared to be streamed as well, without a look at what is below it. If it is walked
// all the same, its directories may have wrong attributes; the layer is then restored from its blob, to which the
// labels of the snapshot lead, before it is used.
//
// Nothing is converted inside Commit: containerd calls it from within its own metadata write transaction.
//
// # What a snapshot stands on
//
// The lower of a snapshot is chosen at Prepare, written down and never changed, because inode numbers must not change
// below a running container. It is an image for everything that runs; for a layer that is being unpacked it is the
// directories of the layers below, which the unpacker looks at but never mounts. Where there is no room for an image it
// is directories, or a copy of the image on disk. Mounts makes the recorded lower again where it is gone, after a
// reboot for instance.
//
// Everything that stands on something is an overlay with an upper directory of its own, views too. So the kernel can be
// asked whether the overlay of a snapshot still lives after the snapshot is removed. Until it is dead its directory and
// its lower stay in use (see gone.go).
//
// # State and crashes
//
// All metadata is in one bbolt file: containerd's core/snapshots/storage, and beside it in the same transactions a
// bucket of our own (see store.go). Directories are made inside the transaction that records them and removed after the
// one that forgets them; Cleanup removes what no record names. Everything that Lowers holds is found by mark and sweep
// from these records, so there are no counters that a crash could leave wrong. Removing needs no room on the disk.
//
// Close leaves every mount alone: containers go on, and the next start finds the mounts again.
package snapshotter
