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
	offset := windowOffset
	windowOffset = func(name string) int64 { return map[string]int64{"daxfs-0123": 4 << 20}[name] }
	defer func() { windowOffset = offset }()
	h := fakeHost(t, map[string]string{
		"sys/block/loop3/loop/backing_file": "/var/pool\n",
		"sys/block/loop3/loop/offset":       "2097152\n",
		"sys/block/loop4/loop/backing_file": real + "\n",
		"sys/block/loop4/loop/offset":       "6291456\n",
		"sys/block/loop5/ro":                "0",
		"proc/self/mountinfo": "40 1 0:50 / /mnt/a ro - erofs /var/other ro,directio,fsoffset=6291456\n" +
			"41 1 0:51 / /mnt/b ro - fuse.daxfs " + strings.ReplaceAll(real, " ", "\\040") + "@2097152+4194304 ro\n" +
			"42 1 0:52 / /mnt/c ro - daxfs 0x100400000 ro\n" +
			"43 1 0:53 / /mnt/d ro - erofs " + strings.ReplaceAll(real, " ", "\\040") + " ro,directio,fsoffset=8388608\n" +
			"44 1 0:54 / /proc rw - proc proc rw\n",
		"sys/dev/block/259:0/holders/dm-0/dm/name": "daxfs-0123",
		"sys/dev/block/259:1/size":                 "8",
	}, nil)
	const size = 1 << 30
	file := func(path string) Info { return Info{Kind: KindFile, Path: path} }
	phys := func(n uint64) Info { return Info{Kind: KindPhys, Phys: n, HasPhys: true} }
	for _, test := range []struct {
		info Info
		off  int64
		want string
	}{
		{file("/var/pool"), -1, "/dev/loop3"},
		{file("/var/pool"), 2 << 20, "/dev/loop3"},
		{file("/var/pool"), 4 << 20, ""},
		{file("/var/other"), -1, "/mnt/a"},
		{file("/var/other"), 6 << 20, "/mnt/a"},
		{file("/var/other"), 0, ""},
		{file("/var/free"), -1, ""},
		{file(link), 2 << 20, "/mnt/b"},
		{file(real), 2 << 20, "/mnt/b"},
		{file(link), 6 << 20, "/dev/loop4"},
		{file(link), 8 << 20, "/mnt/d"},
		{file(link), 10 << 20, ""},
		{phys(0x100000000), -1, "/mnt/c"},
		{phys(0x100000000), 4 << 20, "/mnt/c"},
		{phys(0x100000000), 2 << 20, ""},
		{phys(0x100600000), -1, ""},
		{phys(0x100400000 - size), -1, ""},
		{Info{Kind: KindDMABuf, Path: "/var/pool"}, -1, ""},
		{Info{}, -1, ""},
	} {
		err := h.inUse(test.info, size, test.off)
		if test.want == "" && err != nil || test.want != "" && (!errors.Is(err, ErrBusy) || !strings.Contains(err.Error(), test.want)) {
			t.Errorf("%+v at %d: %v, expected %q", test.info, test.off, err, test.want)
		}
	}
	if uses, err := h.held(259, 0); err != nil || len(uses) != 1 || uses[0].off != 4<<20 {
		t.Errorf("device with a window: %v, %v", uses, err)
	}
	if uses, err := h.held(259, 1); err != nil || len(uses) != 0 {
		t.Errorf("device without windows: %v, %v", uses, err)
	}
	for table, want := range map[string]int64{"0 2048 linear 259:0 4096\n": 2 << 20, "0 2048 crypt x": -1, "": -1} {
		if got := tableOffset([]byte(table)); got != want {
			t.Errorf("table %q: %d, expected %d", table, got, want)
		}
	}
}
