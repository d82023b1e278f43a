// Compress writes a layer as podman, buildah and skopeo do, from a tar on standard input to a file. It
// prints the annotations of the layer as JSON.
package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"

	"go.podman.io/storage/pkg/chunked/compressor"
)

func main() {
	if err := run(os.Args[1]); err != nil {
		fmt.Fprintln(os.Stderr, "compress:", err)
		os.Exit(1)
	}
}

func run(name string) error {
	f, err := os.Create(name)
	if err != nil {
		return err
	}
	annotations := map[string]string{}
	z, err := compressor.ZstdCompressor(f, annotations, nil)
	if err != nil {
		return err
	}
	_, err = io.Copy(z, os.Stdin)
	if err := errors.Join(err, z.Close(), f.Close()); err != nil {
		return err
	}
	return json.NewEncoder(os.Stdout).Encode(annotations)
}
