// Package chunked is the format zstd:chunked, as containers/storage (podman) writes and reads it: a layer that any zstd
// decoder turns into its tar, and that says which files it is made of, so that a client can fetch only those that it
// lacks.
//
// A blob is a sequence of zstd frames:
//
//	frames of data        the tar, cut so that each chunk of contents has frames of its own
//	skippable frame       table of contents (TOC), JSON, compressed with zstd
//	skippable frame       tar-split: all bytes of the tar that are not contents, compressed with zstd
//	skippable frame       Footer
//
// Annotations of the layer's descriptor say where the tables are and have the digest of the table of contents, which
// has that of tar-split. Contents in the order of tar-split give the tar, and its digest must be the diff ID.
package chunked
