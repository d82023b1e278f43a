package snapshotter

import (
	"fmt"
	"os"
	"strconv"
	"strings"
	"syscall"

	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/errdefs"
)

// rootAttr holds the attributes of a snapshot's root directory: overlayfs shows those of the upper one.
type rootAttr struct {
	mode     os.FileMode
	uid, gid int
}

func (a rootAttr) apply(dir string) error {
	if err := os.Lchown(dir, a.uid, a.gid); err != nil {
		return err
	}
	return os.Chmod(dir, a.mode) // after Lchown, and regardless of the umask
}

// upperRoot returns the attributes that the root of a snapshot takes over from its lower, with the
// owner to which the labels map root.
func (s *Snapshotter) upperRoot(labels map[string]string, lowerdirs []string) (rootAttr, error) {
	root := rootAttr{mode: 0o755, uid: os.Geteuid(), gid: os.Getegid()}
	if len(lowerdirs) > 0 {
		st, err := os.Stat(lowerdirs[0])
		if err != nil {
			return root, err
		}
		sys := st.Sys().(*syscall.Stat_t)
		mode := st.Mode() & (os.ModePerm | os.ModeSetuid | os.ModeSetgid | os.ModeSticky)
		root = rootAttr{mode: mode, uid: int(sys.Uid), gid: int(sys.Gid)}
	}
	// With an idmapped lower, only the upper directory holds mapped ids on disk.
	for _, m := range []struct {
		label string
		id    *int
	}{{snapshots.LabelSnapshotUIDMapping, &root.uid}, {snapshots.LabelSnapshotGIDMapping, &root.gid}} {
		value := labels[m.label]
		if value == "" || !s.opts.RemapIDs {
			continue
		}
		id, err := mapRoot(value)
		if err != nil {
			return root, fmt.Errorf("label %q: %w: %w", m.label, err, errdefs.ErrInvalidArgument)
		}
		*m.id = id
	}
	return root, nil
}

// mapRoot returns the host id that a mapping "container:host:length[,...]" gives to id 0.
func mapRoot(mapping string) (int, error) {
	for _, entry := range strings.Split(mapping, ",") {
		var n [3]uint64
		fields := strings.Split(entry, ":")
		if len(fields) != 3 {
			return 0, fmt.Errorf("mapping %q: entry %q is not container:host:length", mapping, entry)
		}
		for i, f := range fields {
			v, err := strconv.ParseUint(f, 10, 32)
			if err != nil {
				return 0, fmt.Errorf("mapping %q: %w", mapping, err)
			}
			n[i] = v
		}
		if n[0] == 0 && n[2] > 0 {
			return int(n[1]), nil
		}
	}
	return 0, fmt.Errorf("mapping %q does not map id 0", mapping)
}
