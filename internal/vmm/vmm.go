// Package vmm writes the arguments with which virtual machine monitors give files of the host to a
// guest as persistent memory (virtio-pmem). The guest maps the pages of the file in the host's page
// cache, and sees /dev/pmem0, /dev/pmem1 and so on in the order of the devices.
package vmm

import (
	"encoding/json"
	"fmt"
	"path/filepath"
	"strings"
)

// Align is the granule of device sizes, in bytes.
const Align = 2 << 20

// Device is one file that a guest gets as persistent memory.
type Device struct {
	ID       string // identifies it to the monitor: letters, digits and "-"
	Path     string // file on the host
	Size     int64  // bytes, a multiple of Align
	ReadOnly bool   // the guest cannot change the file
}

// PageStructs returns how many bytes of its own memory a Linux guest needs to describe the pages of
// devices with size bytes in total: 64 bytes per page of 4096.
func PageStructs(size int64) int64 { return size / 64 }

// names maps the monitors that Args knows to functions that write their arguments.
var names = map[string]func(ram int64, devices []Device) ([]string, error){
	"qemu":             qemu,
	"cloud-hypervisor": cloudHypervisor,
	"firecracker":      firecracker,
}

// Names lists the monitors that Args knows.
func Names() []string { return []string{"qemu", "cloud-hypervisor", "firecracker"} }

// Args returns the arguments that give the devices to a guest with ram bytes of memory. Firecracker
// takes a file instead of arguments; for it, Args returns lines of JSON for that file.
func Args(name string, ram int64, devices []Device) ([]string, error) {
	args, ok := names[name]
	if !ok {
		return nil, fmt.Errorf("virtual machine monitor %q, expected one of %s", name, strings.Join(Names(), ", "))
	}
	return args(ram, devices)
}

// qemu needs a machine type with memory slots and addresses behind the guest's memory: not "microvm".
func qemu(ram int64, devices []Device) ([]string, error) {
	const mib, gib = 1 << 20, 1 << 30
	top := ram
	for _, d := range devices {
		top += (d.Size + gib - 1) &^ (gib - 1) // with room to align each device
	}
	args := []string{"-machine", "q35", "-m", fmt.Sprintf("%dM,slots=%d,maxmem=%dM", ram/mib, len(devices), top/mib)}
	for _, d := range devices {
		mode := ""
		if d.ReadOnly {
			mode = "readonly=on,"
		}
		// A comma in a value is doubled.
		path := strings.ReplaceAll(d.Path, ",", ",,")
		args = append(args,
			"-object",
			fmt.Sprintf("memory-backend-file,id=%s-file,share=on,%smem-path=%s,size=%d,align=2M", d.ID,
				mode, path, d.Size),
			"-device", fmt.Sprintf("virtio-pmem-pci,id=%s,memdev=%s-file", d.ID, d.ID))
	}
	return args, nil
}

// cloudHypervisor uses discard_writes for read-only devices: the monitor then maps the file privately
// for reading, and pages stay those of the file.
func cloudHypervisor(ram int64, devices []Device) ([]string, error) {
	args := []string{"--memory", fmt.Sprintf("size=%d", ram), "--pmem"}
	for _, d := range devices {
		if strings.ContainsAny(d.Path, `,"[]`) {
			return nil,
				fmt.Errorf("path %q has a comma, a quotation mark or a bracket: Cloud Hypervisor takes none", d.Path)
		}
		mode := ""
		if d.ReadOnly {
			mode = ",discard_writes=on"
		}
		args = append(args, fmt.Sprintf("file=%s,size=%d%s,id=%s", d.Path, d.Size, mode, d.ID))
	}
	return args, nil
}

// firecracker takes sizes from the files; a name has letters, digits and "_".
func firecracker(_ int64, devices []Device) ([]string, error) {
	type pmem struct {
		ID       string `json:"id"`
		Path     string `json:"path_on_host"`
		Root     bool   `json:"root_device"`
		ReadOnly bool   `json:"read_only"`
	}
	var config struct {
		Pmem []pmem `json:"pmem"`
	}
	for _, d := range devices {
		path, err := filepath.Abs(d.Path)
		if err != nil {
			return nil, err
		}
		config.Pmem = append(config.Pmem,
			pmem{ID: strings.ReplaceAll(d.ID, "-", "_"), Path: path, ReadOnly: d.ReadOnly})
	}
	b, err := json.MarshalIndent(config, "", "  ")
	if err != nil {
		return nil, err
	}
	return strings.Split(string(b), "\n"), nil
}
