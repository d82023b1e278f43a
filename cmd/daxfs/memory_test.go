package main

import (
	"bytes"
	"errors"
	"os"
	"path/filepath"
	"testing"

	"github.com/daxfs/daxfs-snapshotter/pool/region"
)

func TestRegionAt(t *testing.T) {
	dir := t.TempDir()
	file := filepath.Join(dir, "a+b")
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	there, err := fileRegion(file)
	if err != nil {
		t.Fatal(err)
	}
	phys := region.Config{Kind: region.KindPhys, Phys: 0x400000000, Size: 1 << 32, Force: true}
	for _, tc := range []struct {
		kind, arg string
		want      region.Config
	}{
		{"", "0x400000000+4294967296", phys},
		{region.KindPhys, "17179869184+0x100000000", phys},
		{"", file, region.Config{Kind: there.Kind, Path: file}}, // a path, although it contains a plus
		{"", filepath.Join(dir, "new"), region.Config{Kind: there.Kind, Path: filepath.Join(dir, "new")}},
		{region.KindFile, "1+1", region.Config{Kind: region.KindFile, Path: "1+1"}},
		{region.KindPmem, "/dev/pmem7", region.Config{Kind: region.KindPmem, Path: "/dev/pmem7"}},
	} {
		if got, err := regionAt(tc.kind, tc.arg); err != nil || got != tc.want {
			t.Errorf("kind %q, %q: %+v, %v; want %+v", tc.kind, tc.arg, got, err, tc.want)
		}
	}
	var usage *usageError
	if _, err := regionAt("", "0x4zz+1"); !errors.As(err, &usage) {
		t.Errorf("an address that is no number: %v, want a usage error", err)
	}
}

// The kernel's own memory is never opened as a pool, whatever the arguments.
func TestOpenMemoryRefusesRAM(t *testing.T) {
	ram, err := os.ReadFile("/proc/iomem")
	if err != nil || os.Geteuid() != 0 || !bytes.Contains(ram, []byte("System RAM")) {
		t.Skip("needs root and /proc/iomem")
	}
	var info region.Info
	f, _, err := openMemory("0x200000+16777216", &info)
	if err == nil {
		f.Close()
	}
	if !errors.Is(err, region.ErrForeign) {
		t.Errorf("%v, want ErrForeign", err)
	}
}
