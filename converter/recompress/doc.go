// Package recompress writes OCI images anew whose layers are zstd:chunked: to a layout, an archive or a registry.
//
//	to, err := recompress.ParseDestination("docker://registry.example.com/web:v2", recompress.Config{})
//	...
//	defer to.Close()
//	res, err := recompress.Convert(ctx, src, to, recompress.Options{})
//
// Layers stay layers and have the same diff IDs, and configurations stay as they are byte by byte: the image is the same
// for whoever runs it. Manifests and indexes get other digests. What cannot be zstd:chunked, and what is it already,
// stays as it is.
//
// The destination names the image in the last step. Until then, and when anything fails, the name leads to what it led
// to before.
package recompress
