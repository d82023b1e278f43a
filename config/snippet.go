package config

import "embed"

//go:embed containerd/v3.toml containerd/v4.toml
var snippets embed.FS

// ContainerdSnippet returns the lines that make containerd 2.minor find the snapshotter and the differ
// at the default address. They are for the newest configuration version that this containerd reads.
func ContainerdSnippet(minor int) string {
	name := "containerd/v3.toml"
	if minor >= 4 {
		name = "containerd/v4.toml"
	}
	b, err := snippets.ReadFile(name)
	if err != nil {
		panic(err) // the file is part of the program
	}
	return string(b)
}
