package clientsuite

import (
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
)

// listFile is the path of the list, relative to the root of the tree.
const listFile = "docs/containerd-tests.md"

// list says which tests run.
type list struct {
	run      []string
	excluded []string // a test, or a part of one, with its name after a slash
}

var (
	runBlock = regexp.MustCompile("(?s)\n## What runs\n.*?\n```\n(.*?)```\n")
	row      = regexp.MustCompile("(?m)^\\| `(Test[^`]+)` \\| [^|]+ \\|$") // with a reason
)

func readList(t *testing.T) list {
	t.Helper()
	text, err := os.ReadFile(filepath.Join("..", "..", listFile))
	if err != nil {
		t.Fatal(err)
	}
	var l list
	if m := runBlock.FindSubmatch(text); m != nil {
		l.run = strings.Fields(string(m[1]))
	}
	for _, m := range row.FindAllSubmatch(text, -1) {
		l.excluded = append(l.excluded, string(m[1]))
	}
	if len(l.run) == 0 || len(l.excluded) == 0 {
		t.Fatalf("%s lists %d tests that run and %d that do not: the form must have changed", listFile, len(l.run),
			len(l.excluded))
	}
	return l
}

// without moves tests from run to excluded.
func (l list) without(names ...string) list {
	short := list{excluded: slices.Clone(l.excluded)}
	for _, name := range l.run {
		if slices.Contains(names, name) {
			short.excluded = append(short.excluded, name)
		} else {
			short.run = append(short.run, name)
		}
	}
	return short
}

// pattern returns the pattern of -test.skip for the excluded tests.
func (l list) pattern() string {
	var patterns []string
	for _, name := range l.excluded {
		var levels []string
		for _, level := range strings.Split(name, "/") {
			levels = append(levels, "^"+regexp.QuoteMeta(level)+"$")
		}
		patterns = append(patterns, strings.Join(levels, "/"))
	}
	return strings.Join(patterns, "|")
}
