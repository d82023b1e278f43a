package daxfs_test

import (
	"bytes"
	"errors"
	"maps"
	"slices"
	"strings"
	"testing"

	"github.com/daxfs/daxfs-snapshotter/daxfs"
)

// TestCheckCorrupt makes single corruptions: each must break exactly its rule and the rules listed with it.
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
			all := findings(t, b)
			for _, f := range all {
				got[f.Rule] = true
			}
			stopEverywhere(t, b, all)
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
				for _, f := range all {
					t.Log(f)
				}
			}
		})
	}
}

// stopEverywhere ends the check after each finding: no other may follow, and the findings are always the same.
func stopEverywhere(t *testing.T, b []byte, all []daxfs.Finding) {
	t.Helper()
	for limit := range min(len(all), 20) {
		n := 0
		err := daxfs.Check(bytes.NewReader(b), int64(len(b)), func(f daxfs.Finding) bool {
			if f != all[n] {
				t.Errorf("got finding %v, was %v", f, all[n])
			}
			n++
			return n <= limit
		})
		if n != limit+1 {
			t.Errorf("got %d findings, wanted no more than %d", n, limit+1)
		}
		var f *daxfs.FormatError
		if !errors.As(err, &f) || f.Rule != all[0].Rule || f.Ino != all[0].Ino || f.Off != all[0].Off {
			t.Errorf("got error %v, want the first finding %v", err, all[0])
		}
	}
}
