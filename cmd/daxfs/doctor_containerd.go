package main

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
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
	"github.com/pelletier/go-toml/v2"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	grpcstatus "google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/emptypb"

	"github.com/daxfs/daxfs-snapshotter/config"
)

// containerdReport is what doctor finds on containerd's side.
type containerdReport struct {
	Address string    `json:"address"`
	Version string    `json:"version,omitempty"`
	Checks  []support `json:"checks"`
	// Snippet is what to add to containerd's configuration; empty if nothing is missing there.
	Snippet string `json:"snippet,omitempty"`
}

// failed tells whether any check failed.
func (r *containerdReport) failed() bool {
	return slices.ContainsFunc(r.Checks, func(s support) bool { return !s.OK })
}

// containerdFiles says where the parties keep their configuration.
type containerdFiles struct {
	socket, config, daemonConfig string
	name                         string // of the snapshotter in containerd
}

// doctorTimeout bounds each question to containerd and to the daemon.
const doctorTimeout = 5 * time.Second

// checkContainerd asks containerd, its configuration file and the daemon whether they fit together.
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
	ctx = namespaces.WithNamespace(ctx, "default") // any: nothing is looked up in it
	minor, err := r.askVersion(ctx, conn)
	if !add("containerd answers", err == nil, "%v; is it running, and are you root?", err) {
		return r
	}
	add("containerd is 2.0 or later", minor >= 0, "found %q, which has no transfer service", r.Version)

	before := len(r.Checks)
	plugins, err := askPlugins(ctx, conn)
	if !add("plugin list", err == nil, "%v", err) {
		return r
	}
	sn, ok := plugins["io.containerd.snapshotter.v1/"+files.name]
	if add("snapshotter "+files.name+" registered", ok, "no [proxy_plugins.%s] in containerd's configuration, or containerd was not restarted since", files.name) {
		r.checkPlugin(sn, add)
	}
	r.checkUnpack(ctx, files, plugins, add)
	if slices.ContainsFunc(r.Checks[before:], func(s support) bool { return !s.OK }) {
		r.Snippet = config.ContainerdSnippet(minor)
	}
	r.checkDaemon(ctx, files, sn, add)
	return r
}

type adder func(name string, ok bool, format string, args ...any) bool

// checkPlugin looks at what containerd was told about the snapshotter.
func (r *containerdReport) checkPlugin(p *introspection.Plugin, add adder) {
	add("export root", p.Exports["root"] != "", "without it kubelet measures a directory that does not exist; expected the daemon's root")
	add("export enable_remote_snapshot_annotations", p.Exports["enable_remote_snapshot_annotations"] == "true",
		"found %q, expected \"true\": without it the top layer of an image is known only after a pause", p.Exports["enable_remote_snapshot_annotations"])
	add("capability only-remap-ids", slices.Contains(p.Capabilities, "only-remap-ids"),
		"without it a container with a user namespace gets a copy of the whole image")
}

// checkUnpack looks at the pairs of snapshotter and differ, which only the configuration tells.
func (r *containerdReport) checkUnpack(ctx context.Context, files containerdFiles, plugins map[string]*introspection.Plugin, add adder) {
	pairs, err := unpackConfig(ctx, files.config)
	if err != nil {
		add("unpack_config", false, "can not read containerd's configuration: %v", err)
		return
	}
	differ, ok := pairs[files.name]
	add("unpack_config lists "+files.name, ok, "without it every pull ends with \"no unpack platforms defined\"")
	if ok && differ != "walking" {
		add("differ "+differ+" registered", plugins["io.containerd.differ.v1/"+differ] != nil, "no [proxy_plugins.%s] in containerd's configuration", differ)
	}
	_, ok = pairs["overlayfs"]
	add("unpack_config lists overlayfs", ok, "a list of one's own replaces the built-in one: pulls for overlayfs end with \"no unpack platforms defined\"")
}

// checkDaemon looks at the socket that containerd will call, and at the daemon behind it.
func (r *containerdReport) checkDaemon(ctx context.Context, files containerdFiles, p *introspection.Plugin, add adder) {
	if p == nil {
		return
	}
	address := strings.TrimPrefix(p.Exports["address"], "unix://")
	st, err := os.Stat(address)
	if !add("socket "+address, err == nil, "%v; start daxfs-snapshotter, or correct the address", err) {
		return
	}
	add("socket is root's alone", st.Mode().Perm()&0o077 == 0, "its mode is %04o, expected 0600: whoever can connect has root's power", st.Mode().Perm())
	err = askDaemon(ctx, address)
	if !add("daxfs-snapshotter answers", err == nil, "%v", err) {
		return
	}
	c, err := config.Load(files.daemonConfig)
	if errors.Is(err, fs.ErrNotExist) {
		c, err = config.Default(), nil
	}
	if !add("configuration "+files.daemonConfig, err == nil, "%v", err) {
		return
	}
	add("address agrees", c.Address == address, "%s says %q, containerd says %q", files.daemonConfig, c.Address, address)
	add("root agrees", c.Root == p.Exports["root"], "%s says %q, containerd's export says %q", files.daemonConfig, c.Root, p.Exports["root"])
	has := slices.Contains(p.Capabilities, "remap-ids")
	add("remap-ids agrees", has == c.Mount.RemapIDs, "%s has mount.remap_ids = %v, containerd has the capability: %v", files.daemonConfig, c.Mount.RemapIDs, has)
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

// askPlugins returns containerd's plugins by type and id.
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

// askDaemon asks for a snapshot that does not exist: the right answer comes from a working daemon only.
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

// unpackConfig returns the differ of each snapshotter. containerd itself puts its files together: they may import others,
// and a version older than its own is translated.
func unpackConfig(ctx context.Context, file string) (map[string]string, error) {
	ctx, cancel := context.WithTimeout(ctx, doctorTimeout)
	defer cancel()
	out, err := exec.CommandContext(ctx, "containerd", "--config", file, "config", "dump").Output()
	var exit *exec.ExitError
	if errors.As(err, &exit) {
		return nil, fmt.Errorf("containerd --config %s config dump: %w: %s", file, err, strings.TrimSpace(string(exit.Stderr)))
	}
	if err != nil {
		return nil, err
	}
	var parsed struct {
		Plugins map[string]struct {
			Unpack []struct{ Snapshotter, Differ string } `toml:"unpack_config"`
		}
	}
	if err := toml.Unmarshal(out, &parsed); err != nil {
		return nil, err
	}
	pairs := map[string]string{}
	if unpack := parsed.Plugins["io.containerd.transfer.v1.local"].Unpack; unpack != nil {
		for _, u := range unpack {
			pairs[u.Snapshotter] = u.Differ
		}
		return pairs, nil
	}
	return map[string]string{"overlayfs": "walking"}, nil // what is built in
}
