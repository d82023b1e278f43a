// Package tree merges the layers of an OCI image into one directory tree.
//
// [Merge] does in memory what containerd's archive.Apply does on disk when it applies layers one after
// another to a directory. The result has the same names, types, modes, owners, times, link targets,
// hard links, devices, extended attributes and contents. It follows containerd where the image
// specification leaves a choice:
//
//   - Parents of an entry may be symbolic links of any layer. They are followed inside the root, in any
//     spelling. The last element is never followed.
//   - A directory on a directory only changes attributes: extended attributes add up. Anything else is replaced.
//   - A hard link applies its own owner, mode and time to its inode.
//   - Times of directories are set by name when a layer is complete.
//   - Files in a directory with a default ACL inherit it; chmod(2) and chown(2) change ACLs and file capabilities.
//
// # Differences from containerd
//
//   - Opaque directories. Containerd's walk into one removes entries of the same layer if the layer has no
//     entry for their parents. The specification, containerd with overlayfs and Merge hide lower layers only.
//   - Time of a directory. Containerd leaves "now" where a later layer changes a directory's entries without
//     an entry for the directory. Merge keeps the time of the directory's last entry.
//   - A missing parent directory gets mode 0755 and owner 0:0 (the group of a set-group-ID directory above),
//     as with containerd, but the time 1970-01-01: no time is recorded, and equal layers must give equal bytes.
//     The root directory gets 0755, 0:0 and that time, because containerd ignores its "./" entry.
//   - A symbolic link to an absolute path is never looked up on the host.
//   - Names that start with "/" or "..", below a symbolic link whose target has ".." behind another link.
//     For "c" -> "b/../z", containerd resolves "c/f" like the kernel, but in "/c/f" applies ".." to the name "b".
//     Merge resolves both like the kernel.
//
// Layers from a directory (layer.FromDirectory) are simpler: their attributes are final and replace
// those below, including those of the root directory.
package tree
