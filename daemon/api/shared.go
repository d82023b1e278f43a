package api

import (
	"github.com/opencontainers/go-digest"

	"github.com/daxfs/daxfs-snapshotter/store/shared"
)

// AttachRequest is the body of requests to /v1/attach.
type AttachRequest struct {
	Namespace string `json:"namespace"`
	// Names are names of OCI images; All stands for all names that there are.
	Names []string `json:"names,omitempty"`
	All   bool     `json:"all,omitempty"`
}

// Attached is an OCI image that was attached or detached. Requests to /v1/attach return a list of them.
type Attached struct {
	Name   string        `json:"name"`
	Target digest.Digest `json:"target"`
	Chain  digest.Digest `json:"chain,omitempty"`
	Pool   string        `json:"pool,omitempty"`
	// Bytes is the number of bytes written to containerd's content store.
	Bytes int64 `json:"bytes"`
}

// SharedAnswer is the answer of /v1/shared.
type SharedAnswer struct {
	Pools  []shared.Status `json:"pools"`
	Images []SharedImage   `json:"images"`
}

// SharedImage is an OCI image in a pool of another owner.
type SharedImage struct {
	Name      string        `json:"name"`
	Namespace string        `json:"namespace"` // the namespace in the owner's containerd
	Target    digest.Digest `json:"target"`
	Chain     digest.Digest `json:"chain"`
	Pool      string        `json:"pool"`
}
