package stack

import (
	"bytes"
	"debug/buildinfo"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"
)

// Versions of the programs. After raising one, run the tests.
const (
	containerdVersion = "v2.4.2"
	cniVersion        = "v1.9.1"
	nerdctlVersion    = "v2.2.1"

	containerdModule = "github.com/containerd/containerd/v2"
	cniModule        = "github.com/containernetworking/plugins"
	nerdctlModule    = "github.com/containerd/nerdctl/v2"
)

// program is a program that "go install" can build. An empty pkg is the module's root.
type program struct {
	module, version, pkg string
}

func (p program) path() string { return path.Join(p.module, p.pkg) }

var programs = []program{
	{containerdModule, containerdVersion, "cmd/containerd"},
	{containerdModule, containerdVersion, "cmd/containerd-shim-runc-v2"},
	{containerdModule, containerdVersion, "cmd/ctr"},
	{cniModule, cniVersion, "plugins/main/bridge"},
	{cniModule, cniVersion, "plugins/main/loopback"},
	{cniModule, cniVersion, "plugins/ipam/host-local"},
	{cniModule, cniVersion, "plugins/meta/portmap"},
	{cniModule, cniVersion, "plugins/meta/tuning"},
	{cniModule, cniVersion, "plugins/meta/firewall"},
}

// CacheDir returns the directory of the test cache; see the package comment.
func CacheDir() (string, error) {
	if dir := os.Getenv("DAXFS_TEST_CACHE"); dir != "" {
		return filepath.Abs(dir)
	}
	dir, err := os.UserCacheDir()
	if err != nil {
		return "", fmt.Errorf("no cache directory, set DAXFS_TEST_CACHE: %w", err)
	}
	return filepath.Join(dir, "daxfs-test"), nil
}

// Program returns the path of a program in the cache: one of this tree, containerd's or nerdctl. Main has built it.
func Program(name string) (string, error) {
	cache, err := CacheDir()
	if err != nil {
		return "", err
	}
	t := tools{bin: filepath.Join(cache, "bin"), own: filepath.Join(cache, "own")}
	path := t.path(name)
	if path == name {
		return "", fmt.Errorf("no program %q below %q", name, cache)
	}
	return path, nil
}

// Build builds something for some of the tests in the cache, while the network is available.
type Build func(cache string) error

type tools struct {
	cache string // CacheDir
	bin   string // containerd's programs and others; first in every PATH
	own   string // daxfs and daxfs-snapshotter of this tree
}

func (t tools) path(name string) string {
	for _, dir := range []string{t.own, t.bin} {
		if p := filepath.Join(dir, name); exists(p) {
			return p
		}
	}
	return name
}

// buildTools builds what the cache lacks, and the programs of this tree. It needs the network only the first time.
func buildTools(more ...Build) (tools, error) {
	cache, err := CacheDir()
	if err != nil {
		return tools{}, err
	}
	t := tools{cache: cache, bin: filepath.Join(cache, "bin"), own: filepath.Join(cache, "own")}
	for _, dir := range []string{t.bin, t.own} {
		if err := os.MkdirAll(dir, 0o755); err != nil {
			return tools{}, err
		}
	}
	// Two test binaries may start at once; the second waits and finds everything built.
	unlock, err := lockFile(filepath.Join(cache, "build.lock"))
	if err != nil {
		return tools{}, err
	}
	defer unlock()
	for _, p := range programs {
		if err := p.install(t.bin); err != nil {
			return tools{}, err
		}
	}
	if err := installNerdctl(t.bin); err != nil {
		return tools{}, err
	}
	for _, build := range more {
		if err := build(cache); err != nil {
			return tools{}, err
		}
	}
	if err := buildOwn(t.own); err != nil {
		return tools{}, err
	}
	return t, nil
}

// install builds the program in bin unless that version exists. env is added to the environment of go.
func (p program) install(bin string, env ...string) error {
	info, err := buildinfo.ReadFile(filepath.Join(bin, path.Base(p.path())))
	if err == nil && info.Main.Path == p.module && info.Main.Version == p.version {
		return nil
	}
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("read the version of %q: %w", p.path(), err)
	}
	cmd := goCommand("", "install", "-ldflags", "-s -w", p.path()+"@"+p.version)
	cmd.Env = append(append(cmd.Env, "GOBIN="+bin), env...)
	return run(cmd)
}

// installNerdctl builds nerdctl from its module zip. "go install" refuses its go.mod because of
// replace directives, one of them for a test library that a few non-test files of the command import.
func installNerdctl(bin string) error {
	stamp := filepath.Join(bin, "nerdctl.version")
	if have, err := os.ReadFile(stamp); err == nil && string(have) == nerdctlVersion &&
		exists(filepath.Join(bin, "nerdctl")) {
		return nil
	}
	src, err := os.MkdirTemp("", "nerdctl-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(src)

	tree := filepath.Join(src, "tree")
	if err := copyModule(tree, nerdctlModule, nerdctlVersion); err != nil {
		return err
	}
	helpers, err := filepath.Glob(filepath.Join(tree, "cmd/nerdctl/helpers/testing*.go"))
	if err != nil || len(helpers) == 0 {
		return fmt.Errorf("nerdctl %s: no test helpers to leave out below %q (%v)", nerdctlVersion, tree, err)
	}
	for _, h := range helpers {
		if err := os.Remove(h); err != nil {
			return err
		}
	}
	const tigron = "github.com/containerd/nerdctl/mod/tigron"
	if err := run(goCommand(tree, "mod", "edit", "-dropreplace", tigron, "-droprequire", tigron)); err != nil {
		return err
	}
	build := goCommand(tree, "build", "-mod=mod", "-ldflags",
		"-s -w -X "+nerdctlModule+"/pkg/version.Version="+nerdctlVersion, "-o", filepath.Join(bin, "nerdctl"),
		"./cmd/nerdctl")
	if err := run(build); err != nil {
		return err
	}
	return os.WriteFile(stamp, []byte(nerdctlVersion), 0o644)
}

// moduleDir downloads a module to the module cache if necessary, and returns its directory, which is read-only.
func moduleDir(module, version string) (string, error) {
	// go mod download must run in a module; any will do.
	dir, err := os.MkdirTemp("", "download-")
	if err != nil {
		return "", err
	}
	defer os.RemoveAll(dir)
	if err := os.WriteFile(filepath.Join(dir, "go.mod"), []byte("module download\n"), 0o644); err != nil {
		return "", err
	}
	var out bytes.Buffer
	download := goCommand(dir, "mod", "download", "-json", module+"@"+version)
	download.Stdout = &out
	if err := run(download); err != nil {
		return "", err
	}
	var mod struct{ Dir string }
	if err := json.Unmarshal(out.Bytes(), &mod); err != nil {
		return "", fmt.Errorf("read what go mod download printed: %w", err)
	}
	return mod.Dir, nil
}

// copyModule copies a module to tree, where it can be changed.
func copyModule(tree, module, version string) error {
	dir, err := moduleDir(module, version)
	if err != nil {
		return err
	}
	if err := os.CopyFS(tree, os.DirFS(dir)); err != nil {
		return fmt.Errorf("copy the source of %s: %w", module, err)
	}
	// The module cache is read-only, and so is the copy.
	return filepath.WalkDir(tree, func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		mode := fs.FileMode(0o644)
		if d.IsDir() {
			mode = 0o755
		}
		return os.Chmod(path, mode)
	})
}

func buildOwn(bin string) error {
	root, err := moduleRoot()
	if err != nil {
		return err
	}
	// Git refuses root access to another user's clone.
	cmd := exec.Command("go", "build", "-trimpath", "-buildvcs=false", "-o",
		bin+string(filepath.Separator), "./cmd/...")
	cmd.Dir = root
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	return run(cmd)
}

// moduleRoot finds the directory of go.mod at or above the working directory.
func moduleRoot() (string, error) {
	dir, err := os.Getwd()
	if err != nil {
		return "", err
	}
	for !exists(filepath.Join(dir, "go.mod")) {
		parent := filepath.Dir(dir)
		if parent == dir {
			return "", errors.New("no go.mod above the working directory")
		}
		dir = parent
	}
	return dir, nil
}

// goCommand returns a go command for other modules, without our flags and the version in our go.mod.
func goCommand(dir string, args ...string) *exec.Cmd {
	cmd := exec.Command("go", args...)
	cmd.Dir = dir
	if dir == "" {
		cmd.Dir = os.TempDir()
	}
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0", "GOFLAGS=-buildvcs=false", "GOWORK=off")
	return cmd
}

// run runs cmd; an error contains the command's output.
func run(cmd *exec.Cmd) error {
	var out bytes.Buffer
	if cmd.Stdout == nil {
		cmd.Stdout = &out
	}
	cmd.Stderr = &out
	if err := cmd.Run(); err != nil {
		return fmt.Errorf("%s: %w\n%s", strings.Join(cmd.Args, " "), err, out.String())
	}
	return nil
}

// lockFile waits for an exclusive lock on path. unlock or the process's end releases it.
func lockFile(path string) (unlock func(), err error) {
	f, err := os.OpenFile(path, os.O_CREATE|os.O_RDWR, 0o644)
	if err != nil {
		return nil, err
	}
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX); err != nil {
		f.Close()
		return nil, fmt.Errorf("lock %q: %w", path, err)
	}
	return func() { f.Close() }, nil
}

func exists(path string) bool {
	_, err := os.Lstat(path)
	return err == nil
}
