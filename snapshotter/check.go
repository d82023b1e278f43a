package snapshotter

import (
	"context"
	"fmt"
	"os"

	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/core/snapshots/storage"
	bolt "go.etcd.io/bbolt"
)

// Facts are the contents of the records, for callers that compare them with their own state.
type Facts struct {
	// Uses tells what is needed.
	Uses Uses
	// Images maps the key of each committed snapshot's image to its layers, bottom first.
	Images map[string][]Layer
}

// Check compares metadata, records and directories, and passes each contradiction to report. It is
// exact when no other operation is under way and Cleanup was called before.
func (s *Snapshotter) Check(ctx context.Context, report func(msg string)) (Facts, error) {
	facts := Facts{Images: map[string][]Layer{}}
	u, err := s.uses(ctx)
	if err != nil {
		return facts, err
	}
	facts.Uses = u
	err = s.st.update(ctx, func(ctx context.Context, tx *bolt.Tx) error { // no snapshot is created meanwhile
		ids, err := storage.IDMap(ctx)
		if err != nil {
			return err
		}
		for _, id := range recordIDs(tx) {
			if ids[id] == "" {
				report(fmt.Sprintf("record of snapshot %s, which does not exist", id))
			}
		}
		strays, err := s.strayDirs(tx, ids)
		if err != nil {
			return err
		}
		for _, id := range strays {
			report(fmt.Sprintf("directory %q belongs to no snapshot", s.dir(id)))
		}
		return storage.WalkInfo(ctx, func(ctx context.Context, info snapshots.Info) error {
			return s.checkOne(ctx, tx, info, facts, report)
		})
	})
	return facts, err
}

func (s *Snapshotter) checkOne(ctx context.Context, tx *bolt.Tx, info snapshots.Info, facts Facts,
	report func(string),
) error {
	bad := func(format string, args ...any) {
		report(fmt.Sprintf("snapshot %q: ", info.Name) + fmt.Sprintf(format, args...))
	}
	id, _, _, err := storage.GetInfo(ctx, info.Name)
	if err != nil {
		return err
	}
	rec, err := getRecord(tx, id)
	if err != nil {
		return err
	}
	links, err := chain(ctx, tx, info.Name)
	if err != nil {
		bad("%v", err)
		return nil
	}
	st, err := os.Stat(s.upper(id))
	switch needed := info.Kind != snapshots.KindCommitted || rec.hasDir(); {
	case needed && (err != nil || !st.IsDir()):
		bad("upper directory: %v", err)
	case !needed && rec.Claim == nil && err == nil:
		bad("its directory %q is not needed and still there", s.upper(id))
	}
	if info.Kind == snapshots.KindCommitted {
		if want := s.imageKey(s.st, links); rec.Image != want {
			bad("its image is on record as %q, expected %q", rec.Image, want)
		}
		if rec.Shared != "" {
			return nil
		}
		if !rec.Dir && len(rec.Streamed) == 0 {
			bad("it has neither a directory nor a streamed layer")
		}
		if rec.Image != "" {
			facts.Images[rec.Image] = s.layers(links)
		}
		return nil
	}
	low := rec.Lower
	if low == nil {
		bad("there is no record of what it stands on")
		return nil
	}
	parents := links[1:]
	for i, id := range low.Dirs {
		if i >= len(parents) || parents[i].id != id {
			bad("directory %d below it is that of snapshot %s, which is not its parent", i, id)
			return nil
		}
	}
	rest := parents[len(low.Dirs):]
	switch {
	case low.Image != "":
		if len(rest) == 0 || rest[0].rec.Image != low.Image {
			bad("it stands on image %q, which is not its parents'", low.Image)
		}
	case len(rest) > 0 && !low.Blind:
		bad("%d of its parents are missing below it", len(rest))
	}
	return nil
}
