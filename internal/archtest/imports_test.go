// Package archtest tests the import table of the project. It parses the sources itself instead of
// asking the go command, so its result never comes from a stale test cache.
package archtest

import (
	"go/parser"
	"go/token"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
)

const module = "github.com/daxfs/daxfs-snapshotter"

// rule says what a directory, with all directories below it, must not import, and why. Test files are
// exempt: they may use other code to prove ours, such as containerd's applier.
type rule struct {
	dir    string
	except []string // directories below dir without the rule
	forbid []string // import path prefixes
	why    string
}

// above are the packages that wire the others together.
var above = []string{
	module + "/store", module + "/snapshotter", module + "/daemon", module + "/cmd",
	module + "/config",
}

var rules = []rule{
	{
		dir:    "daxfs",
		forbid: []string{"github.com/", "go.etcd.io/"},
		why:    "the image format is a library on the standard library and x/sys alone",
	},
	{
		dir: "converter",
		forbid: []string{
			module + "/pool", module + "/mount", module + "/store", module + "/snapshotter",
			module + "/daemon", module + "/cmd", module + "/config",
		},
		why: "a conversion knows layers and images, not where they are mounted",
	},
	{
		dir:    "converter/layer",
		forbid: []string{"github.com/containerd/containerd", module + "/converter/tree"},
		why:    "one layer is parsed without knowing containerd or other layers",
	},
	{
		dir:    "pool",
		forbid: append([]string{module + "/mount", module + "/converter"}, above...),
		why:    "the pool stores bytes; it does not mount and knows no OCI image",
	},
	{
		dir:    "mount",
		forbid: append([]string{module + "/converter"}, above...),
		why:    "a mount is of bytes in a region, whoever made them",
	},
	{
		dir:    "store",
		forbid: []string{module + "/snapshotter", module + "/daemon", module + "/cmd", module + "/config"},
		why:    "the store serves the daemon and the command line, and knows neither",
	},
	{
		dir: "snapshotter",
		forbid: []string{
			module + "/store", module + "/pool", module + "/mount", module + "/daemon", module + "/cmd",
			module + "/config",
		},
		why: "the snapshotter asks for lowers, whoever has them",
	},
	{
		dir:    "store",
		forbid: []string{module + "/snapshotter", module + "/daemon", module + "/cmd", module + "/config"},
		why:    "the store serves the daemon and the command line alike",
	},
	{
		dir: "snapshotter",
		forbid: []string{
			module + "/store", module + "/pool", module + "/mount", module + "/daxfs", module + "/converter",
			module + "/daemon",
			module + "/cmd", module + "/config",
		},
		why: "the snapshotter knows directories, mounts and the life of snapshots; it asks for lowers by an interface",
	},
	{
		dir:    "daemon",
		forbid: []string{module + "/cmd"},
		why:    "the daemon wires packages; what the programs share is in packages",
	},
	{
		dir:    ".",
		except: []string{"mount/fusefs"},
		forbid: []string{"github.com/hanwen/go-fuse"},
		why:    "only mount/fusefs speaks FUSE",
	},
	{
		dir:    ".",
		except: []string{"snapshotter", "daemon", "cmd/daxfs-snapshotter", "integration"},
		forbid: []string{
			"github.com/containerd/containerd/v2/core/snapshots",
			"github.com/containerd/containerd/v2/contrib/snapshotservice",
		},
		why: "containerd's snapshotter side stops at snapshotter/ and the daemon that serves it",
	},
}

func TestImports(t *testing.T) {
	root := filepath.Join("..", "..")
	seen := 0
	err := filepath.WalkDir(root, func(p string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		if d.IsDir() && strings.HasPrefix(d.Name(), ".") && len(d.Name()) > 2 {
			return fs.SkipDir
		}
		if d.IsDir() || !strings.HasSuffix(p, ".go") || strings.HasSuffix(p, "_test.go") {
			return nil
		}
		rel, err := filepath.Rel(root, p)
		if err != nil {
			return err
		}
		seen++
		f, err := parser.ParseFile(token.NewFileSet(), p, nil, parser.ImportsOnly)
		if err != nil {
			return err
		}
		dir := path.Dir(filepath.ToSlash(rel))
		for _, imp := range f.Imports {
			name, err := strconv.Unquote(imp.Path.Value)
			if err != nil {
				return err
			}
			checkImport(t, rel, dir, name)
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	if seen < 20 {
		t.Fatalf("parsed %d source files below %q; the walk does not see the project", seen, root)
	}
}

func checkImport(t *testing.T, file, dir, name string) {
	t.Helper()
	for _, r := range rules {
		if !below(dir, r.dir) || belowAny(dir, r.except) {
			continue
		}
		for _, bad := range r.forbid {
			// A package in the rule's own directory may import its siblings below it.
			if strings.HasPrefix(name, bad) && !strings.HasPrefix(name+"/", module+"/"+r.dir+"/") {
				t.Errorf("%s imports %s: %s", file, name, r.why)
			}
		}
	}
}

func below(dir, parent string) bool {
	return parent == "." || dir == parent || strings.HasPrefix(dir, parent+"/")
}

func belowAny(dir string, parents []string) bool {
	for _, p := range parents {
		if below(dir, p) {
			return true
		}
	}
	return false
}

// TestWhiteoutName keeps the string ".wh." in the package that knows how layers mark removed files.
func TestWhiteoutName(t *testing.T) {
	root := filepath.Join("..", "..")
	err := filepath.WalkDir(root, func(p string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() || !strings.HasSuffix(p, ".go") || strings.HasSuffix(p, "_test.go") {
			return err
		}
		rel, err := filepath.Rel(root, p)
		if err != nil || below(path.Dir(filepath.ToSlash(rel)), "converter/layer") ||
			strings.HasPrefix(rel, "internal/") ||
			strings.HasPrefix(rel, "integration/") {
			return err
		}
		b, err := os.ReadFile(p)
		if err != nil {
			return err
		}
		if strings.Contains(string(b), `".wh.`) {
			t.Errorf("%s knows the whiteout prefix: only converter/layer may", rel)
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
}
