// Package layer turns one layer of an OCI image into a list of changes, and puts the contents of its files into a
// [Store] on the way.
//
// A layer arrives in one of three forms: as a blob ([FromBlob] verifies and unpacks it, [FromTar] parses the tar in it), as
// a directory ([FromDir]: the upper directory of an overlay mount, or a plain root directory), or as the tree of an image
// ([FromImage]). All become the same thing, a [Layer]: attributes, names, and references to contents that are already
// stored. A Layer is small (some 50 bytes per entry), can be kept as bytes (MarshalBinary), and is what package tree merges:
//
//	blob, err := layer.FromBlob(ctx, blobReader, spec, store, layer.Limits{})
//	root, err := tree.Merge([]*layer.Layer{base, blob.Layer})
//
// This package is the only one that knows how a layer spells a deletion: the ".wh." names of the image
// specification, and the character devices and extended attributes of overlayfs. Whoever reads a Layer sees
// OpRemove and OpOpaque.
//
// # Nothing is resolved here
//
// A layer does not know what lies below it. An entry "a/b" lands in "c" if a lower layer made "a" a link to "c".
// Therefore paths stay as the layer wrote them (clean and relative to the root) and the order of entries is kept,
// duplicates included; tree.Merge replays them.
//
// # Hostile input
//
// Layers come from the network. Every count and length is held against [Limits] before memory is spent on it; what is
// refused is refused with an [*EntryError] that names the entry. FromDir reads through directory descriptors, follows
// no symbolic link, and opens nothing but directories and regular files.
package layer
