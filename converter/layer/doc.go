// Package layer turns one layer of an OCI image into a list of changes. It puts the contents of files
// into a [Store].
//
// A layer has one of three forms: a blob ([FromBlob] verifies and unpacks it, [FromTar] parses its
// tar), a directory ([FromDir] for a plain root directory, [FromUpper] for the upper directory of an
// overlay mount), or the tree of an image ([FromImage]). All become a [Layer]: attributes, names, and
// references to stored contents. A Layer is small (about 50 bytes per entry), has a binary form
// (MarshalBinary), and is the input of package tree:
//
//	blob, err := layer.FromBlob(ctx, blobReader, spec, store, layer.Limits{})
//	root, err := tree.Merge([]*layer.Layer{base, blob.Layer})
//
// Only this package knows how a layer encodes a deletion: as the ".wh." names of the image specification, or
// as the character devices and extended attributes of overlayfs. A Layer has OpRemove and OpOpaque instead.
//
// # Paths are not resolved
//
// A layer does not know the layers below. An entry "a/b" lands in "c" if a lower layer made "a" a link
// to "c". Therefore paths stay as stored (clean and relative to the root), and entries keep their
// order and duplicates; tree.Merge replays them.
//
// # Hostile input
//
// Layers come from the network. Every count and length is checked against [Limits] before memory is
// spent on it. Errors are of type [*EntryError] and name the entry. FromDir reads through directory
// descriptors, follows no symbolic link, and opens only directories and regular files.
package layer
