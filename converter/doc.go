// Package converter makes a dual image file out of an OCI image, a directory, or another image file.
//
//	src, err := source.Parse("docker://debian:12", source.Config{})
//	if err != nil {
//		return err
//	}
//	defer src.Close()
//	res, err := converter.Convert(ctx, src, "debian.daxfs", converter.Options{})
//
// # Flow
//
// Layers are read concurrently, each in one pass: read, hash, decompress, hash, parse (layer.FromBlob,
// which a host's image store uses as well). The contents of files go to one ordered placer
// (internal/sink), which writes every distinct content once. Verified layers are merged into one tree
// (package tree) while others are read. Then contents without a file are dropped, and the metadata is
// planned and written behind the contents (package daxfs).
//
// # Guarantees
//
// Equal layers give equal bytes, independent of date, concurrency, memory limit, source and compression.
//
// The output appears complete or not at all: it is written to an unnamed file, which gets its name at
// the end. An existing file is replaced in one step.
//
// Memory is bounded by Options.Memory for contents, at least 32 MiB (always 32 MiB for layers that are
// local files), plus about 16 MiB for each layer being read, at least four: half for contents not yet
// hashed, half for data between the stages of reading (more for zstd layers with a large window). An
// entry takes about 1 KiB, up to Options.MaxEntries; long names, link targets and xattrs, at most
// 1 GiB in all layers, take a few times their size.
package converter
