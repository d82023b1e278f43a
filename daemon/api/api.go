// Package api defines the requests and answers of the daemon's control API, for the daemon and the
// command line. docs/control-api.md describes them. Version 1 may gain fields, but none is renamed or removed.
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

// Socket returns the path of the control socket of a daemon with a gRPC address.
func Socket(address string) string { return filepath.Join(filepath.Dir(address), "control.sock") }

// MountRequest is the body of requests to /v1/mounts, and an element of the answer.
type MountRequest struct {
	Image string `json:"image,omitempty"`
	Dir   string `json:"dir"`
	// Suid enables setuid programs and device nodes of the image.
	Suid bool `json:"suid,omitempty"`
}

// PinRequest is the body of requests to /v1/pins. To pin something, set either Source or Image.
type PinRequest struct {
	Name string `json:"name"`
	// Source is an image to put into the pool.
	Source string `json:"source,omitempty"`
	// Image is an image already in the pool.
	Image string `json:"image,omitempty"`
	// PlainHTTP makes docker:// sources talk to a registry without TLS.
	PlainHTTP bool `json:"plainHTTP,omitempty"`
	// HostDirs have hosts.toml files for docker:// sources; empty means registries.hosts_dirs.
	HostDirs []string `json:"hostDirs,omitempty"`
	// Namespace is the namespace of containerd: sources; empty means the default.
	Namespace string `json:"namespace,omitempty"`
	// OverlayUpper says that the directory of a rootfs: source is the upper directory of an overlay.
	OverlayUpper bool `json:"overlayUpper,omitempty"`
	// Platform selects from a multi-platform image; empty means this machine's platform.
	Platform string `json:"platform,omitempty"`
}

// ReaderRequest is the body of DELETE /v1/readers.
type ReaderRequest struct {
	// Reader is the name of a reader, or its lease region.
	Reader string `json:"reader"`
	// Earlier ends only the claims that the reader made before its last boot.
	Earlier bool `json:"earlier,omitempty"`
}

// Released is the answer of DELETE /v1/readers.
type Released struct {
	Claims int `json:"claims"` // the number of ended claims
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
	// Findings are the damaged contents, including those found before.
	Findings []pool.Finding `json:"findings"`
	// Lost names the images that cannot be rebuilt, and why; empty if all can.
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
	// Health describes the problem; empty if the daemon is healthy.
	Health     string `json:"health,omitempty"`
	Root       string `json:"root"`
	Address    string `json:"address"`
	Containerd string `json:"containerd"`
	// Memory is the memory of the daemon process, in bytes.
	Memory int64 `json:"memory"`

	Pool Pool `json:"pool"`
	// Taken is what the pool takes of the disk or memory below it, in bytes; -1 if all of that is the pool's own.
	Taken int64 `json:"taken"`
	// Room is the room for new contents and images.
	Room store.Room `json:"room"`
	// Free is the free space of the pool or of the disk below it, whichever is less.
	Free int64 `json:"free"`
	// Saved is the additional space that the contents would take if each image had its own copies.
	Saved int64 `json:"saved"`

	// Drivers are the usable drivers in order of preference: the picked one, and why the others were not.
	Drivers []mount.Explanation `json:"drivers"`
	Mounted int                 `json:"mounted"` // the number of images
	// Containers counts the snapshots on an image or on directories; Unshared those of them without an image.
	Containers int `json:"containers"`
	Unshared   int `json:"unshared"`
	// Fallbacks by reason, Evictions by kind and Failures by phase, since the start of the daemon.
	Fallbacks map[string]int64 `json:"fallbacks"`
	Evictions map[string]int64 `json:"evictions"`
	Failures  map[string]int64 `json:"failures"`
	// Damaged is the number of damaged contents that may still be read.
	Damaged int `json:"damaged"`

	// Readers are the readers of the daemon's pool; Shared are the pools of other owners that the daemon reads.
	Readers Readers         `json:"readers"`
	Shared  []shared.Status `json:"shared"`
}

// Readers describes how a daemon shares its pool with readers.
type Readers struct {
	// Mode is the configured way of keeping images for them: none, leases or keep.
	Mode string `json:"mode"`
	// List has an element for each lease region.
	List []store.LeaseUser `json:"list"`
	// Error names unreadable lease regions. Until it is empty nothing is freed that a reader may use.
	Error string `json:"error,omitempty"`
}

// Image is an element of the answer of /v1/images.
type Image struct {
	store.Info
	Usage pool.ImageUsage `json:"usage"`
	// Driver and Dir are the driver and the directory of the image's mount; empty if it is not mounted.
	Driver string `json:"driver,omitempty"`
	Dir    string `json:"dir,omitempty"`
	// Containers are the containers on the image: NAMESPACE/NAME.
	Containers []string `json:"containers"`
}

// Container is an element of the answer of /v1/containers: a snapshot that can be mounted. A container
// in containerd usually has the name of its snapshot.
type Container struct {
	Namespace string    `json:"namespace"`
	Name      string    `json:"name"`
	View      bool      `json:"view,omitempty"` // it is read-only
	Since     time.Time `json:"since"`
	// Shared says that everything below the container is one shared image.
	Shared bool `json:"shared"`
	// Image is the key of the image below, and Names are the names of that image; empty if there is none.
	Image string   `json:"image,omitempty"`
	Names []string `json:"names,omitempty"`
	// Driver is the driver of the image's mount.
	Driver string `json:"driver,omitempty"`
	// Directories is the number of plain directories above the image.
	Directories int `json:"directories"`
	// Copy says that the image is a copy in a directory.
	Copy bool `json:"copy,omitempty"`
	// Why explains why not everything is shared.
	Why string `json:"why,omitempty"`
}
