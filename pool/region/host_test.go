package region

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

const iomemText = `00000000-00000fff : Reserved
00001000-0009fbff : System RAM
00100000-bfffffff : System RAM
  01000000-02276507 : Kernel code
c0000000-febfffff : PCI Bus 0000:00
100000000-3ffffffff : System RAM
400000000-4ffffffff : Persistent Memory (legacy)
  400000000-4ffffffff : namespace0.0
500000000-5ffffffff : Reserved
600000000-6ffffffff : Soft Reserved
  600000000-6ffffffff : dax0.0
    600000000-67fffffff : System RAM (kmem)
700000000-7ffffffff : Persistent Memory
`

// fakeHost makes a machine from files (path -> contents) and links (path -> target).
func fakeHost(t *testing.T, files, links map[string]string) host {
	t.Helper()
	root := t.TempDir()
	for path, text := range files {
		path = filepath.Join(root, path)
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	for path, target := range links {
		path = filepath.Join(root, path)
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.Symlink(filepath.Join(root, target), path); err != nil {
			t.Fatal(err)
		}
	}
	return host{root}
}

func TestCheckPhys(t *testing.T) {
	h := fakeHost(t, map[string]string{"proc/iomem": iomemText}, nil)
	const g = 1 << 30
	for _, test := range []struct {
		name   string
		start  uint64
		size   int64
		force  bool
		refuse string // part of the error; "" for no error
	}{
		{"reserved", 20 * g, g, false, ""},
		{"all of the reserved range", 20 * g, 4 * g, false, ""},
		{"persistent without driver", 28 * g, g, false, ""},
		{"label area", 28 * g, 4 * g, true, "label area"},
		{"up to the label area", 31 * g, g - labelArea, false, ""},
		{"System RAM", 8 * g, g, true, "System RAM"},
		{"over the end of System RAM", 16*g - 2<<20, 8 << 20, true, "System RAM"},
		{"System RAM inside of a DAX device", 24 * g, 8 << 20, true, "System RAM"},
		{"the rest of that device", 26 * g, 8 << 20, false, ""},
		{"namespace", 16 * g, g, false, "namespace0.0"},
		{"namespace with force", 16 * g, g, true, ""},
		{"not listed", 100 * g, g, false, "not inside of one reserved range"},
		{"not listed with force", 100 * g, g, true, ""},
		{"two ranges", 24*g - 8<<20, 16 << 20, true, "System RAM"},
		{"PCI", 0xc0000000, 8 << 20, false, "not inside"},
		{"wraps", ^uint64(0) - 4096, 8 << 20, true, "wraps"},
	} {
		t.Run(test.name, func(t *testing.T) {
			err := h.checkPhys(test.start, test.size, test.force)
			switch {
			case test.refuse == "" && err != nil:
				t.Errorf("refused: %v", err)
			case test.refuse != "" && (err == nil || !strings.Contains(err.Error(), test.refuse)):
				t.Errorf("%v, expected %q", err, test.refuse)
			}
		})
	}
	hidden := fakeHost(t, map[string]string{"proc/iomem": "00000000-00000000 : System RAM\n"}, nil)
	if err := hidden.checkPhys(20*g, g, true); !errors.Is(err, fs.ErrPermission) {
		t.Errorf("hidden addresses: %v, expected a permission error", err)
	}
}

// TestCheckPhysHere asks the real machine about its own memory.
func TestCheckPhysHere(t *testing.T) {
	ranges, err := thisHost.iomem()
	if err != nil {
		t.Skip("no addresses in /proc/iomem: ", err)
	}
	tried := 0
	for _, r := range ranges {
		if r.name == "System RAM" && r.end-r.start > MinSize {
			tried++
			if _, err := Open(Config{
				Kind: KindPhys, Phys: (r.start + Align) &^ (Align - 1), Size: MinSize,
				Force: true,
			}); !errors.Is(err, ErrForeign) {
				t.Errorf("System RAM at %#x: %v, expected ErrForeign", r.start, err)
			}
		}
	}
	if tried == 0 {
		t.Skip("no System RAM in /proc/iomem")
	}
}

func pmemFiles(extra map[string]string) map[string]string {
	files := map[string]string{
		"sys/devices/nd/namespace0.0/block/pmem0/size":              "8388608",
		"sys/devices/nd/namespace0.0/block/pmem0/queue/dax":         "1",
		"sys/devices/nd/namespace0.0/block/pmem0/device/resource":   "0x400000000",
		"sys/devices/nd/namespace0.0/block/pmem0/pmem0p1/partition": "1",
		"sys/devices/nd/namespace0.0/block/pmem0/pmem0p1/start":     "4096",
		"sys/devices/nd/namespace0.0/block/pmem0/pmem0p1/size":      "65536",
		"sys/devices/nd/btt0.1/block/pmem1s/size":                   "8388608",
		"sys/devices/pci/block/sda/size":                            "8388608",
		"proc/self/mountinfo":                                       "22 1 254:0 / / rw - ext4 /dev/vda rw\n",
	}
	for k, v := range extra {
		files[k] = v
	}
	return files
}

var pmemLinks = map[string]string{
	"sys/dev/block/259:0": "sys/devices/nd/namespace0.0/block/pmem0",
	"sys/dev/block/259:1": "sys/devices/nd/namespace0.0/block/pmem0/pmem0p1",
	"sys/dev/block/259:2": "sys/devices/nd/btt0.1/block/pmem1s",
	"sys/dev/block/8:0":   "sys/devices/pci/block/sda",
}

func TestPmemDevice(t *testing.T) {
	h := fakeHost(t, pmemFiles(nil), pmemLinks)
	d, err := h.pmem(259, 0)
	if err != nil || *d != (device{name: "pmem0", size: 4 << 30, dax: true, phys: 0x400000000, hasPhys: true}) {
		t.Errorf("pmem0: %+v, %v", d, err)
	}
	d, err = h.pmem(259, 1)
	if err != nil ||
		*d != (device{name: "pmem0p1", size: 32 << 20, dax: true, phys: 0x400000000 + 2<<20, hasPhys: true}) {
		t.Errorf("pmem0p1: %+v, %v", d, err)
	}
	for minor, want := range map[uint32]string{2: "sector mode"} {
		if _, err := h.pmem(259, minor); !errors.Is(err, ErrKind) || !strings.Contains(err.Error(), want) {
			t.Errorf("259:%d: %v, expected %q", minor, err, want)
		}
	}
	if _, err := h.pmem(8, 0); !errors.Is(err, ErrKind) {
		t.Errorf("a disk: %v, expected ErrKind", err)
	}
	if _, err := h.pmem(1, 1); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("no device: %v", err)
	}
}

func TestPmemHolders(t *testing.T) {
	const holder = "sys/devices/nd/namespace0.0/block/pmem0/holders/"
	ours := fakeHost(t, pmemFiles(map[string]string{holder + "dm-0/dm/name": "daxfs-0123"}), pmemLinks)
	if _, err := ours.pmem(259, 0); err != nil {
		t.Errorf("held by our own window: %v", err)
	}
	// An owner that starts again finds its pool mounted, once per image.
	mounted := fakeHost(t, pmemFiles(map[string]string{
		"proc/self/mountinfo": "30 1 259:0 / /live/mnt ro - erofs /dev/pmem0 ro,dax=always\n" +
			"31 1 259:0 /00000 /images/a/mnt ro shared:1 master:2 - erofs /dev/pmem0 ro,dax=always\n",
	}), pmemLinks)
	if _, err := mounted.pmem(259, 0); err != nil {
		t.Errorf("mounted as a pool is: %v", err)
	}
	for name, extra := range map[string]map[string]string{
		"lvm":     {holder + "dm-1/dm/name": "vg-root"},
		"raid":    {holder + "md0/x": ""},
		"mounted": {"proc/self/mountinfo": "30 1 259:0 / /data rw shared:1 - xfs /dev/pmem0 rw,dax\n"},
	} {
		h := fakeHost(t, pmemFiles(extra), pmemLinks)
		if _, err := h.pmem(259, 0); !errors.Is(err, ErrBusy) {
			t.Errorf("%s: %v, expected ErrBusy", name, err)
		}
	}
}

func TestDevDAXDevice(t *testing.T) {
	h := fakeHost(t, map[string]string{
		"sys/devices/LNXSYSTM:00/ndbus0/region0/dax0.0/dax/dax0.0/size":     "4292870144",
		"sys/devices/LNXSYSTM:00/ndbus0/region0/dax0.0/dax/dax0.0/align":    "2097152",
		"sys/devices/LNXSYSTM:00/ndbus0/region0/dax0.0/dax/dax0.0/resource": "0x700200000",
		"sys/devices/platform/hmem.0/dax1.0/size":                           "1073741824",
		"sys/devices/virtual/mem/null/uevent":                               "",
	}, map[string]string{
		"sys/dev/char/252:0": "sys/devices/LNXSYSTM:00/ndbus0/region0/dax0.0/dax/dax0.0",
		"sys/dev/char/252:1": "sys/devices/platform/hmem.0/dax1.0",
		"sys/dev/char/1:3":   "sys/devices/virtual/mem/null",
	})
	d, err := h.devdax(252, 0)
	if err != nil ||
		*d != (device{
			name: "dax0.0", size: 4292870144, align: Align, phys: 0x700200000, hasPhys: true,
			persistent: true,
		}) {
		t.Errorf("dax0.0: %+v, %v", d, err)
	}
	d, err = h.devdax(252, 1)
	if err != nil || *d != (device{name: "dax1.0", size: 1 << 30, align: Align}) {
		t.Errorf("dax1.0: %+v, %v", d, err)
	}
	if _, err := h.devdax(1, 3); !errors.Is(err, ErrKind) {
		t.Errorf("null: %v, expected ErrKind", err)
	}
}

func TestBeforeLabels(t *testing.T) {
	const device = 1 << 30
	for _, test := range []struct{ configured, want int64 }{
		{0, device - Align},
		{device, 0},
		{device - Align, device - Align},
		{16 << 20, 16 << 20},
		{16<<20 + 1, 16 << 20},
	} {
		got, err := beforeLabels(device, test.configured)
		if got != test.want || (err != nil) != (test.want == 0) {
			t.Errorf("configured %d: %d, %v; expected %d", test.configured, got, err, test.want)
		}
	}
}

// TestOpenPhys opens a range of a machine whose memory is a file.
func TestOpenPhys(t *testing.T) {
	const start = 8 << 20
	h := fakeHost(t, map[string]string{
		"dev/mem": "", "proc/iomem": "00000000-007fffff : System RAM\n00800000-01ffffff : Reserved\n",
	}, nil)
	mem := h.path("dev/mem")
	if err := os.Truncate(mem, 32<<20); err != nil {
		t.Fatal(err)
	}
	c := Config{Kind: KindPhys, Phys: start, Size: MinSize}
	r, err := openPhys(h, c)
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	testRegion(t, r)
	if _, err := r.WriteAt([]byte("stored"), 4096); err != nil {
		t.Fatal(err)
	}
	b, err := os.ReadFile(mem)
	if err != nil || string(b[start+4096:][:6]) != "stored" {
		t.Errorf("at the address lies %q, %v", b[start+4096:][:6], err)
	}
	info := r.Info()
	if info.Phys != start || !info.HasPhys || info.Persistent != PersistsProcess || info.Sparse || info.FD != -1 {
		t.Errorf("info %+v", info)
	}
	// All ranges share one file, so a lock on it would keep owners of other ranges out.
	other, err := openPhys(h, Config{Kind: KindPhys, Phys: start + MinSize, Size: MinSize})
	if err != nil {
		t.Fatal(err)
	}
	defer other.Close()
	for _, r := range []Region{r, other} {
		if err := r.(Locker).Lock(); err != nil {
			t.Errorf("lock of one of two ranges: %v", err)
		}
	}
	c.ReadOnly = true
	reader, err := openPhys(h, c)
	if err != nil {
		t.Fatal(err)
	}
	defer reader.Close()
	got := make([]byte, 6)
	if _, err := reader.ReadAt(got, 4096); err != nil || string(got) != "stored" {
		t.Errorf("the reader sees %q, %v", got, err)
	}
	if _, err := reader.WriteAt(got, 0); !errors.Is(err, unix.EBADF) {
		t.Errorf("write of a reader: %v, expected EBADF", err)
	}
	if err := os.Remove(mem); err != nil {
		t.Fatal(err)
	}
	if _, err := openPhys(h, c); !errors.Is(err, fs.ErrNotExist) || !strings.Contains(err.Error(), mem) {
		t.Errorf("no /dev/mem: %v", err)
	}
}

// An owner leaves out the labels at the end of a device and never takes RAM of this host; a reader takes all.
func TestDeviceSize(t *testing.T) {
	h := fakeHost(t, map[string]string{"proc/iomem": iomemText}, nil)
	const g = 1 << 30
	for _, test := range []struct {
		name string
		d    device
		c    Config
		want int64
		err  error
	}{
		{"owner", device{size: g}, Config{}, g - Align, nil},
		{"reader", device{size: g}, Config{ReadOnly: true}, g, nil},
		{"reader of a part", device{size: g}, Config{ReadOnly: true, Size: MinSize}, MinSize, nil},
		{"more than the owner may have", device{size: g}, Config{Size: g}, 0, ErrSize},
		{"too small", device{size: MinSize}, Config{}, 0, ErrSize},
		{"RAM", device{size: g, phys: 4 * g, hasPhys: true}, Config{}, 0, ErrForeign},
		{"reader of RAM", device{size: g, phys: 4 * g, hasPhys: true}, Config{ReadOnly: true}, g, nil},
		{
			"reader of a part of RAM",
			device{size: g, phys: 4 * g, hasPhys: true},
			Config{ReadOnly: true, Size: MinSize},
			MinSize, nil,
		},
		{"namespace", device{size: g, phys: 16 * g, hasPhys: true}, Config{}, g - Align, nil},
	} {
		got, err := h.deviceSize(&test.d, test.c)
		if !errors.Is(err, test.err) || err == nil && got != test.want {
			t.Errorf("%s: %d, %v; expected %d, %v", test.name, got, err, test.want, test.err)
		}
	}
}
