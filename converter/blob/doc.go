// Package blob reads a layer blob once: it hashes the stored bytes, decompresses them, hashes the
// result, and passes the uncompressed tar to a parser.
//
//	spec := blob.Spec{MediaType: desc.MediaType, Digest: desc.Digest, Size: desc.Size, DiffID: id}
//	r, err := blob.NewReader(ctx, rc, spec)
//	if err != nil {
//		return err
//	}
//	defer r.Close()
//	l, err := layer.FromTar(ctx, r, store, limits)
//	if err := r.Finish(err); err != nil { // drains, then verifies size, digest and diff ID
//		return err
//	}
//
// Parsed data must not be used before Finish has returned nil: the hashes are complete only at the end
// of the blob.
//
// Reading, hashing, decompressing and parsing run in separate goroutines, which pass buffers of
// 256 KiB by reference. A Reader holds at most about 5 MiB beside the decompressor's window (32 KiB
// for gzip, at most 128 MiB for zstd), whatever the size of the blob.
package blob
