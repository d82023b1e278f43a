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
// Layers are read concurrently, each in one pass: read, hash, decompress, hash, parse (layer.FromBlob, which the image store
// of a host uses as well). The contents of files go to one ordered placer (internal/sink), which writes every distinct
// content once. The changes of
// verified layers are merged into one tree (package tree) while others are read. Then contents that no file refers to any
// more are dropped, and the metadata is planned and written behind the contents (package daxfs).
//
// # What is promised
//
// The same layers give the same bytes: on another day, with another concurrency or memory limit, and from whatever
// source, compressed or not.
//
// The output appears complete or not at all: it is written to a file without a name and linked to its name at the
// end. A file that was there stays until it is replaced in one step.
//
// Memory is bounded by Options.Memory for contents, at least 32 MiB (always 32 MiB for layers that are files), plus
// about 16 MiB for each layer that is read at the same time, of which there are at least four: half of them for contents
// that are not hashed yet, half for what lies between the stages that read a layer (more for zstd layers with a large
// window). Entries take about 1 KiB each, of which Options.MaxEntries is the limit, and long names, link targets and
// xattrs, of which there may be 1 GiB in all layers, take a few times their bytes.
package converter
