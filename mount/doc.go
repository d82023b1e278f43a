// Package mount mounts a pool once, and shows each of its images in a directory of its own.
//
// A pool is one file system: its root directory has a slot for each image (see package daxfs), and equal files of
// images are one inode. So it is mounted once, and an image is a bind of its slot. A Driver knows one way to mount a
// pool, or an image file; a Table keeps the directories, finds them again after a restart of the process, and asks
// the kernel who still uses what:
//
//	t, err := mount.Open(ctx, "/var/lib/daxfs-snapshotter", drivers.All(), pool, mount.Options{})
//	m, err := t.Mount(ctx, img)        // after img was published; mounted now, or already: same directory
//	... lowerdir=m.Dir ...
//	used, err := t.UsedBy(ctx, key)    // "" if no mount table shows a use
//	err = t.Unmount(ctx, key)
//	free, err := t.Unused(ctx, extents, erase)
//
// # Where
//
// The pool is mounted at <root>/live/<id>/mnt, an image at <root>/images/<id>/mnt. The ids depend on the UUID of the
// pool: another pool, or a new epoch, has directories of its own, and what runs from the old ones is not disturbed.
// Each image has a parent directory of its own, because containerd makes an idmapped lower by cloning the parent of
// the lower directory with everything mounted below it.
//
// <root>/live and <root>/images have mode 0700. Nobody may look up a slot before its publication is complete: the
// kernel could keep half an inode for ever. So backups, updatedb and du must not come there, and nothing here looks
// up a slot before Mount is asked to. Mounts carry neither nosuid nor nodev: an overlay takes both from its own mount
// and not from its lower. What keeps local users away from the setuid programs of an untrusted image is the closed
// directory. Bind can add both flags, for a directory that a user chose.
//
// The daxfs driver is different: the module knows no slots. It mounts a window of the pool for each image, directly
// at <root>/images/<id>/mnt.
//
// # What the kernel sees of a publication
//
// What is written to a file is seen at once by a FUSE server, and through a file-backed mount before Linux 7.3. Below
// a file system on a block device lies a cache that holds old metadata, and since Linux 7.3 in a file-backed one,
// too: Mount drops it until the slot appears, a bounded number of times.
//
// # Who uses what
//
// UsedBy reads the mount tables of all mount namespaces. Unused asks the kernel about inodes: a write lease is
// refused while a file is open, mapped or running, through whatever mount, in whatever namespace; and an inode that
// was erased on disk and no longer opens by its handle has left memory, so nobody can reach it again. Alive tells
// whether any file system of the pool lives. What they cannot see is an overlay that was lazily unmounted and is kept
// by a working directory: its owner has to know (mounting its upper directory again with index=on fails while it
// lives).
//
// The processes of all namespaces must be visible: in a pod, hostPID: true.
//
// # Mount namespaces
//
// The containers' runtime has to see the mounts: run the daemon in the host's mount namespace, on a root below a
// shared mount (systemd makes "/" shared), without PrivateMounts, PrivateTmp, ProtectSystem and the like; in a pod,
// with mountPropagation: Bidirectional.
//
// # Lifetimes
//
// Mounts outlive the process: stopping or upgrading the daemon never takes the root of a container away. An overlay
// keeps the superblock of its lower alive even after the lower was unmounted, so an unmount never breaks containers
// that run. Open adopts what is exactly what its record says, whichever driver mounted it; if the pool was unmounted
// while an image is bound, it is attached again from there. What belongs to other pools, or to version 1 of the
// program, stays until RemoveStale. Nothing is touched that has no record below <root>/images or <root>/live.
package mount
