package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"slices"
	"strconv"
	"strings"
	"time"

	introspection "github.com/containerd/containerd/api/services/introspection/v1"
	snapshots "github.com/containerd/containerd/api/services/snapshots/v1"
	versions "github.com/containerd/containerd/api/services/version/v1"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/platforms"
	"github.com/pelletier/go-toml/v2"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	grpcstatus "google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/emptypb"

	"github.com/daxfs/daxfs-snapshotter/config"
)

type containerdReport struct {
	Address string    `json:"address"`
	Version string    `json:"version,omitempty"`
	Checks  []support `json:"checks"`
	// Snippet is the missing part of containerd's configuration; empty if nothing is missing.
	Snippet string `json:"snippet,omitempty"`

	process int // the listening process; 0 if it is not visible
}

// containerdFiles locates the sockets and configurations.
type containerdFiles struct {
	socket, config, daemonConfig string
	name                         string // of the snapshotter in containerd
}

// doctorTimeout bounds each request to containerd and to the daemon.
const doctorTimeout = 5 * time.Second

// checkContainerd checks that containerd, its configuration file and the daemon fit together.
func checkContainerd(ctx context.Context, files containerdFiles) *containerdReport {
	r := &containerdReport{Address: files.socket}
	add := func(name string, ok bool, format string, args ...any) bool {
		r.Checks = append(r.Checks, need(name, ok, fmt.Sprintf(format, args...)))
		return ok
	}
	conn, err := dialUnix(files.socket)
	if err != nil {
		add("containerd", false, "%v", err)
		return r
	}
	defer conn.Close()
	ctx = namespaces.WithNamespace(ctx, "default") // any namespace will do: nothing is looked up in it
	minor, err := r.askVersion(ctx, conn)
	if !add("containerd answers", err == nil, "%v; is it running, and are you root?", err) {
		return r
	}
	if pid, _, err := socketOwner(files.socket); err == nil {
		r.process = pid
	}
	add("containerd is 2.0 or later", minor >= 0, "found %q, which has no transfer service", r.Version)

	before := len(r.Checks)
	plugins, err := askPlugins(ctx, conn)
	if !add("plugin list", err == nil, "%v", err) {
		return r
	}
	sn, ok := plugins[snapshotterPlugin+files.name]
	if add("snapshotter "+files.name+" registered", ok,
		"no [proxy_plugins.%s] in containerd's configuration, or containerd was not restarted since", files.name) {
		r.checkPlugin(sn, add)
	}
	r.checkConfig(ctx, files, plugins, add)
	if slices.ContainsFunc(r.Checks[before:], func(s support) bool { return !s.OK }) {
		r.Snippet = snippetFor(minor, files.daemonConfig)
	}
	if sn != nil {
		r.checkSocket(files, sn, add)
	}
	return r
}

// snippetFor returns the configuration that containerd needs for the daemon with a configuration file.
func snippetFor(minor int, daemonConfig string) string {
	text, usual := config.ContainerdSnippet(minor), config.Default()
	if c, err := loadDaemonConfig(daemonConfig); err == nil {
		text = strings.ReplaceAll(text, strconv.Quote(usual.Address), strconv.Quote(c.Address))
		text = strings.ReplaceAll(text, strconv.Quote(usual.Root), strconv.Quote(c.Root))
	}
	return text
}

// snapshotterPlugin begins the names of snapshotters among containerd's plugins.
const snapshotterPlugin = "io.containerd.snapshotter.v1/"

type adder func(name string, ok bool, format string, args ...any) bool

// checkPlugin checks containerd's configuration of the snapshotter.
func (r *containerdReport) checkPlugin(p *introspection.Plugin, add adder) {
	add("export root", p.Exports["root"] != "",
		"without it kubelet measures a directory that does not exist; expected the daemon's root")
	add("export enable_remote_snapshot_annotations", p.Exports["enable_remote_snapshot_annotations"] == "true",
		"found %q, expected \"true\": without it the top layer of an image is known only after a pause",
		p.Exports["enable_remote_snapshot_annotations"])
	add("capability only-remap-ids", slices.Contains(p.Capabilities, "only-remap-ids"),
		"without it a container with a user namespace gets a copy of the whole image")
}

// checkConfig checks what only containerd's configuration shows: pairs of snapshotter and differ, defaults, CRI.
func (r *containerdReport) checkConfig(ctx context.Context, files containerdFiles,
	plugins map[string]*introspection.Plugin, add adder,
) {
	d, err := dumpConfig(ctx, files.config)
	if err != nil {
		add("containerd's configuration", false, "cannot be read: %v", err)
		return
	}
	// Our differs are those at the snapshotter's own socket, and those with our name.
	address := ""
	if p := plugins[snapshotterPlugin+files.name]; p != nil {
		address = strings.TrimPrefix(p.Exports["address"], "unix://")
	}
	ours := map[string]bool{}
	for name, p := range d.Proxy {
		if p.Type == "diff" && (p.Address == address || name == files.name+"-diff") {
			ours[name] = true
			add("differ "+name+" socket", p.Address == address,
				"[proxy_plugins.%s] has the address %q and the snapshotter %q; layers cannot be applied: "+
					"make them the same",
				name, p.Address, address)
		}
	}
	found := map[string]bool{}
	for _, u := range d.unpack() {
		found[u.Snapshotter] = found[u.Snapshotter] || platformFits(u.Platform)
		switch {
		case u.Snapshotter != files.name:
			add("differ of "+u.Snapshotter, !ours[u.Differ],
				"unpack_config gives it %q, which knows only snapshots of %s; make it \"walking\"",
				u.Differ, files.name)
			continue
		case !platformFits(u.Platform):
			add("unpack_config platform", false,
				"the entry of %s is for %q, which is not this machine's; make it \"linux\"",
				files.name, u.Platform)
		}
		if u.Differ != "walking" {
			add("differ "+u.Differ+" registered", plugins["io.containerd.differ.v1/"+u.Differ] != nil,
				"no [proxy_plugins.%s] in containerd's configuration", u.Differ)
		}
	}
	add("unpack_config lists "+files.name, found[files.name],
		"without it every pull ends with \"no unpack platforms defined\"")
	add("unpack_config lists overlayfs", found["overlayfs"],
		"a list of one's own replaces the built-in one: pulls for overlayfs end with \"no unpack platforms defined\"")
	for _, name := range d.Plugins.Diff.Default {
		if ours[name] {
			add("differs of the diff service", false,
				"default = %q has our %q: it belongs into unpack_config alone; take it out",
				d.Plugins.Diff.Default, name)
		}
	}
	for where, name := range d.criSnapshotters() {
		add("CRI "+where, plugins[snapshotterPlugin+name] != nil,
			"its snapshotter is %q, which is none of containerd's; is %q meant?", name, files.name)
	}
}

// platformFits reports whether an entry of unpack_config is for this machine.
func platformFits(name string) bool {
	p, err := platforms.Parse(name)
	return err == nil && platforms.Only(platforms.DefaultSpec()).Match(p)
}

// checkSocket compares the daemon's address in containerd's configuration with the daemon's own configuration.
func (r *containerdReport) checkSocket(files containerdFiles, p *introspection.Plugin, add adder) {
	address := strings.TrimPrefix(p.Exports["address"], "unix://")
	st, err := os.Stat(address)
	if add("socket "+address, err == nil, "%v; start daxfs-snapshotter, or correct the address", err) {
		add("socket is root's alone", st.Mode().Perm()&0o077 == 0,
			"its mode is %04o, expected 0600: whoever can connect has root's power", st.Mode().Perm())
	}
	c, err := loadDaemonConfig(files.daemonConfig)
	if err != nil {
		return // the daemon's part reports it
	}
	add("address agrees", c.Address == address, "%s says %q, containerd says %q; make them the same",
		files.daemonConfig, c.Address, address)
	add("root agrees", c.Root == p.Exports["root"], "%s says %q, containerd's export says %q; make them the same",
		files.daemonConfig, c.Root, p.Exports["root"])
	has := slices.Contains(p.Capabilities, "remap-ids")
	add("remap-ids agrees", has == c.Mount.RemapIDs,
		"%s has mount.remap_ids = %v, containerd has the capability: %v; make them the same",
		files.daemonConfig, c.Mount.RemapIDs, has)
}

func dialUnix(path string) (*grpc.ClientConn, error) {
	return grpc.NewClient("unix://"+path, grpc.WithTransportCredentials(insecure.NewCredentials()))
}

// askVersion returns the minor version of containerd 2, or -1 for an older one.
func (r *containerdReport) askVersion(ctx context.Context, conn *grpc.ClientConn) (int, error) {
	ctx, cancel := context.WithTimeout(ctx, doctorTimeout)
	defer cancel()
	v, err := versions.NewVersionClient(conn).Version(ctx, &emptypb.Empty{})
	if err != nil {
		return 0, err
	}
	r.Version = v.Version
	fields := strings.SplitN(strings.TrimPrefix(v.Version, "v"), ".", 3)
	if len(fields) < 2 || fields[0] != "2" {
		return -1, nil
	}
	return strconv.Atoi(fields[1])
}

func askPlugins(ctx context.Context, conn *grpc.ClientConn) (map[string]*introspection.Plugin, error) {
	ctx, cancel := context.WithTimeout(ctx, doctorTimeout)
	defer cancel()
	all, err := introspection.NewIntrospectionClient(conn).Plugins(ctx, &introspection.PluginsRequest{})
	if err != nil {
		return nil, err
	}
	plugins := map[string]*introspection.Plugin{}
	for _, p := range all.Plugins {
		plugins[p.Type+"/"+p.ID] = p
	}
	return plugins, nil
}

// askDaemon asks for a snapshot that does not exist: only a working daemon gives the right answer.
func askDaemon(ctx context.Context, address string) error {
	conn, err := dialUnix(address)
	if err != nil {
		return err
	}
	defer conn.Close()
	ctx, cancel := context.WithTimeout(ctx, doctorTimeout)
	defer cancel()
	_, err = snapshots.NewSnapshotsClient(conn).Stat(ctx, &snapshots.StatSnapshotRequest{Key: "daxfs-doctor"})
	if grpcstatus.Code(err) == codes.NotFound {
		return nil
	}
	return fmt.Errorf("asked for a snapshot that does not exist, expected NotFound, found: %w", err)
}

// dumped is the part of containerd's configuration that doctor needs.
type dumped struct {
	Imports []string
	Proxy   map[string]struct{ Type, Address string } `toml:"proxy_plugins"`
	Plugins struct {
		Transfer struct {
			Unpack []unpackEntry `toml:"unpack_config"`
		} `toml:"io.containerd.transfer.v1.local"`
		Diff struct {
			Default []string
		} `toml:"io.containerd.service.v1.diff-service"`
		Images struct {
			Snapshotter string
		} `toml:"io.containerd.cri.v1.images"`
		Runtime struct {
			Containerd struct {
				Runtimes map[string]struct{ Snapshotter string }
			}
		} `toml:"io.containerd.cri.v1.runtime"`
	}
}

type unpackEntry struct{ Platform, Snapshotter, Differ string }

// unpack returns the entries of unpack_config, or containerd's built-in default.
func (d *dumped) unpack() []unpackEntry {
	if d.Plugins.Transfer.Unpack == nil {
		return []unpackEntry{{"linux", "overlayfs", "walking"}}
	}
	return d.Plugins.Transfer.Unpack
}

// criSnapshotters returns the snapshotters in the configuration of CRI, by their keys.
func (d *dumped) criSnapshotters() map[string]string {
	all := map[string]string{}
	if s := d.Plugins.Images.Snapshotter; s != "" {
		all["images"] = s
	}
	for name, r := range d.Plugins.Runtime.Containerd.Runtimes {
		if r.Snapshotter != "" {
			all["runtime "+name] = r.Snapshotter
		}
	}
	return all
}

// dumpConfig reads containerd's configuration through containerd, which merges imported files and
// translates older configuration versions.
func dumpConfig(ctx context.Context, file string) (*dumped, error) {
	ctx, cancel := context.WithTimeout(ctx, doctorTimeout)
	defer cancel()
	out, err := exec.CommandContext(ctx, "containerd", "--config", file, "config", "dump").Output()
	var exit *exec.ExitError
	if errors.As(err, &exit) {
		return nil,
			fmt.Errorf("containerd --config %s config dump: %w: %s", file, err, strings.TrimSpace(string(exit.Stderr)))
	}
	if err != nil {
		return nil, err
	}
	d := &dumped{}
	return d, toml.Unmarshal(out, d)
}
