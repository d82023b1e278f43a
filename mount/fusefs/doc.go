// Package fusefs serves a pool, or the EROFS half of an image file, through FUSE. It works with any
// memory that can be mapped, on kernels without EROFS or loop devices.
//
// An image never changes, so the kernel is told to keep everything for ever: names (missing ones,
// too), attributes, link targets, listings and contents. Only the root directory of a pool differs:
// images appear in it while it is served, so the kernel must not remember missing names there. Nor is
// it ever final that a pool has no extended attributes: the kernel asks each time. Open and opendir
// are answered with ENOSYS, after which the kernel stops asking. A second walk over a tree then never
// leaves the kernel, and N containers share one page-cache copy.
//
// The server holds no state per file. A FUSE node number is the nid of the inode in the image plus a
// constant, so there is nothing to remember or forget, and stat(2) shows the same inode numbers as an
// EROFS mount. Replies to reads go to the kernel straight from the mapped image, without buffer, copy
// or allocation.
//
// # Why not passthrough
//
// FUSE passthrough (Linux 6.9) lets the kernel read a backing file itself, without a second copy in
// the page cache. It maps a file to a whole backing file, offset 0 to offset 0. All files of an image
// or pool lie in one big file at some offset, which passthrough cannot express.
//
// # How fast
//
// Compared on Linux 6.18 with EROFS on a loop device over the same image (BenchmarkXxxWarm and
// BenchmarkXxxCold in package mount, processor time with everything cached): cached random reads cost
// the same (1.0). find -ls of 50,000 files takes 1.2 to 1.9 times as long on a fresh mount, and
// equally long on the second pass. Cached sequential reads and page faults run at 0.25 to 0.33 of
// EROFS, as they do on tmpfs: EROFS keeps files in large folios (/proc/kpageflags: 3,456 of the 4,096
// pages of a file), FUSE in single pages (0 of 4,096), and no request of a server changes that. EROFS
// that has to cache single pages is no faster than FUSE:
// docs/decisions/0008-fuse-caches-single-pages.md.
//
// # The server is a process of its own
//
// Driver starts the server in a session of its own, and the server ends when its file system is
// unmounted. Stopping or upgrading the daemon must not stop it: containers would lose their root.
// Under systemd that takes KillMode=process in the daemon's unit, else systemd kills the whole control
// group. In a Kubernetes pod the server always ends with its container, so a DaemonSet should use
// EROFS. A server that dies leaves a mount on which everything fails with ENOTCONN ("transport
// endpoint is not connected"). mount.Table notices that and mounts the pool anew for later containers;
// running ones keep the dead mount and must be restarted.
//
// Never read from a mount in the process that serves it: a page fault blocks the serving threads.
package fusefs
