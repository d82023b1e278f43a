package daemon

import (
	"bytes"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/daxfs/daxfs-snapshotter/internal/slow"
	"github.com/daxfs/daxfs-snapshotter/internal/treetest"
)

// settleTimes sets fixed times on everything that changed since start, so that the scenes are equal.
func settleTimes(t *testing.T, start time.Time, scenes ...*scene) {
	t.Helper()
	set := []unix.Timespec{{Sec: 1}, {Sec: 1_500_000_000}}
	for _, s := range scenes {
		for _, p := range places {
			if isView(p) {
				continue
			}
			err := filepath.WalkDir(s.roots[p], func(path string, d fs.DirEntry, err error) error {
				if err != nil {
					return err
				}
				info, err := d.Info()
				if err != nil || path != s.roots[p] && info.ModTime().Before(start) {
					return err
				}
				return unix.UtimesNanoAt(unix.AT_FDCWD, path, set, unix.AT_SYMLINK_NOFOLLOW)
			})
			if err != nil {
				t.Fatal(err)
			}
		}
	}
}

// run runs a program in a directory and returns what it prints.
func run(t *testing.T, dir, program string, args ...string) string {
	t.Helper()
	cmd := exec.Command(program, args...)
	cmd.Dir, cmd.Env = dir, append(os.Environ(), "LC_ALL=C")
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("%s %q: %v\n%s", program, args, err, &stderr)
	}
	return string(out)
}

// tools return a program's view of a directory, without what differs between any two file systems:
// inode numbers and sizes of directories.
var tools = []struct {
	name string
	see  func(t *testing.T, dir string) string
}{
	{"tar", func(t *testing.T, dir string) string {
		return run(t, dir, "tar", append([]string{
			"--create", "--one-file-system", "--sort=name", "--format=posix", "--pax-option=delete=atime,delete=ctime",
			"--numeric-owner", "--acls", "--xattrs", "--xattrs-include=*", "--file=-",
		}, names(t, dir)...)...)
	}},
	{"du -x", func(t *testing.T, dir string) string {
		groups := linked(t, dir)
		return sorted(lines(run(t, dir, "du", "-xa", "--apparent-size", "--block-size=1"), func(line string) string {
			size, path, _ := strings.Cut(line, "\t")
			if info, err := os.Lstat(filepath.Join(dir, path)); err != nil || info.IsDir() {
				size = "" // depends on the file system
			}
			if first, ok := groups[path]; ok { // du counts the name that it meets first
				path = first
			}
			return size + " " + path
		}))
	}},
	{"find -xdev", func(t *testing.T, dir string) string {
		return sorted(run(t, dir, "find", ".", "-xdev", "-mindepth", "1",
			"(", "-type", "d", "-printf", "%p %y %m %U %G %T@\n", "-o", "-printf",
			"%p %y %m %U %G %s %n %l %T@\n", ")"))
	}},
	{"find -samefile", func(t *testing.T, dir string) string {
		var out string
		for _, name := range slices.Sorted(maps.Keys(linked(t, dir))) {
			out += name + ":\n" + sorted(run(t, dir, "find", ".", "-xdev", "-samefile", name)) + "\n"
		}
		return out
	}},
	{"ls -i", func(t *testing.T, dir string) string {
		seen := map[string]int{}
		return lines(run(t, dir, "ls", "-1iRA"), func(line string) string {
			ino, name, ok := strings.Cut(strings.TrimLeft(line, " "), " ")
			if !ok || strings.HasSuffix(line, ":") {
				return line
			}
			if seen[ino] == 0 {
				seen[ino] = len(seen) + 1
			}
			return fmt.Sprint(seen[ino], " ", name)
		})
	}},
	{"ls -l", func(t *testing.T, dir string) string {
		return lines(run(t, dir, "ls", "-lRAn", "--full-time"), func(line string) string {
			f := strings.Fields(line) // columns are as wide as the widest size
			if strings.HasPrefix(line, "d") {
				f[1], f[4] = "", "" // links and size of a directory
			} else if strings.HasPrefix(line, "total ") {
				return ""
			}
			return strings.Join(f, " ")
		})
	}},
	{"cp -ax", func(t *testing.T, dir string) string {
		to := t.TempDir()
		run(t, dir, "cp", append(append([]string{"-ax"}, names(t, dir)...), to)...)
		return treeText(t, to)
	}},
	{"rsync -x", func(t *testing.T, dir string) string {
		if _, err := exec.LookPath("rsync"); err != nil {
			t.Skip("RSYNC IS NOT INSTALLED, nothing shows that it sees what it sees on overlayfs: ", err)
		}
		to := t.TempDir()
		run(t, dir, "rsync", "-aHAXx", "--numeric-ids", "--exclude=white", dir+"/", to+"/")
		if again := run(t, dir, "rsync", "-aHAXxnic", "--numeric-ids", "--exclude=white", dir+"/",
			to+"/"); again != "" {
			t.Errorf("a second rsync would do again:\n%s", again)
		}
		return treeText(t, to)
	}},
	{"readdir", func(t *testing.T, dir string) string { // directories have the same inode numbers as stat(2)
		var out []string
		path := "."
		for line := range strings.Lines(run(t, dir, "ls", "-1iRA")) {
			line = strings.TrimSpace(line)
			ino, name, ok := strings.Cut(line, " ")
			if !ok {
				path = strings.TrimSuffix(line, ":")
				continue
			}
			var st unix.Stat_t
			if err := unix.Lstat(filepath.Join(dir, path, name), &st); err != nil || fmt.Sprint(st.Ino) != ino {
				out = append(out, filepath.Join(path, name))
			}
		}
		return strings.Join(out, "\n")
	}},
	{"devices", func(t *testing.T, dir string) string { // one file system has one device number
		devs := map[uint64]bool{}
		err := filepath.WalkDir(dir, func(path string, _ fs.DirEntry, err error) error {
			var st unix.Stat_t
			if err == nil {
				err = unix.Lstat(path, &st)
			}
			devs[st.Dev] = true
			return err
		})
		if err != nil {
			t.Fatal(err)
		}
		return fmt.Sprint(len(devs), " device numbers")
	}},
}

// names lists a directory, without the directory itself, whose attributes come from the upper directory.
func names(t *testing.T, dir string) []string {
	t.Helper()
	entries, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	var all []string
	for _, e := range entries {
		all = append(all, e.Name())
	}
	return all
}

// linked maps each name of a file with several names to the first of them.
func linked(t *testing.T, dir string) map[string]string {
	t.Helper()
	tree, err := treetest.FromPath(dir)
	if err != nil {
		t.Fatal(err)
	}
	groups := map[string]string{}
	for _, e := range tree {
		if e.Same != "" {
			groups["./"+e.Path], groups["./"+e.Same] = "./"+e.Same, "./"+e.Same
		}
	}
	return groups
}

// lines applies change to each line of a text.
func lines(text string, change func(string) string) string {
	var b strings.Builder
	for line := range strings.Lines(text) {
		fmt.Fprintln(&b, change(strings.TrimSuffix(line, "\n")))
	}
	return b.String()
}

func sorted(text string) string {
	return strings.Join(slices.Sorted(strings.Lines(text)), "")
}

func treeText(t *testing.T, dir string) string {
	t.Helper()
	tree, err := treetest.FromPath(dir)
	if err != nil {
		t.Fatal(err)
	}
	var b strings.Builder
	for _, e := range tree {
		if e.Path != "." {
			fmt.Fprintln(&b, e)
		}
	}
	return b.String()
}

// compareTools runs each program in each place of both scenes.
func compareTools(t *testing.T, ours, plain *scene) {
	t.Helper()
	for _, tool := range tools {
		t.Run(tool.name, func(t *testing.T) {
			if ours.noACL && slices.Contains([]string{"tar", "cp -ax", "rsync -x"}, tool.name) {
				t.Skip("NO ACLS: this kernel shows none of an image, and this program copies them")
			}
			for _, p := range places {
				want, got := tool.see(t, plain.roots[p]), tool.see(t, ours.roots[p])
				if want == "" && tool.name != "readdir" {
					t.Errorf("%s: nothing was seen", p)
				}
				if tool.name == "tar" && want != got {
					want, got = listing(t, want), listing(t, got)
				}
				same(t, p, strings.Split(want, "\n"), strings.Split(got, "\n"))
			}
		})
	}
}

func listing(t *testing.T, tar string) string {
	t.Helper()
	file := filepath.Join(t.TempDir(), "tar")
	if err := os.WriteFile(file, []byte(tar), 0o600); err != nil {
		t.Fatal(err)
	}
	return run(t, "/", "tar", "-tvvf", file, "--xattrs", "--acls", "--full-time") + fmt.Sprintln(len(tar), "bytes")
}

// TestApartTools compares unchanged containers; TestApart compares changed ones.
func TestApartTools(t *testing.T) {
	slow.Skip(t, "runs many tools over whole trees")
	for _, f := range fewFlavours(3) {
		t.Run(f.name, func(t *testing.T) {
			ours, plain := twoScenes(t, f, []string{"a", "b"})
			settleTimes(t, time.Now().Add(-time.Minute), ours, plain)
			compareTools(t, ours, plain)
		})
	}
}
