package config

import (
	"strings"
	"testing"

	"github.com/pelletier/go-toml/v2"
)

// The snippet matches the daemon's defaults.
func TestContainerdSnippet(t *testing.T) {
	def := Default()
	for minor, version := range map[int]int64{0: 3, 3: 3, 4: 4, 5: 4} {
		var got struct {
			Version int64
			Proxy   map[string]struct {
				Type, Address string
				Capabilities  []string
				Exports       map[string]string
			} `toml:"proxy_plugins"`
			Plugins map[string]struct {
				Unpack []struct{ Snapshotter, Differ string } `toml:"unpack_config"`
			}
		}
		if err := toml.Unmarshal([]byte(ContainerdSnippet(minor)), &got); err != nil {
			t.Fatal(err)
		}
		sn, differ := got.Proxy["daxfs"], got.Proxy["daxfs-diff"]
		if got.Version != version || sn.Type != "snapshot" || differ.Type != "diff" {
			t.Errorf("2.%d: version %d, types %q and %q, expected %d, snapshot, diff", minor, got.Version, sn.Type,
				differ.Type, version)
		}
		if sn.Address != def.Address || differ.Address != def.Address || sn.Exports["root"] != def.Root {
			t.Errorf("2.%d: addresses %q and %q, root %q; the daemon's defaults are %q and %q", minor, sn.Address,
				differ.Address, sn.Exports["root"], def.Address, def.Root)
		}
		if has := strings.Contains(strings.Join(sn.Capabilities, " ")+" ", "remap-ids "); has != def.Mount.RemapIDs {
			t.Errorf("2.%d: capabilities %q, but mount.remap_ids is %v by default", minor, sn.Capabilities,
				def.Mount.RemapIDs)
		}
		var pairs []string
		for _, u := range got.Plugins["io.containerd.transfer.v1.local"].Unpack {
			pairs = append(pairs, u.Snapshotter+"/"+u.Differ)
		}
		if p := strings.Join(pairs, " "); p != "overlayfs/walking daxfs/daxfs-diff" {
			t.Errorf("2.%d: unpack_config has %q", minor, p)
		}
	}
}
