package kernel

import (
	"errors"
	"fmt"
	"os"
	"strings"
	"testing"

	"github.com/daxfs/daxfs-snapshotter/mount"
	"github.com/daxfs/daxfs-snapshotter/pool/region"
)

func TestOptions(t *testing.T) {
	const gib = 1 << 30
	phys := region.Info{Kind: region.KindPhys, Phys: 4 * gib, HasPhys: true, FD: -1}
	for _, tc := range []struct {
		name string
		src  mount.Source
		want string // source, options, descriptors; or part of the error
		ok   bool
	}{
		{
			"physical",
			mount.Source{Region: phys, Off: 6 << 20, Size: 1 << 20},
			"0x100600000 [phys=0x100600000 size=1048576 validate] map[]", true,
		},
		{
			"start",
			mount.Source{Region: phys, Size: 4096},
			"0x100000000 [phys=0x100000000 size=4096 validate] map[]", true,
		},
		{"misaligned", mount.Source{Region: phys, Off: 4096, Size: 4096}, "multiple of 2 MiB", false},
		{
			"no address",
			mount.Source{Region: region.Info{Kind: region.KindFile, Path: "/x", FD: -1}, Size: 4096},
			"no physical address", false,
		},
		{
			"dma-buf",
			mount.Source{Region: region.Info{Kind: region.KindDMABuf, Path: "/dev/dma_heap/system", FD: 7}, Size: 4096},
			"/dev/dma_heap/system [validate] map[dmabuf:7]", true,
		},
		{"part of a dma-buf", mount.Source{
			Region: region.Info{Kind: region.KindDMABuf, FD: 7}, Off: 2 << 20,
			Size: 4096,
		}, "from its start", false},
		{
			"closed dma-buf",
			mount.Source{Region: region.Info{Kind: region.KindDMABuf, FD: -1}, Size: 4096},
			"not open", false,
		},
	} {
		m, err := options(tc.src)
		if !tc.ok {
			if !errors.Is(err, mount.ErrUnsupported) || !strings.Contains(err.Error(), tc.want) {
				t.Errorf("%s: %v, expected ErrUnsupported that says %q", tc.name, err, tc.want)
			}
			continue
		}
		if got := fmt.Sprint(m.Source, " ", m.Options, " ", m.FDs); err != nil || got != tc.want {
			t.Errorf("%s: %s, %v; expected %s", tc.name, got, err, tc.want)
		}
	}
}

func TestProbeSaysWhatToDo(t *testing.T) {
	for _, tc := range []struct {
		info region.Info
		want string
	}{
		{region.Info{Kind: region.KindTmpfs, Path: "/dev/shm/x", FD: -1}, "physical address"},
		{region.Info{Kind: region.KindPhys, Phys: 4096, HasPhys: true}, "2 MiB"},
		{region.Info{Kind: region.KindDMABuf, FD: -1}, "not open"},
	} {
		if err := (Driver{}).Probe(t.Context(), tc.info); !errors.Is(err, mount.ErrUnsupported) ||
			!strings.Contains(err.Error(), tc.want) {
			t.Errorf("%+v: %v, expected ErrUnsupported that says %q", tc.info, err, tc.want)
		}
	}
	err := (Driver{}).Probe(t.Context(), region.Info{Kind: region.KindPhys, Phys: 1 << 32, HasPhys: true})
	if _, serr := os.Stat("/sys/module/daxfs"); serr == nil {
		if err != nil {
			t.Errorf("with the module loaded: %v", err)
		}
		return
	}
	if !errors.Is(err, mount.ErrUnsupported) {
		t.Errorf("without the module: %v, expected ErrUnsupported", err)
	}
}
