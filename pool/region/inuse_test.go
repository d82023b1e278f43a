package region

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

func TestInUse(t *testing.T) {
	dir := t.TempDir()
	link, real := filepath.Join(dir, "link"), filepath.Join(dir, "real pool")
	if err := os.WriteFile(real, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink(real, link); err != nil {
		t.Fatal(err)
	}
	h := fakeHost(t, map[string]string{
		"sys/block/loop3/loop/backing_file": "/var/pool\n",
		"sys/block/loop3/loop/offset":       "2097152\n",
		"sys/block/loop4/loop/backing_file": real + "\n",
		"sys/block/loop4/loop/offset":       "6291456\n",
		"sys/block/loop5/ro":                "0",
		"proc/self/mountinfo": "40 1 0:50 / /mnt/a ro - erofs /var/other ro,directio,fsoffset=6291456\n" +
			"41 1 0:51 / /mnt/b ro - fuse.daxfs " + strings.ReplaceAll(real, " ", "\\040") + "@2097152+4194304 ro\n" +
			"42 1 0:52 / /mnt/c ro - daxfs 0x100400000 ro\n" +
			"43 1 0:53 / /mnt/d ro - erofs " + strings.ReplaceAll(real, " ", "\\040") +
			" ro,directio,fsoffset=8388608\n" +
			"44 1 0:54 / /proc rw - proc proc rw\n",
		"sys/dev/block/259:0/holders/dm-0/dm/name": "other",
		"sys/dev/block/259:1/size":                 "8",
	}, nil)
	const size = 1 << 30
	file := func(path string) Info { return Info{Kind: KindFile, Path: path} }
	phys := func(n uint64) Info { return Info{Kind: KindPhys, Phys: n, HasPhys: true} }
	for _, test := range []struct {
		info Info
		want string
	}{
		{file("/var/pool"), "/dev/loop3"},
		{file("/var/other"), "/mnt/a"},
		{file("/var/free"), ""},
		{file(link), "/mnt/b"},
		{file(real), "/mnt/b"},
		{phys(0x100000000), "/mnt/c"},
		{phys(0x100600000), ""},
		{phys(0x100400000 - size), ""},
		{Info{Kind: KindDMABuf, Path: "/var/pool"}, ""},
		{Info{}, ""},
	} {
		err := h.inUse(test.info, size)
		if test.want == "" && err != nil || test.want != "" &&
			(!errors.Is(err, ErrBusy) || !strings.Contains(err.Error(), test.want)) {
			t.Errorf("%+v: %v, expected %q", test.info, err, test.want)
		}
	}
	if uses, err := h.held(259, 0); err != nil || len(uses) != 1 || !strings.Contains(uses[0], "dm-0 (other)") {
		t.Errorf("device below another: %v, %v", uses, err)
	}
	if uses, err := h.held(259, 1); err != nil || len(uses) != 0 {
		t.Errorf("device below none: %v, %v", uses, err)
	}
}

// A region that the mount table of this machine does not name is free. The lease that proves it is given back.
func TestInUseHere(t *testing.T) {
	r := mustOpen(t, Config{Kind: KindFile, Path: filepath.Join(t.TempDir(), "pool"), Size: MinSize, Create: true})
	if err := InUse(r); err != nil {
		t.Errorf("a new file: %v", err)
	}
	info := r.Info()
	if !onlyOurs(info) {
		t.Error("a file that nobody else has open is not ours alone")
	}
	other, err := os.Open(info.Path)
	if err != nil {
		t.Fatal(err)
	}
	if onlyOurs(info) {
		t.Error("a file that is open twice is ours alone")
	}
	other.Close()
	info.Kind = KindPmem
	if onlyOurs(info) {
		t.Error("a device is ours alone")
	}
	_, err = thisHost.uses(Info{Kind: KindPmem, BlockDevice: "/nowhere/pmem0"}, MinSize)
	if !errors.Is(err, os.ErrNotExist) || !strings.Contains(err.Error(), "/nowhere/pmem0") {
		t.Errorf("a missing device: %v", err)
	}
}
