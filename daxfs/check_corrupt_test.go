package daxfs_test

import (
	"bytes"
	"maps"
	"slices"
	"strings"
	"testing"

	"github.com/daxfs/daxfs-snapshotter/daxfs"
)

// TestCheckCorrupt makes single corruptions: each must break its rule, and no rule that is not named beside it.
func TestCheckCorrupt(t *testing.T) {
	sound := patient(t)
	mustCheck(t, sound)
	mustAgree(t, sound)
	for _, c := range corruptions {
		t.Run(strings.ReplaceAll(c.name, " ", "-"), func(t *testing.T) {
			s := operate(t, bytes.Clone(sound))
			c.edit(s)
			b := s.close()
			got := map[daxfs.Rule]bool{}
			for _, f := range findings(t, b) {
				got[f.Rule] = true
			}
			allowed := strings.Fields(c.also)
			for _, r := range slices.Sorted(maps.Keys(got)) {
				if r != c.rule && !slices.Contains(allowed, string(r)) {
					t.Errorf("rule %s is broken, too", r)
				}
			}
			for _, r := range append(allowed, string(c.rule)) {
				if !got[daxfs.Rule(r)] {
					t.Errorf("rule %s is not broken; got %v", r, slices.Sorted(maps.Keys(got)))
				}
			}
			if t.Failed() {
				for _, f := range findings(t, b) {
					t.Log(f)
				}
			}
		})
	}
}
