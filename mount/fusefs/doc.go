// Package fusefs serves a pool, or the EROFS half of an image file, through FUSE: the way that works with any memory
// that can be mapped, on kernels without EROFS or loop devices.
//
// An image never changes, so the kernel is told to keep everything: names (those that do not exist too), attributes,
// link targets, listings and contents, without end. Only the root directory of a pool is different: images appear in
// it while it is served, so nothing is remembered of a name where there is none yet. And whether a pool has extended
// attributes is never known for good: the kernel asks for those of a pool each time. Open and opendir are answered
// with ENOSYS, after which the kernel stops asking. A second walk over a tree then never leaves the kernel, and N
// containers share one page-cache copy.
//
// The server holds no state per file. A FUSE node number is the nid of the inode in the image plus a constant, so
// there is nothing to remember, nothing to forget, and stat(2) shows the inode numbers that an EROFS mount shows.
// Replies to reads are written to the kernel straight from the mapped image: no buffer, no copy and no allocation in
// between.
//
// # Why not passthrough
//
// FUSE passthrough (Linux 6.9) lets the kernel read a backing file itself, without a second copy in the page cache.
// It maps a file to a whole backing file, offset 0 to offset 0. In an image and in a pool all files lie in one big
// file at some offset, which passthrough cannot express.
//
// # How fast
//
// Compared on Linux 6.18 with EROFS on a loop device over the same image (BenchmarkXxxWarm and BenchmarkXxxCold in
// package mount, processor time where all is cached): cached random reads cost the same (1.0), find -ls of 50,000
// files takes 1.2 to 1.9 times as long on a fresh mount and as long on the second pass. Cached sequential reads and
// page faults run at 0.25 to 0.33 of EROFS, as they do on tmpfs: EROFS keeps files in large folios (/proc/kpageflags:
// 3,456 of the 4,096 pages of a file), FUSE in single pages (0 of 4,096), and nothing that a server can ask for
// changes that. EROFS that has to cache single pages is no faster than FUSE:
// docs/decisions/0008-fuse-caches-single-pages.md.
//
// # The server is a process of its own
//
// Driver starts it, in a session of its own, and it ends when its file system is unmounted. Stopping or upgrading the
// daemon must not stop it: containers would lose their root. Under systemd that takes KillMode=process in the unit of
// the daemon, else systemd kills the whole control group; in a Kubernetes pod the server ends with its container,
// whatever that says, so a DaemonSet should use EROFS. A server that dies all the same leaves a mount on which
// everything fails with ENOTCONN ("transport endpoint is not connected"); mount.Table notices and mounts the pool
// anew for later containers, those that ran keep the dead mount and must be restarted.
//
// Never read from a mount in the process that serves it: a page fault there waits for the very threads that it stops.
package fusefs
