package daemon

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// The daemon can listen on the longest address that the configuration allows.
func TestLongSocket(t *testing.T) {
	dir, err := os.MkdirTemp("", "s")
	must(t, err)
	defer os.RemoveAll(dir)
	path := filepath.Join(dir, strings.Repeat("x", 107-len(dir)-1))
	l, err := listen(path)
	must(t, err)
	defer l.Close()
	if st, err := os.Stat(path); err != nil || st.Mode() != 0o600|os.ModeSocket {
		t.Error(fmt.Sprint(st, err))
	}
}
