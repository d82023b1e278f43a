// Package mount mounts a pool once, and shows each of its images in a directory of its own.
//
// A pool is one file system. Its root directory has a slot for each image (see package daxfs), and
// equal files of images share one inode. So the pool is mounted once, and an image is a bind of its
// slot. A Driver knows one way to mount a pool or an image file. A Table keeps the directories, finds
// them again after a restart of the process, and asks the kernel who still uses what:
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
// The pool is mounted at <root>/live/<id>/mnt, an image at <root>/images/<id>/mnt. The ids depend on
// the UUID of the pool: another pool, or a new epoch, gets directories of its own, and containers on
// the old ones keep running. Each image has its own parent directory, because containerd makes an
// idmapped lower by cloning the parent of the lower directory with everything mounted below it.
//
// <root>/live and <root>/images have mode 0700. Nobody may look up a slot before its publication is
// complete: the kernel could keep half an inode for ever. So keep backups, updatedb and du away; this
// package looks up a slot only when Mount is called. Mounts carry neither nosuid nor nodev, because an
// overlay takes both from its own mount, not from its lower. The closed directory keeps local users
// away from setuid programs of untrusted images. Bind can add both flags, for a directory that a user
// chose.
//
// The daxfs driver differs: the module knows no slots. It mounts a window of the pool for each image,
// directly at <root>/images/<id>/mnt.
//
// # What the kernel sees of a publication
//
// A FUSE server sees writes to the file at once, and so does a file-backed mount before Linux 7.3. A
// file system on a block device has a cache that may hold old metadata, and since Linux 7.3 a
// file-backed one has, too: Mount drops that cache until the slot appears, a bounded number of times.
//
// # Who uses what
//
// UsedBy reads the mount tables of all mount namespaces. Unused asks the kernel about inodes. The
// kernel refuses a write lease while a file is open, mapped or running, through any mount in any
// namespace. An inode that was erased on disk and no longer opens by its handle has left memory, so
// nobody can reach it again. Alive tells whether any file system of the pool lives. None of them sees
// an overlay that was lazily unmounted and is kept by a working directory: its owner has to know
// (mounting its upper directory again with index=on fails while it lives).
//
// The processes of all namespaces must be visible: in a pod, hostPID: true.
//
// # Mount namespaces
//
// The containers' runtime must see the mounts. Run the daemon in the host's mount namespace, on a root
// below a shared mount (systemd makes "/" shared), without PrivateMounts, PrivateTmp, ProtectSystem
// and the like; in a pod, with mountPropagation: Bidirectional.
//
// # Lifetimes
//
// Mounts outlive the process: stopping or upgrading the daemon never takes away the root of a
// container. An overlay keeps the superblock of its lower alive after the lower was unmounted, so an
// unmount never breaks running containers. Open adopts mounts that match their record, whichever
// driver made them. If the pool was unmounted while an image is bound, it is attached again from that
// bind. Mounts of other pools, and of version 1 of the program, stay until RemoveStale. Directories
// below <root>/images and <root>/live without a record are never touched.
package mount
