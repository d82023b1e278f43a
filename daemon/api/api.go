// Package api has the requests and answers of the daemon's control API, for the daemon and for the command line that
// asks it. docs/control-api.md describes them. Within version 1 fields are added, never renamed or removed.
package api

import (
	"path/filepath"
	"time"

	"github.com/daxfs/daxfs-snapshotter/mount"
	"github.com/daxfs/daxfs-snapshotter/pool"
	"github.com/daxfs/daxfs-snapshotter/pool/region"
	"github.com/daxfs/daxfs-snapshotter/store"
	"github.com/daxfs/daxfs-snapshotter/store/shared"
)

// Socket is where a daemon with a gRPC address answers control requests.
func Socket(address string) string { return filepath.Join(filepath.Dir(address), "control.sock") }

// MountRequest is the body of requests to /v1/mounts, and an element of the answer.
type MountRequest struct {
	Image string `json:"image,omitempty"`
	Dir   string `json:"dir"`
	// Suid lets setuid programs and device nodes of the image work.
	Suid bool `json:"suid,omitempty"`
}

// PinRequest is the body of requests to /v1/pins. One of Source and Image is set to pin something.
type PinRequest struct {
	Name string `json:"name"`
	// Source is an image to be put into the pool.
	Source string `json:"source,omitempty"`
	// Image is an image that is in the pool.
	Image string `json:"image,omitempty"`
	// PlainHTTP lets docker:// sources talk to a registry without TLS.
	PlainHTTP bool `json:"plainHTTP,omitempty"`
	// HostDirs have the hosts.toml files for docker:// sources; none means those of the daemon (registries.hosts_dirs).
	HostDirs []string `json:"hostDirs,omitempty"`
	// Namespace is that of containerd: sources; empty means the default.
	Namespace string `json:"namespace,omitempty"`
	// OverlayUpper says that the directory of a rootfs: source is the upper directory of an overlay.
	OverlayUpper bool `json:"overlayUpper,omitempty"`
	// Platform chooses from a multi-platform image; empty means this machine's.
	Platform string `json:"platform,omitempty"`
}

// ReaderRequest is the body of DELETE /v1/readers.
type ReaderRequest struct {
	// Reader is the name of a reader, or its lease region.
	Reader string `json:"reader"`
	// Earlier ends only what the reader claimed before it booted the last time.
	Earlier bool `json:"earlier,omitempty"`
}

// Released is the answer of DELETE /v1/readers.
type Released struct {
	Claims int `json:"claims"` // how many ended
}

// Pool is the answer of /v1/pool.
type Pool struct {
	ID   string `json:"id"`
	Path string `json:"path"`
	Kind string `json:"kind"`
	// Region is the memory of the pool.
	Region region.Info `json:"region"`
	Usage  pool.Usage  `json:"usage"`
}

// Error is the answer to a request that failed.
type Error struct {
	Error string `json:"error"`
}

// Scrub is the answer of /v1/scrub.
type Scrub struct {
	pool.Scrubbed
	// Findings are the contents that are damaged, those that were found before included.
	Findings []pool.Finding `json:"findings"`
	// Lost says which images cannot be made again, and why; empty if all can.
	Lost string `json:"lost,omitempty"`
}

// Check is the answer of /v1/check.
type Check struct {
	Findings []pool.Finding `json:"findings"`
}

// Status is the answer of /v1/status.
type Status struct {
	Version string    `json:"version"`
	PID     int       `json:"pid"`
	Started time.Time `json:"started"`
	// Health says what is wrong; empty if nothing is.
	Health     string `json:"health,omitempty"`
	Root       string `json:"root"`
	Address    string `json:"address"`
	Containerd string `json:"containerd"`
	// Memory is what the daemon itself takes of the memory, in bytes.
	Memory int64 `json:"memory"`

	Pool Pool `json:"pool"`
	// Taken is what the pool takes of the disk or of the memory below it, in bytes; -1 if all of it is the pool's own.
	Taken int64 `json:"taken"`
	// Room is what can be stored.
	Room store.Room `json:"room"`
	// Free is the lesser of what the pool and the disk below it have free.
	Free int64 `json:"free"`
	// Saved is what the images' contents would take besides if each image had its own.
	Saved int64 `json:"saved"`

	// Drivers are the ones that may mount, in the order of preference: the picked one, and why others are not.
	Drivers []mount.Explanation `json:"drivers"`
	Mounted int                 `json:"mounted"` // images
	// Containers are the snapshots that stand on an image or on directories; Unshared of them do not stand on an image.
	Containers int `json:"containers"`
	Unshared   int `json:"unshared"`
	// Fallbacks by reason, Evictions by what was evicted, Failures by phase: since the daemon was started.
	Fallbacks map[string]int64 `json:"fallbacks"`
	Evictions map[string]int64 `json:"evictions"`
	Failures  map[string]int64 `json:"failures"`
	// Damaged is the number of contents that have changed and that somebody may still read.
	Damaged int `json:"damaged"`

	// Readers are others that read the pool of the daemon, Shared the pools of other owners that the daemon reads.
	Readers Readers         `json:"readers"`
	Shared  []shared.Status `json:"shared"`
}

// Readers says how the pool of a daemon is shared with others that read it.
type Readers struct {
	// Mode says what keeps images for them: none, leases or keep.
	Mode string `json:"mode"`
	// List has an element for each lease region.
	List []store.LeaseUser `json:"list"`
	// Error says which lease regions cannot be read. Nothing that a reader may use is freed meanwhile.
	Error string `json:"error,omitempty"`
}

// Image is an element of the answer of /v1/images.
type Image struct {
	store.Info
	Usage pool.ImageUsage `json:"usage"`
	// Driver is the one that the image is mounted with, and Dir where; empty if it is not mounted.
	Driver string `json:"driver,omitempty"`
	Dir    string `json:"dir,omitempty"`
	// Containers stand on the image: NAMESPACE/NAME.
	Containers []string `json:"containers"`
}

// Container is an element of the answer of /v1/containers: a snapshot that can be mounted. The name of a container in
// containerd is, as a rule, that of its snapshot.
type Container struct {
	Namespace string    `json:"namespace"`
	Name      string    `json:"name"`
	View      bool      `json:"view,omitempty"` // it is read-only
	Since     time.Time `json:"since"`
	// Shared says that everything below it is one shared image.
	Shared bool `json:"shared"`
	// Image is the key of the image that it stands on, and Names are those of the image; empty if it stands on none.
	Image string   `json:"image,omitempty"`
	Names []string `json:"names,omitempty"`
	// Driver is the one that the image is mounted with.
	Driver string `json:"driver,omitempty"`
	// Directories is the number of plain directories between it and the image.
	Directories int `json:"directories"`
	// Copy says that the image is a copy in a directory.
	Copy bool `json:"copy,omitempty"`
	// Why says why not everything is shared.
	Why string `json:"why,omitempty"`
}
