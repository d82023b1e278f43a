package chunked

import (
	"errors"
	"fmt"
	"path"
	"slices"
	"strings"

	"github.com/daxfs/daxfs-snapshotter/converter/layer"
)

// names are the paths of a tar, each with whether it is a directory. They have to be such that files that are put in
// place one by one, in any order, give what the tar gives.
type names map[string]bool

// add takes an entry.
func (n names) add(e *Entry) error {
	p := path.Clean("/" + e.Name)
	switch {
	case slices.Contains(strings.Split(e.Name, "/"), ".."):
		return errors.New(`".." in a name`)
	case e.Type == TypeReg && strings.HasSuffix(e.Name, "/"):
		return errors.New(`a file with "/" at the end of its name`)
	case e.Size > 0 && layer.IsWhiteout(path.Base(p)): // readers put no file in its place
		return errors.New("a whiteout with contents")
	}
	if _, ok := n[p]; ok {
		return errors.New("there is more than one of this name")
	}
	n[p] = e.Type == TypeDir
	return nil
}

// complete reports whether all paths lead through directories of the tar. A directory that it does not have would be
// made without permissions by containers/storage.
func (n names) complete() error {
	missing := ""
	for p := range n {
		if dir := path.Dir(p); dir != "/" && !n[dir] && (missing == "" || dir < missing) {
			missing = dir
		}
	}
	if missing != "" {
		return fmt.Errorf("it has files in %.200q, and no entry for this directory", missing[1:])
	}
	return nil
}
