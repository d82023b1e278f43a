package fusefs

import (
	"encoding/json"
	"sync/atomic"
)

// Counters count the requests that reached user space, to prove that few do.
type Counters struct {
	Lookup, GetAttr, Readlink, Open, Read, ReadBytes, OpenDir, ReadDir, GetXattr, ListXattr, StatFS atomic.Uint64
}

// Snapshot returns the values by name.
func (c *Counters) Snapshot() map[string]uint64 {
	return map[string]uint64{
		"lookup": c.Lookup.Load(), "getattr": c.GetAttr.Load(), "readlink": c.Readlink.Load(), "open": c.Open.Load(),
		"read": c.Read.Load(), "read_bytes": c.ReadBytes.Load(), "opendir": c.OpenDir.Load(),
		"readdir":  c.ReadDir.Load(),
		"getxattr": c.GetXattr.Load(), "listxattr": c.ListXattr.Load(), "statfs": c.StatFS.Load(),
	}
}

// String returns the values as one line of JSON.
func (c *Counters) String() string {
	b, err := json.Marshal(c.Snapshot())
	if err != nil {
		return err.Error()
	}
	return string(b)
}
