package config

import "embed"

//go:embed containerd/v3.toml containerd/v4.toml
var snippets embed.FS

// ContainerdSnippet returns what has to be added to containerd's configuration so that it finds the snapshotter and the
// differ at the default address, for containerd of version 2.minor: the newest version of configuration file that it reads.
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
