// Package remote reads manifests and blobs from registries that speak the OCI distribution protocol,
// and from their mirrors, over unreliable networks.
//
//	repo, err := remote.New("registry.example.com/web:v1", remote.Config{HostDirs: remote.DefaultHostDirs()})
//	...
//	defer repo.Close()
//	m, err := repo.Manifest(ctx)
//	...
//	rc, err := repo.Open(ctx, layer)
//
// Containerd's packages read hosts.toml, set up TLS and fetch tokens. This package chooses the host,
// decides about retries, and resumes a blob after a lost connection.
//
// # Retries
//
// Requests for manifests, blobs, byte ranges and tokens are repeated after status 408, 429, 500, 502,
// 503 or 504, a lost connection or a time-out. The waits grow from half a second to 16 seconds, half
// of each at random; Retry-After lengthens them. A request fails after 6 attempts, or if its waits
// would exceed 2 minutes in total: a registry that says "come again in an hour" fails at once. A wait
// for one host does not delay a request to the next one. Nothing else is repeated: a bad certificate,
// a name without an address, any other status. A 401 starts the token flow once.
//
// A started blob is resumed where it stopped. The limits are reset when at least 64 KiB came since the
// last loss. A connection without a byte for a minute is lost.
//
// Manifests are verified, because their digest decides whether the next host is tried. The reader of a
// blob verifies it.
package remote
