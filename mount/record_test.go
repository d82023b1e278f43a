package mount_test

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/daxfs/daxfs-snapshotter/mount"
	"github.com/daxfs/daxfs-snapshotter/mount/internal/mounttest"
)

// A record that cannot be read, of a later version for instance, does not keep its image from being mounted.
func TestTableUnreadableRecord(t *testing.T) {
	mounttest.Root(t)
	for name, spoil := range map[string]func(string) string{
		"later version": func(s string) string { return strings.Replace(s, `"version":1`, `"version":2`, 1) },
		"cut":           func(s string) string { return s[:len(s)/2] },
		"empty":         func(string) string { return "" },
	} {
		t.Run(name, func(t *testing.T) {
			root, src := t.TempDir(), image(t, "a", "one")
			m, err := open(t, root, mount.Options{}).Mount(t.Context(), src, "h")
			if err != nil {
				t.Fatal(err)
			}
			rec := filepath.Join(filepath.Dir(m.Dir), "image.json")
			b, err := os.ReadFile(rec)
			if err != nil {
				t.Fatal(err)
			}
			if err := os.WriteFile(rec, []byte(spoil(string(b))), 0o600); err != nil {
				t.Fatal(err)
			}
			var w warnings
			second := open(t, root, mount.Options{Warn: w.add})
			if len(second.List()) != 0 || len(w.text) != 1 {
				t.Errorf("adopted %+v, warnings %q", second.List(), w.text)
			}
			m, err = second.Mount(t.Context(), src, "h")
			if err != nil {
				t.Fatal(err)
			}
			if got := read(t, m.Dir); got != "one" {
				t.Errorf("read %q", got)
			}
		})
	}
}
