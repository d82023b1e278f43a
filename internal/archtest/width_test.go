package archtest

import (
	"bufio"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"unicode/utf8"
)

// Limits of a line of Go. A tab counts as four columns.
const (
	maxColumns = 120
	tabColumns = 4
)

// Lines of Go fit beside each other on a screen.
func TestLineWidth(t *testing.T) {
	err := filepath.WalkDir("../..", func(path string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() || filepath.Ext(path) != ".go" {
			return err
		}
		f, err := os.Open(path)
		if err != nil {
			return err
		}
		defer f.Close()
		lines := bufio.NewScanner(f)
		lines.Buffer(nil, 1<<20)
		for n := 1; lines.Scan(); n++ {
			columns := utf8.RuneCountInString(lines.Text()) + (tabColumns-1)*strings.Count(lines.Text(), "\t")
			if columns > maxColumns {
				t.Errorf("%s:%d has %d columns, expected at most %d", path, n, columns, maxColumns)
			}
		}
		return lines.Err()
	})
	if err != nil {
		t.Fatal(err)
	}
}
