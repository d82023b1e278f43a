package region_test

import (
	"errors"
	"os"
	"path/filepath"
	"testing"

	"github.com/daxfs/daxfs-snapshotter/pool/region"
)

func TestNamed(t *testing.T) {
	dir := t.TempDir()
	onDisk := filepath.Join(dir, "a+b") // a path is no range
	if err := os.WriteFile(onDisk, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	inMemory, err := os.CreateTemp("/dev/shm", "daxfs-named-")
	if err != nil {
		t.Fatal(err)
	}
	inMemory.Close()
	defer os.Remove(inMemory.Name())
	for _, c := range []struct {
		name string
		want region.Config
		err  error
	}{
		{onDisk, region.Config{Kind: region.KindFile, Path: onDisk}, nil},
		{inMemory.Name(), region.Config{Kind: region.KindTmpfs, Path: inMemory.Name()}, nil},
		{"0x100000000+0x40000000", region.Config{Kind: region.KindPhys, Phys: 4 << 30, Size: 1 << 30}, nil},
		{"4294967296+x", region.Config{}, region.ErrKind},
		{dir, region.Config{}, region.ErrKind},
		{filepath.Join(dir, "missing"), region.Config{}, os.ErrNotExist},
		{"/dev/null", region.Config{Kind: region.KindDevDAX, Path: "/dev/null"}, nil}, // Open finds that it is none
	} {
		got, err := region.Named(c.name)
		if !errors.Is(err, c.err) || err == nil && got != c.want {
			t.Errorf("%s: %+v, %v; expected %+v, %v", c.name, got, err, c.want, c.err)
		}
	}
}
