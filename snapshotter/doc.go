// Package snapshotter implements a containerd snapshotter whose containers share one read-only lower
// per image, and the differ that goes with it.
//
// It manages directories, mounts and the life of snapshots. It does not know how an image is stored:
// [Lowers] turns layers into a mounted directory, and package store implements it.
//
// # Vocabulary
//
// A snapshot is active (a container's root, or a layer that is being unpacked), a view, or committed.
// A committed snapshot adds layers to its chain: those that the [Differ] streamed, then its own
// directory if that has entries. A chain is everything from the first layer up to one committed
// snapshot. The keys of its layers make the key of its image: a streamed layer is keyed by the diff ID
// computed while it was read, an unpacked one by its snapshot. Snapshot names are not trusted, so no
// namespace can get another one's contents by choosing a name.
//
// # Two ways in
//
// Walking: containerd unpacks a layer into <root>/snapshots/<id>/fs. After Commit a worker hands the
// directory to Lowers. If Lowers is durable, the directory is removed once its chain is complete and
// nothing stands on it.
//
// Streaming: containerd hands the blob of the layer to [Differ.Apply], which hands it to Lowers. The
// directory stays empty. The layer is durable before Apply returns, so Commit only records it.
//
// A layer above a streamed one is prepared to be streamed as well, and gets no lower. If it is walked
// after all, its directories may have wrong attributes. The layer is then restored from its blob,
// which the labels of the snapshot name, before it is used.
//
// Commit converts nothing, because containerd calls it within its own metadata write transaction.
//
// # What a snapshot stands on
//
// Prepare chooses the lower of a snapshot and records it. The choice never changes, because inode
// numbers must not change below a running container. Everything that runs stands on an image. A layer
// that is being unpacked stands on the directories of the layers below, which the unpacker looks at
// but never mounts. Without room for an image, directories or a copy on disk take its place. Mounts
// makes the recorded lower again if it is gone, for instance after a reboot.
//
// Everything that stands on something, views included, is an overlay with an upper directory of its
// own, so the kernel can tell whether the overlay outlives its snapshot. As long as it does, its
// directory and its lower stay in use (see gone.go).
//
// # State and crashes
//
// All metadata is in one bbolt file: containerd's core/snapshots/storage and our own bucket, changed
// in the same transactions (see store.go). Directories get their place inside the transaction that
// records them and are removed after the one that forgets them; Cleanup removes directories without a
// record. Mark and sweep over these records finds what Lowers may free, so there are no counters that
// a crash could leave wrong. Removing needs no room on the disk.
//
// Close leaves every mount alone: containers keep running, and the next start finds the mounts again.
package snapshotter
