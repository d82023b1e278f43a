package snapshotter_test

import (
	"fmt"
	"os"
	"path/filepath"
	"syscall"
	"testing"

	"github.com/daxfs/daxfs-snapshotter/snapshotter"
)

// The directories of a snapshot are made before it is prepared, if there was time; where they cannot
// be used, the snapshot makes its own.
func TestDirsAhead(t *testing.T) {
	e := newEnv(t, snapshotter.Options{})
	inode := func(dir string) uint64 {
		st, err := os.Stat(dir)
		e.must(err)
		return st.Sys().(*syscall.Stat_t).Ino
	}
	ahead := func() (dir string) {
		e.eventually(func() string {
			found, err := filepath.Glob(filepath.Join(e.root, "ahead", "*"))
			e.must(err)
			if len(found) != 1 {
				return fmt.Sprintf("made ahead are %q, expected one directory", found)
			}
			dir = found[0]
			return ""
		})
		return dir
	}
	prepared := func(key string) uint64 {
		upper := e.prepare(key, "")[0].Source
		if st, err := os.Stat(upper); err != nil || st.Mode().Perm() != 0o755 {
			t.Errorf("upper directory %q: %v, %v", upper, st, err)
		}
		return inode(filepath.Dir(upper))
	}
	prepared("a")
	made := inode(ahead())
	if used := prepared("b"); used != made {
		t.Errorf("the snapshot uses inode %d, made ahead was %d", used, made)
	}
	e.must(os.RemoveAll(ahead()))
	prepared("c")

	left := ahead()
	e.must(e.Close())
	if _, err := os.Stat(left); err == nil {
		t.Errorf("%q is left", left)
	}
	e.must(os.MkdirAll(filepath.Join(left, "of a killed process"), 0o700))
	e.open()
	if _, err := os.Stat(left); err == nil {
		t.Errorf("%q is left, which a killed process made", left)
	}
	prepared("d")
	ahead()
}
