package main

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// memoryGroup is a control group. It counts page cache that its processes touch first.
type memoryGroup struct {
	dir   string
	field string // of memory.stat
}

// newMemoryGroup makes an empty group, for version 1 or 2 of control groups. The caller closes it.
func newMemoryGroup() (memoryGroup, error) {
	g := memoryGroup{dir: "/sys/fs/cgroup/memory", field: "total_cache"}
	if _, err := os.Stat(filepath.Join(g.dir, "memory.stat")); errors.Is(err, fs.ErrNotExist) {
		g = memoryGroup{dir: "/sys/fs/cgroup", field: "file"}
		control := filepath.Join(g.dir, "cgroup.subtree_control")
		if err := os.WriteFile(control, []byte("+memory"), 0o644); err != nil {
			return g,
				fmt.Errorf("page cache is counted by memory control groups, which this machine has not got: %w", err)
		}
	}
	var err error
	g.dir, err = os.MkdirTemp(g.dir, "daxfs-bench-")
	return g, err
}

func (g memoryGroup) cached() (int64, error) {
	path := filepath.Join(g.dir, "memory.stat")
	raw, err := os.ReadFile(path)
	if err != nil {
		return 0, err
	}
	for line := range strings.Lines(string(raw)) {
		if name, value, _ := strings.Cut(strings.TrimSpace(line), " "); name == g.field {
			return strconv.ParseInt(value, 10, 64)
		}
	}
	return 0, fmt.Errorf("%q has no field %q", path, g.field)
}

// Close removes the group after its processes have ended. The kernel may notice their end a moment later.
func (g memoryGroup) Close() error {
	var err error
	for range 100 {
		if err = unix.Rmdir(g.dir); !errors.Is(err, unix.EBUSY) {
			break
		}
		time.Sleep(20 * time.Millisecond)
	}
	return err
}

// readerCommand makes this program a reader of trees.
const readerCommand = "read-tree"

// read reads all regular files below dir in a process of the group, and compares them with want.
func (g memoryGroup) read(ctx context.Context, dir string, want contents) error {
	digests := map[string]string{}
	for name, sum := range want {
		digests[name] = fmt.Sprintf("%x", sum)
	}
	raw, err := json.Marshal(digests)
	if err != nil {
		return err
	}
	cmd := exec.CommandContext(ctx, "/proc/self/exe", readerCommand, g.dir, dir)
	cmd.Stdin = bytes.NewReader(raw) // a file would add page cache to the group
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("read %q: %w\n%s", dir, err, out)
	}
	return nil
}

// exitIfReader runs the process of read and exits; in any other process it does nothing.
func exitIfReader() {
	if len(os.Args) != 4 || os.Args[1] != readerCommand {
		return
	}
	if err := readTree(os.Args[2], os.Args[3], os.Stdin); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	os.Exit(0)
}

// readTree is the main function of read's process.
func readTree(group, dir string, stdin io.Reader) error {
	if err := os.WriteFile(filepath.Join(group, "cgroup.procs"), []byte("0"), 0o644); err != nil {
		return err
	}
	want := map[string]string{}
	if err := json.NewDecoder(stdin).Decode(&want); err != nil {
		return err
	}
	err := filepath.WalkDir(dir, func(p string, d fs.DirEntry, err error) error {
		if err != nil || !d.Type().IsRegular() {
			return err
		}
		name, err := filepath.Rel(dir, p)
		if err != nil {
			return err
		}
		sum, err := digestOf(p)
		if err != nil {
			return err
		}
		if sum != want[name] {
			return fmt.Errorf("file %q has digest %q, expected %q", name, sum, want[name])
		}
		delete(want, name)
		return nil
	})
	if len(want) > 0 {
		name := slices.Min(slices.Collect(maps.Keys(want)))
		err = errors.Join(err, fmt.Errorf("%d files are missing, file %q first", len(want), name))
	}
	return err
}

func digestOf(path string) (string, error) {
	f, err := os.Open(path)
	if err != nil {
		return "", err
	}
	defer f.Close()
	h := sha256.New()
	if _, err := io.Copy(h, f); err != nil {
		return "", err
	}
	return fmt.Sprintf("%x", h.Sum(nil)), nil
}
