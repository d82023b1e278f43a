package chunked

import (
	"errors"
	"fmt"
	"path"
	"slices"
	"strings"

	"github.com/daxfs/daxfs-snapshotter/converter/layer"
)

// names maps the paths of a tar to whether they are directories. Readers may place the files one by
// one and in any order, so each path must lead through directories that precede it in the tar.
type names map[string]bool

// add checks and adds an entry.
func (n names) add(e *Entry) error {
	p := path.Clean("/" + e.Name)
	switch {
	case slices.Contains(strings.Split(e.Name, "/"), ".."):
		return errors.New(`".." in a name`)
	case e.Type == TypeReg && strings.HasSuffix(e.Name, "/"):
		return errors.New(`a file with "/" at the end of its name`)
	case e.Size > 0 && layer.IsWhiteout(path.Base(p)): // readers do not place a file for it
		return errors.New("a whiteout with contents")
	}
	if _, ok := n[p]; ok {
		return errors.New("the name occurs more than once")
	}
	// containers/storage creates a missing directory without permissions, and may fail if the entry
	// for it comes later, because several workers place files.
	if dir := path.Dir(p); dir != "/" && !n[dir] {
		return fmt.Errorf("no entry for the directory %.200q precedes it", dir[1:])
	}
	n[p] = e.Type == TypeDir
	return nil
}
