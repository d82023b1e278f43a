// Package remote reads manifests and blobs from registries that speak the OCI distribution protocol, and from their
// mirrors, over networks that fail.
//
//	repo, err := remote.New("registry.example.com/web:v1", remote.Config{HostDirs: remote.DefaultHostDirs()})
//	...
//	defer repo.Close()
//	m, err := repo.Manifest(ctx)
//	...
//	rc, err := repo.Open(ctx, layer)
//
// Containerd's packages read hosts.toml, set up TLS and fetch tokens. This package decides which host is asked, when it
// is asked again, and how a blob goes on when a connection ends.
//
// # Retries
//
// An answer with status 408, 429, 500, 502, 503 or 504, a lost connection and a time-out are asked for again, for
// manifests, blobs, byte ranges and tokens alike. The waits grow from half a second to 16 seconds, half of each at
// random; Retry-After lengthens them. A request is given up after 6 attempts, or when its waits would add up to more
// than 2 minutes: a registry that says "come again in an hour" fails at once. Whoever is asked to wait by one host is
// not kept from asking the next one. Nothing else is retried: a certificate that does not fit, a name without an
// address, any other status. A 401 leads to the token flow once.
//
// A blob that has started goes on where it stopped. The limits count anew when at least 64 KiB came since the last
// loss. A connection that brings nothing for a minute is lost.
//
// What arrives is not verified here, except manifests: their digest decides whether the next host is asked. Whoever
// reads a blob verifies it.
package remote
