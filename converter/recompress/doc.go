// Package recompress rewrites OCI images with zstd:chunked layers, to a layout, an archive or a registry.
//
//	to, err := recompress.ParseDestination("docker://registry.example.com/web:v2", recompress.Config{})
//	...
//	defer to.Close()
//	res, err := recompress.Convert(ctx, src, to, recompress.Options{})
//
// Layers keep their boundaries and diff IDs, and configurations are unchanged byte by byte: the image
// behaves the same. Manifests and indexes get new digests. Layers that cannot be or already are
// zstd:chunked are copied unchanged.
//
// The destination gets its name in the last step. Until then, and after a failure, the name keeps its
// old meaning.
package recompress
