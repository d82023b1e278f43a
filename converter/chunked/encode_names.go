package chunked

import (
	"errors"
	"fmt"
	"path"
	"slices"
	"strings"

	"github.com/daxfs/daxfs-snapshotter/converter/layer"
)

// names maps the paths of a tar to whether they are directories. The paths must allow placing files
// one by one, in any order, with the same result as the tar.
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
	n[p] = e.Type == TypeDir
	return nil
}

// complete returns an error unless all paths lead through directories of the tar. containers/storage
// would create a missing directory without permissions.
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
