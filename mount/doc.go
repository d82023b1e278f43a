// Package mount mounts images, each of them once, however many containers use it.
//
// An image is a window of shared memory (see package pool) or a file of its own. A Driver knows one way to make the
// window visible as a read-only directory; a Table keeps the directories, counts who uses them and finds them again after
// a restart of the process:
//
//	t, err := mount.Open(ctx, "/var/lib/daxfs-snapshotter", drivers.All(drivers.Options{}))
//	m, err := t.Mount(ctx, src, "snapshot-17")     // mounted now, or already: same directory
//	... lowerdir=m.Dir ...
//	err = t.Release(src.Key, "snapshot-17")        // never unmounts
//	err = t.Prune(ctx)                             // unmounts what no holder uses
//
// # Where
//
// Every image is mounted at <root>/images/<id>/mnt, with a parent directory of its own. containerd makes an idmapped
// lower by cloning the parent of the lower directory with everything mounted below it; images that were siblings would
// be cloned with each other, and a sibling that cannot be idmapped would make the call fail.
//
// <root>/images has mode 0700. Table mounts carry neither nosuid nor nodev: an overlay takes both from its own mount, not
// from its lower, but a read-only snapshot is handed out as a bind mount, which inherits them, and its setuid programs
// must work as they do with any other snapshotter. What keeps local users away from the setuid programs of an
// untrusted image is the closed directory. Source.Restrict asks for nosuid and nodev; the command line sets it, because
// there the user chooses the directory.
//
// # Mount namespaces
//
// The containers' runtime has to see the mounts: run the daemon in the host's mount namespace, on a root below a shared
// mount (systemd makes "/" shared), without PrivateMounts, PrivateTmp, ProtectSystem and the like; in a pod, with
// mountPropagation: Bidirectional.
//
// # Lifetimes
//
// Mounts outlive the process: Close unmounts nothing, and stopping or upgrading the daemon never takes the root of a
// container away. An overlay keeps the superblock of its lower alive even after the lower was unmounted, so an unmount
// of an image in use does not break containers that run already. Open reads /proc/self/mountinfo, adopts each mount that is
// exactly what its record says, and removes what is stale. Nothing is touched that has no record below <root>/images.
package mount
