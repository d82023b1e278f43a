package listing

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// The listing shows every kind of change.
func TestDiff(t *testing.T) {
	build := func() string {
		dir := t.TempDir()
		for name, text := range map[string]string{"a": "one", "b": "two", "new\nline": "x"} {
			if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o644); err != nil {
				t.Fatal(err)
			}
		}
		if err := os.Symlink("a", filepath.Join(dir, "link")); err != nil {
			t.Fatal(err)
		}
		for _, name := range []string{"a", "b", "new\nline", "."} {
			if err := os.Chtimes(filepath.Join(dir, name), time.Unix(5, 0), time.Unix(5, 0)); err != nil {
				t.Fatal(err)
			}
		}
		return dir
	}
	tree := func(dir string) []string {
		t.Helper()
		lines, err := Tree(dir, Options{})
		if err != nil {
			t.Fatal(err)
		}
		// Symbolic links have the current time.
		for i, l := range lines {
			if before, rest, ok := strings.Cut(l, " mtime="); ok && strings.HasPrefix(l, `"link"`) {
				_, rest, _ = strings.Cut(rest, " ")
				lines[i] = before + " " + rest
			}
		}
		return lines
	}
	want := tree(build())
	if len(want) != 5 {
		t.Fatalf("%d entries: %q", len(want), want)
	}
	if err := Diff(want, tree(build())); err != nil {
		t.Errorf("equal trees: %v", err)
	}
	for name, change := range map[string]func(dir string) error{
		"contents": func(d string) error {
			return os.WriteFile(d+"/a", []byte("eno"), 0o644)
		},
		"mode":     func(d string) error { return os.Chmod(d+"/a", 0o600) },
		"time":     func(d string) error { return os.Chtimes(d+"/a", time.Unix(6, 0), time.Unix(6, 0)) },
		"removed":  func(d string) error { return os.Remove(d + "/a") },
		"added":    func(d string) error { return os.Mkdir(d+"/c", 0o755) },
		"linked":   func(d string) error { os.Remove(d + "/b"); return os.Link(d+"/a", d+"/b") },
		"retarget": func(d string) error { os.Remove(d + "/link"); return os.Symlink("b", d+"/link") },
	} {
		dir := build()
		if err := change(dir); err != nil {
			t.Fatal(err)
		}
		if name != "time" {
			os.Chtimes(dir, time.Unix(5, 0), time.Unix(5, 0))
			os.Chtimes(dir+"/a", time.Unix(5, 0), time.Unix(5, 0))
		}
		if err := Diff(want, tree(dir)); err == nil {
			t.Errorf("%s: not seen", name)
		}
	}
}
