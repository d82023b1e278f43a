// Package chunked implements the format zstd:chunked of containers/storage (podman): a layer that any zstd
// decoder turns into its tar, and that lists its files, so that a client can fetch only those it lacks.
//
// A blob is a sequence of zstd frames:
//
//	frames of data        the tar, cut so that each chunk of contents has frames of its own
//	skippable frame       table of contents (TOC), JSON, compressed with zstd
//	skippable frame       tar-split: all bytes of the tar that are not contents, compressed with zstd
//	skippable frame       Footer
//
// Annotations of the layer's descriptor hold the places of the tables and the digest of the table of
// contents, which contains the digest of tar-split. Contents in the order of tar-split produce the
// tar, whose digest must be the diff ID.
package chunked
