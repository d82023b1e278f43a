package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"text/tabwriter"

	"github.com/urfave/cli/v2"
	"golang.org/x/sys/unix"

	"github.com/daxfs/daxfs-snapshotter/mount"
	"github.com/daxfs/daxfs-snapshotter/mount/drivers"
	erofsdriver "github.com/daxfs/daxfs-snapshotter/mount/erofs"
	"github.com/daxfs/daxfs-snapshotter/pool/region"
)

func init() { register(80, doctorCommand) }

func doctorCommand(e *env) *cli.Command {
	return &cli.Command{
		Name:      "doctor",
		Usage:     "show what this machine can share, and what is missing",
		ArgsUsage: "[PATH...]",
		Description: `
PATH is an image, a pool or a directory for one. Without PATH, doctor checks all memory of the
machine that could hold a pool. It tries the drivers in the order of auto; * marks the one that auto
takes. It also checks containerd, its configuration and the daemon, and prints what that
configuration lacks. The last line is the verdict. The exit status is 3 if no driver works for some
memory, if containerd and the daemon do not fit together, or if one of them does not run.

With --fix, doctor writes the missing part of containerd's configuration to a file of its own in a
directory that containerd imports, after asking. It keeps a copy of a file that it replaces. If
containerd does not accept the result, doctor takes the file back.

Examples:
   daxfs doctor
   daxfs doctor --fix
   daxfs doctor --json /var/lib/daxfs-snapshotter | jq '.memory[0].drivers[] | select(.picked) | .driver'`,
		Flags: []cli.Flag{
			&cli.BoolFlag{Name: "json", Usage: "write JSON"},
			&cli.BoolFlag{
				Name:  "fix",
				Usage: "add the missing part of containerd's configuration, after asking",
			},
			&cli.BoolFlag{Name: "yes", Usage: "with --fix, do not ask"},
			&cli.StringFlag{
				Name: "containerd", Value: "/run/containerd/containerd.sock",
				Usage: "also check the containerd at `SOCKET`; empty: none",
			},
			&cli.StringFlag{
				Name: "containerd-config", Value: "/etc/containerd/config.toml",
				Usage: "its configuration `FILE`",
			},
			&cli.StringFlag{
				Name: "config", Value: "/etc/daxfs-snapshotter/config.toml",
				Usage: "the daemon's configuration `FILE`; if there is none, its defaults",
			},
			&cli.StringFlag{Name: "snapshotter", Value: "daxfs", Usage: "the `NAME` of the daemon in containerd"},
		},
		Action: e.doctor,
	}
}

// report is the output of doctor --json. Sizes are bytes.
type report struct {
	Kernel  string         `json:"kernel"`
	Root    bool           `json:"root"`
	Support []support      `json:"support"`
	Memory  []memoryReport `json:"memory"`
	// Containerd is missing if doctor did not ask containerd.
	Containerd *containerdReport `json:"containerd,omitempty"`
	// Daemon is missing if doctor asked neither containerd nor the daemon.
	Daemon *daemonReport `json:"daemon,omitempty"`
	// Wrong names the failed checks; empty if there are none.
	Wrong []string `json:"wrong"`
}

func (r *report) judge() {
	r.Wrong = []string{}
	for _, m := range r.Memory {
		if !slices.ContainsFunc(m.Drivers, func(d mount.Explanation) bool { return d.Usable }) {
			r.Wrong = append(r.Wrong, strings.TrimSpace(m.Info.Kind+" "+m.Info.Path))
		}
	}
	var checks []support
	if r.Containerd != nil {
		checks = append(checks, r.Containerd.Checks...)
	}
	if r.Daemon != nil {
		checks = append(checks, r.Daemon.Checks...)
	}
	for _, s := range checks {
		if !s.OK {
			r.Wrong = append(r.Wrong, s.Name)
		}
	}
}

// verdict sums up the report in one line.
func (r *report) verdict() string {
	switch len(r.Wrong) {
	case 0:
		return "verdict: nothing is wrong"
	case 1:
		return "verdict: 1 thing is wrong: " + r.Wrong[0]
	}
	return fmt.Sprintf("verdict: %d things are wrong: %s", len(r.Wrong), strings.Join(r.Wrong, "; "))
}

type support struct {
	Name string `json:"name"`
	OK   bool   `json:"ok"`
	Note string `json:"note,omitempty"`
}

type memoryReport struct {
	memory
	// Limit names what containers cannot do with the picked driver, although other drivers allow it.
	Limit   string              `json:"limit,omitempty"`
	Drivers []mount.Explanation `json:"drivers"`
}

const defaultRoot = "/var/lib/daxfs-snapshotter"

func (e *env) doctor(c *cli.Context) error {
	rep := report{Kernel: kernelRelease(), Root: os.Geteuid() == 0, Support: supported(), Memory: []memoryReport{}}
	places, err := memoryOf(c.Args().Slice())
	if err != nil {
		return err
	}
	for _, m := range places {
		r := memoryReport{memory: m, Drivers: explain(c.Context, m.Info)}
		for _, d := range r.Drivers {
			if d.Picked && strings.HasPrefix(d.Driver, "erofs") {
				r.Limit = aclLimit
			}
		}
		rep.Memory = append(rep.Memory, r)
	}
	files := containerdFiles{
		socket: c.String("containerd"), config: c.String("containerd-config"), daemonConfig: c.String("config"),
		name: c.String("snapshotter"),
	}
	// A machine without containerd and daemon is fine.
	if files.socket != "" &&
		(c.IsSet("containerd") || exists(files.socket) || exists(files.config) || exists(files.daemonConfig)) {
		rep.Containerd = checkContainerd(c.Context, files)
		rep.Daemon = checkDaemon(c.Context, files, rep.Containerd.process)
	}
	rep.judge()
	if c.Bool("json") {
		err = writeJSON(e.stdout, rep)
	} else {
		err = e.show(rep)
	}
	if err == nil && c.Bool("fix") && rep.Containerd != nil {
		err = e.fix(c, rep.Containerd)
	}
	if err == nil && !c.Bool("json") {
		_, err = fmt.Fprintln(e.stdout, "\n"+rep.verdict())
	}
	if err == nil && len(rep.Wrong) > 0 {
		return errFindings
	}
	return err
}

// aclLimit describes what the kernel cannot do for containers on EROFS.
const aclLimit = "setfacl fails on files of the image that a container has not changed yet, because EROFS cannot " +
	"set ACLs; touch them first. The fuse driver does not have that limit"

func exists(path string) bool {
	_, err := os.Stat(path)
	return err == nil
}

func memoryOf(paths []string) ([]memory, error) {
	if len(paths) == 0 {
		return findMemory("/", defaultRoot)
	}
	var out []memory
	for _, p := range paths {
		p, err := filepath.Abs(p)
		if err != nil {
			return nil, err
		}
		st, err := os.Stat(p)
		if err != nil {
			return nil, err
		}
		if st.IsDir() {
			info, err := fileRegion(p)
			if err != nil {
				return nil, err
			}
			out = append(out, memory{Info: info, Bytes: free(p)})
			continue
		}
		info, err := describe("/", p)
		if err != nil {
			return nil, err
		}
		out = append(out, memory{Info: info, Bytes: uint64(st.Size())})
	}
	return out, nil
}

// explain asks all drivers about a region. For a directory it makes a temporary pool file there.
func explain(ctx context.Context, info region.Info) []mount.Explanation {
	return explainWith(ctx, drivers.All(), info)
}

// explainWith is explain with a given list of drivers.
func explainWith(ctx context.Context, list []mount.Driver, info region.Info) []mount.Explanation {
	st, err := os.Stat(info.Path)
	if err != nil || !st.IsDir() {
		return mount.Explain(ctx, list, info)
	}
	dir := info.Path
	f, err := os.CreateTemp(dir, ".daxfs-doctor-*")
	if err == nil {
		defer os.Remove(f.Name())
		f.Close()
		info.Path = f.Name()
	}
	out := mount.Explain(ctx, list, info)
	for i := range out {
		out[i].Why = strings.ReplaceAll(out[i].Why, info.Path, dir)
		// Without permission to write there, keep the answer; root could use the driver.
		var pe *fs.PathError
		if errors.As(err, &pe) && !errors.Is(err, fs.ErrPermission) {
			out[i].Usable, out[i].Picked = false, false
			out[i].Why = fmt.Sprintf("no pool can be made in %q: %v", dir, pe.Err)
		}
	}
	return out
}

func kernelRelease() string {
	var u unix.Utsname
	if err := unix.Uname(&u); err != nil {
		return err.Error()
	}
	return unix.ByteSliceToString(u.Release[:])
}

// supported lists what the kernel and the system support, without changing anything.
func supported() []support {
	var out []support
	known, _ := os.ReadFile("/proc/filesystems")
	for _, fs := range []struct{ name, note string }{
		{"erofs", "the main driver; modprobe erofs"},
		{"overlay", "needed by every container; modprobe overlay"},
		{"fuse", "the fallback driver; modprobe fuse"},
		{"daxfs", "out of tree, for memory without a block device; modprobe daxfs"},
	} {
		ok := strings.Contains(strings.ReplaceAll(string(known), "\n", "\t"), "\t"+fs.name+"\t")
		out = append(out, need("file system "+fs.name, ok, fs.note))
	}
	for _, dev := range []struct{ path, note string }{
		{"/dev/loop-control", "for pools on tmpfs; modprobe loop"},
		{"/dev/fuse", "for the fuse driver; modprobe fuse"},
	} {
		f, err := os.OpenFile(dev.path, os.O_RDWR, 0) // the node may exist without its driver
		if err == nil {
			f.Close()
		}
		out = append(out, need(dev.path, err == nil, dev.note))
	}
	bug := erofsdriver.Bug()
	return append(out,
		need("file-backed erofs without "+erofsdriver.CVE, bug == "", bug+"; a loop device is used instead"))
}

func need(name string, ok bool, note string) support {
	if ok {
		note = ""
	}
	return support{name, ok, note}
}

func (e *env) show(r report) error {
	w := tabwriter.NewWriter(e.stdout, 0, 8, 2, ' ', 0)
	fmt.Fprintf(w, "kernel %s\n", r.Kernel)
	if !r.Root {
		fmt.Fprintln(w, "not root: what needs privilege is shown as missing")
	}
	showSupport(w, r.Support)
	for _, m := range r.Memory {
		fmt.Fprintf(w, "\n%s %s", m.Info.Kind, m.Info.Path)
		if m.Bytes > 0 {
			fmt.Fprintf(w, ", %s", human(int64(m.Bytes)))
		}
		if m.Note != "" {
			fmt.Fprintf(w, ", %s", m.Note)
		}
		fmt.Fprintf(w, "\n  %s\n", properties(m.Info))
		for _, d := range m.Drivers {
			mark, text := "  ", d.Sharing
			if d.Picked {
				mark = "* "
			}
			if !d.Usable {
				text = "no: " + d.Why
			}
			fmt.Fprintf(w, "%s%s\t%s\n", mark, d.Driver, text)
		}
		if m.Limit != "" {
			fmt.Fprintf(w, "  limit: %s\n", m.Limit)
		}
	}
	if r.Containerd != nil {
		fmt.Fprintf(w, "\ncontainerd %s at %s\n", r.Containerd.Version, r.Containerd.Address)
		showSupport(w, r.Containerd.Checks)
	}
	if r.Daemon != nil {
		fmt.Fprintf(w, "\ndaxfs-snapshotter\n")
		showSupport(w, r.Daemon.Checks)
	}
	if err := w.Flush(); err != nil {
		return err
	}
	if r.Containerd != nil && r.Containerd.Snippet != "" {
		_, err := fmt.Fprintf(e.stdout, "\nAdd this to containerd's configuration and restart containerd:\n\n%s",
			r.Containerd.Snippet)
		return err
	}
	return nil
}

func properties(i region.Info) string {
	device := "no block device"
	if i.BlockDevice != "" && i.DAX {
		device = "block device with DAX"
	} else if i.BlockDevice != "" {
		device = "block device without DAX"
	}
	phys := "physical address unknown"
	if i.HasPhys {
		phys = fmt.Sprintf("physical address %#x", i.Phys)
	}
	survives := map[region.Persistence]string{
		region.PersistsNothing: "ends with its last user",
		region.PersistsProcess: "survives its processes, not a reboot",
		region.PersistsReboot:  "survives a reboot",
	}[i.Persistent]
	return strings.Join([]string{device, phys, survives}, "; ")
}

func showSupport(w io.Writer, rows []support) {
	for _, s := range rows {
		mark := "yes"
		if !s.OK {
			mark = "no"
		}
		fmt.Fprintf(w, "%s\t%s\t%s\n", s.Name, mark, s.Note)
	}
}
