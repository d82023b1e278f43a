package vmm

import (
	"encoding/json"
	"slices"
	"strings"
	"testing"
)

var devices = []Device{
	{ID: "daxfs-pool", Path: "/var/lib/a,b/pool", Size: 64 << 20, ReadOnly: true},
	{ID: "daxfs-lease", Path: "/run/lease", Size: 2 << 20},
}

// integration/qemu starts machines with these arguments; this test pins the ones not used there.
func TestQEMU(t *testing.T) {
	got, err := Args("qemu", 512<<20, devices)
	if err != nil {
		t.Fatal(err)
	}
	want := []string{
		"-machine", "q35", "-m", "512M,slots=2,maxmem=2560M",
		"-object",
		"memory-backend-file,id=daxfs-pool-file,share=on,readonly=on,mem-path=/var/lib/a,,b/pool," +
			"size=67108864,align=2M",
		"-device", "virtio-pmem-pci,id=daxfs-pool,memdev=daxfs-pool-file",
		"-object", "memory-backend-file,id=daxfs-lease-file,share=on,mem-path=/run/lease,size=2097152,align=2M",
		"-device", "virtio-pmem-pci,id=daxfs-lease,memdev=daxfs-lease-file",
	}
	if !slices.Equal(got, want) {
		t.Errorf("got  %q\nwant %q", got, want)
	}
}

func TestCloudHypervisor(t *testing.T) {
	if got, err := Args("cloud-hypervisor", 512<<20, devices); err == nil {
		t.Errorf("a path with a comma is taken: %q", got)
	}
	plain := slices.Clone(devices)
	plain[0].Path = "/var/lib/pool"
	got, err := Args("cloud-hypervisor", 512<<20, plain)
	if err != nil {
		t.Fatal(err)
	}
	want := []string{
		"--memory", "size=536870912", "--pmem", "file=/var/lib/pool,size=67108864,discard_writes=on,id=daxfs-pool",
		"file=/run/lease,size=2097152,id=daxfs-lease",
	}
	if !slices.Equal(got, want) {
		t.Errorf("got  %q\nwant %q", got, want)
	}
}

func TestFirecracker(t *testing.T) {
	lines, err := Args("firecracker", 512<<20, devices)
	if err != nil {
		t.Fatal(err)
	}
	var got map[string][]map[string]any
	if err := json.Unmarshal([]byte(strings.Join(lines, "\n")), &got); err != nil {
		t.Fatal(err)
	}
	p := got["pmem"]
	if len(got) != 1 || len(p) != 2 || p[0]["id"] != "daxfs_pool" || p[0]["path_on_host"] != "/var/lib/a,b/pool" ||
		p[0]["read_only"] != true ||
		p[0]["root_device"] != false || p[1]["read_only"] != false {
		t.Errorf("%s", lines)
	}
}

func TestUnknown(t *testing.T) {
	if _, err := Args("bhyve", 1<<30, devices); err == nil ||
		!strings.Contains(err.Error(), "qemu, cloud-hypervisor, firecracker") {
		t.Errorf("%v", err)
	}
}
