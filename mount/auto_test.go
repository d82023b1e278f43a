package mount_test

import (
	"context"
	"errors"
	"fmt"
	"testing"

	"github.com/daxfs/daxfs-snapshotter/mount"
	"github.com/daxfs/daxfs-snapshotter/pool/region"
)

// fake is a driver that needs no kernel.
type fake struct {
	name         string
	probe, mount error
	mounted      *[]string
}

func (f fake) Name() string                                      { return f.name }
func (f fake) Sharing() string                                   { return "shares " + f.name }
func (f fake) Windows() bool                                     { return false }
func (f fake) Probe(context.Context, region.Info) error          { return f.probe }
func (f fake) Match(context.Context, mount.Source, string) error { return nil }
func (f fake) Unmount(context.Context, string) error             { return nil }
func (f fake) Mount(_ context.Context, _ mount.Source, _ string) error {
	*f.mounted = append(*f.mounted, f.name)
	return f.mount
}

func TestAutoPicks(t *testing.T) {
	var tried []string
	no := fmt.Errorf("no such thing here: %w", mount.ErrUnsupported)
	drivers := []mount.Driver{
		fake{"erofs-dax", no, nil, &tried},
		fake{"erofs-file", nil, no, &tried},
		fake{"erofs-loop", nil, nil, &tried},
		fake{"fuse", nil, nil, &tried},
	}
	src := mount.Source{Key: "k", Size: 4096}
	var w warnings
	d, err := mount.Auto(t.Context(), drivers, src, "/nowhere", w.add)
	if err != nil || d.Name() != "erofs-loop" || fmt.Sprint(tried) != "[erofs-file erofs-loop]" || len(w.text) != 1 {
		t.Errorf("picked %v, %v; tried %v; warnings %q", d, err, tried, w.text)
	}
	if _, err := mount.Auto(t.Context(), drivers[:2], src, "/nowhere", nil); !errors.Is(err, mount.ErrUnsupported) {
		t.Errorf("nothing works: %v, expected ErrUnsupported", err)
	}
	// Another driver must not hide a failure that has nothing to do with support.
	broken := errors.New("the image is broken")
	drivers[1] = fake{"erofs-file", nil, broken, &tried}
	if _, err := mount.Auto(t.Context(), drivers, src, "/nowhere", nil); !errors.Is(err, broken) {
		t.Errorf("broken image: %v", err)
	}
	for name, want := range map[string]int{
		"": 4, "auto": 4, "erofs": 3, "erofs-loop": 1, "fuse": 1,
		"fu": 0, "ext4": 0,
	} {
		got, err := mount.Select(drivers, name)
		if len(got) != want || (err == nil) != (want > 0) {
			t.Errorf("select %q: %d drivers, %v; expected %d", name, len(got), err, want)
		}
	}
	ex := mount.Explain(t.Context(), drivers, region.Info{})
	if len(ex) != 4 || ex[0].Usable || ex[0].Why != "no such thing here" || !ex[1].Picked ||
		ex[2].Picked || !ex[2].Usable {
		t.Errorf("explanations %+v", ex)
	}
}
