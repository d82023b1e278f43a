// Package tree merges the layers of an OCI image into one directory tree.
//
// [Merge] does in memory what containerd's archive.Apply does on disk when it applies one layer after another to one
// directory: the result has the same names, types, modes, owners, times, link targets, hard links, devices, extended
// attributes and contents. That includes its ways with what the image specification leaves open:
//
//   - Parents of an entry may be symbolic links of any layer; they are followed inside the root, however they are
//     spelled. The last element is never followed.
//   - A directory on a directory only changes attributes: extended attributes add up. Anything else is replaced.
//   - A hard link applies its own owner, mode and time to the inode it refers to.
//   - Times of directories are set when a layer is complete, by name.
//   - Files made in a directory with a default ACL inherit it; chmod(2) and chown(2) change ACLs and file capabilities.
//
// # Where it differs
//
//   - Opaque directories. Containerd's walk into one directory removes entries of the same layer if the layer has no
//     entry for their parents. The specification, and containerd with overlayfs, hide lower layers only; so does Merge.
//   - Time of a directory. Containerd leaves "now" where a later layer changes what is in a directory without having
//     an entry for the directory itself. Here the directory keeps the time that the last entry for it gave.
//   - A missing parent directory gets mode 0755, owner 0:0 (the group of the directory above, where that has the
//     set-group-ID bit) as with containerd, and the time 1970-01-01: nobody recorded one, and a conversion must give
//     the same bytes every day. The same holds for the root directory, whose "./" entry containerd ignores: 0755, 0:0, 1970.
//   - A symbolic link that leads to an absolute path is never looked up on the host.
//   - Names that begin with "/" or "..", below a symbolic link whose target has ".." behind another link. Containerd follows
//     "c" -> "b/../z" of "c/f" as the kernel does, and in "/c/f" takes ".." for the directory of the name "b". Here both
//     are what the kernel finds.
//
// Layers made from a directory (layer.FromDirectory) are simpler: they carry finished attributes, which replace those
// below, the root directory's included.
package tree
