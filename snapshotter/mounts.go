package snapshotter

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/plugins/snapshots/overlay/overlayutils"
	"github.com/containerd/errdefs"
	"github.com/containerd/log"

	"github.com/daxfs/daxfs-snapshotter/internal/overlay"
)

// overlayDefaults adds the options that this kernel needs to the configured overlay options.
func overlayDefaults(ctx context.Context, root string, configured []string) ([]string, error) {
	options := append([]string(nil), configured...)
	has := func(name string) bool {
		for _, o := range configured {
			if key, _, _ := strings.Cut(o, "="); key == name {
				return true
			}
		}
		return false
	}
	for _, o := range configured {
		switch key, _, _ := strings.Cut(o, "="); key {
		case "lowerdir", "lowerdir+", "datadir+", "upperdir", "workdir", "uidmap", "gidmap", "":
			return nil, fmt.Errorf("overlay mount option %q is not for the configuration to set", o)
		}
	}
	if !has("userxattr") {
		need, err := overlayutils.NeedsUserXAttr(root)
		if err != nil {
			log.G(ctx).WithError(err).Warnf("cannot tell whether overlayfs needs the option userxattr, assuming %v",
				need)
		}
		if need {
			options = append(options, "userxattr")
		}
	}
	if !has("xino") {
		// Without xino the files of the image have another device number than the directories above, so
		// programs that stay on one file system, such as du -x, skip them. Overlayfs ignores "auto" over FUSE,
		// which has no UUID, and would lose hard links there when files are copied up.
		options = append(options, "xino=on")
	}
	// index=on refuses to mount an upper directory twice, as nerdctl export, diff and cp do with a running
	// container. redirect_dir and metacopy leave files in an upper directory that depend on the lower, but
	// a committed upper directory has to be a layer by itself.
	for _, o := range []string{"index=off", "redirect_dir=nofollow", "metacopy=off"} {
		name, _, _ := strings.Cut(o, "=")
		value, err := os.ReadFile("/sys/module/overlay/parameters/" + name)
		if err != nil || has(name) {
			continue
		}
		if on := strings.TrimSpace(string(value)); name == "index" || on == "Y" || on == "on" {
			options = append(options, o)
		}
	}
	return options, nil
}

// tryOptions tests the configured overlay options in the kernel: a misspelt one would make every container fail.
func (s *Snapshotter) tryOptions() error {
	if len(s.opts.MountOptions) == 0 {
		return nil
	}
	// A cleanup removes this directory if the process crashes.
	dir, err := os.MkdirTemp(filepath.Join(s.root, "snapshots"), doomed+"trial-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	upper, work := filepath.Join(dir, "fs"), filepath.Join(dir, "work")
	if err := errors.Join(os.Mkdir(upper, 0o700), os.Mkdir(work, 0o700)); err != nil {
		return err
	}
	places := []string{"lowerdir=" + s.emptyDir(), "upperdir=" + upper, "workdir=" + work}
	if overlay.Try(places) != nil {
		return nil // no overlay can be mounted here, so the options may be right
	}
	if err := overlay.Try(append(places, s.opts.MountOptions...)); err != nil {
		return fmt.Errorf("the kernel refuses the configured overlay options %q: %w", s.opts.MountOptions, err)
	}
	return nil
}

// mountsOf returns the mounts of a snapshot on the chain links, after it made the image below available.
func (s *Snapshotter) mountsOf(ctx context.Context, id string, info snapshots.Info, rec record,
	links []link,
) ([]mount.Mount, error) {
	low := rec.Lower
	if low == nil {
		return nil, fmt.Errorf("snapshot %q has no record of what it stands on: %w", info.Name, errdefs.ErrDataLoss)
	}
	if len(rec.Streamed) > 0 {
		return nil, fmt.Errorf("snapshot %q holds a streamed layer and can be mounted only after it is committed: %w",
			info.Name, errdefs.ErrFailedPrecondition)
	}
	lowerdirs, err := s.lowerdirs(ctx, low, links)
	if err != nil {
		return nil, fmt.Errorf("snapshot %q: %w", info.Name, err)
	}
	return s.describe(id, info, low, lowerdirs), nil
}

// describe returns the mounts of a snapshot over lowerdirs.
func (s *Snapshotter) describe(id string, info snapshots.Info, low *lower, lowerdirs []string) []mount.Mount {
	var options []string
	if s.opts.RemapIDs {
		if m := info.Labels[snapshots.LabelSnapshotUIDMapping]; m != "" {
			options = append(options, "uidmap="+m)
		}
		if m := info.Labels[snapshots.LabelSnapshotGIDMapping]; m != "" {
			options = append(options, "gidmap="+m)
		}
	}
	bind := func(dir, mode string) []mount.Mount {
		return []mount.Mount{{Type: "bind", Source: dir, Options: append(options, mode, "rbind")}}
	}
	view := info.Kind == snapshots.KindView
	switch {
	case low.Blind:
		// Nobody mounts this. containerd's unpacker parses it and writes the layer to the upper directory in
		// overlay form. With a bind mount it would apply whiteouts by deleting, and so lose them.
		options = append(options, "upperdir="+s.upper(id))
		return []mount.Mount{{Type: "overlay", Source: "overlay", Options: options}}
	case len(lowerdirs) == 0 && view:
		return bind(s.upper(id), "ro")
	case len(lowerdirs) == 0:
		return bind(s.upper(id), "rw")
	}
	// Views have an upper directory too. A bind mount of the image would share locks and watches between
	// all users of the image, and nothing could tell when a removed view is no longer mounted.
	if view {
		options = append(options, "ro")
	}
	options = append(options, "workdir="+s.workdir(id), "upperdir="+s.upper(id),
		"lowerdir="+strings.Join(lowerdirs, ":"))
	options = append(options, s.overlayOptions...)
	return []mount.Mount{{Type: "overlay", Source: "overlay", Options: options}}
}
