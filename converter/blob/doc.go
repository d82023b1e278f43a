// Package blob reads one layer blob once: it hashes the bytes as they are stored, decompresses them, hashes the
// result, and hands the uncompressed tar to whoever parses it.
//
//	r, err := blob.NewReader(ctx, rc, blob.Spec{MediaType: desc.MediaType, Digest: desc.Digest, Size: desc.Size, DiffID: id})
//	if err != nil {
//		return err
//	}
//	defer r.Close()
//	l, err := layer.FromTar(ctx, r, store, limits)
//	if err := r.Finish(err); err != nil { // drains, then verifies size, digest and diff ID
//		return err
//	}
//
// Nothing that was parsed may be used before Finish has returned nil: hashes are only known at the end of the blob.
//
// Reading, hashing, decompressing and the parser run in goroutines of their own, which pass buffers of 256 KiB by
// reference. A Reader holds at most about 5 MiB beside the window of the decompressor (32 KiB for gzip, at most
// 128 MiB for zstd), whatever the size of the blob.
package blob
