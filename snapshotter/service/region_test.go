package service

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/daxfs/daxfs-snapshotter/config"
)

// Errors of opening a pool say what to do.
func TestPoolAdvice(t *testing.T) {
	for name, tc := range map[string]struct {
		change func(t *testing.T, c *config.Config)
		want   []string
	}{
		"another size": {
			func(_ *testing.T, c *config.Config) { c.Pool.Size = 64 << 20 },
			[]string{"has 33554432 bytes, configured are 67108864", "set pool.size back"},
		},
		"no index": {
			func(t *testing.T, c *config.Config) { must(t, os.Remove(filepath.Join(c.Root, "pool/index.db"))) },
			[]string{"index.db", "daxfs pool init --force"},
		},
	} {
		t.Run(name, func(t *testing.T) {
			c := config.Default()
			c.Root, c.Pool.Size = t.TempDir(), 32<<20
			r, p, err := openPool(t.Context(), c)
			must(t, err)
			_, _, err = openPool(t.Context(), c)
			if err == nil || !strings.Contains(err.Error(), "in use by process") || !strings.Contains(err.Error(), "end what uses it") {
				t.Errorf("a second owner: %v", err)
			}
			must(t, p.Close())
			must(t, r.Close())
			tc.change(t, c)
			_, _, err = openPool(t.Context(), c)
			for _, want := range tc.want {
				if err == nil || !strings.Contains(err.Error(), want) {
					t.Errorf("error %v, expected %q in it", err, want)
				}
			}
		})
	}
}
