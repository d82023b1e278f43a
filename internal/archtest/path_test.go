package archtest

import (
	"os"
	"path/filepath"
	"regexp"
	"testing"
)

// TestPath checks that the files and functions named in docs/architecture.md exist.
func TestPath(t *testing.T) {
	root := filepath.Join("..", "..")
	text, err := os.ReadFile(filepath.Join(root, "docs", "architecture.md"))
	if err != nil {
		t.Fatal(err)
	}
	for _, m := range regexp.MustCompile("`([a-z/]+/[a-z_]+\\.go)`").FindAllStringSubmatch(string(text), -1) {
		if _, err := os.Stat(filepath.Join(root, m[1])); err != nil {
			t.Errorf("docs/architecture.md: %v", err)
		}
	}
	// "`F` in `file.go`", "`F` and `G` in `file.go`"
	pairs := regexp.MustCompile("((?:`[A-Za-z]+`(?:\\s+and\\s+)?)+)\\s+in\\s+`([a-z/]+/[a-z_]+\\.go)`")
	found := pairs.FindAllStringSubmatch(string(text), -1)
	if len(found) < 10 {
		t.Errorf("docs/architecture.md names %d functions with their files, expected 10 or more", len(found))
	}
	for _, m := range found {
		source, err := os.ReadFile(filepath.Join(root, m[2]))
		if err != nil {
			continue // reported above
		}
		for _, name := range regexp.MustCompile("`([A-Za-z]+)`").FindAllStringSubmatch(m[1], -1) {
			if !regexp.MustCompile(`(?m)^func (\([^)]*\) )?` + name[1] + `\(`).Match(source) {
				t.Errorf("docs/architecture.md: %s has no function %s", m[2], name[1])
			}
		}
	}
}
