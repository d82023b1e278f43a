// Package mounttest is the test kit of the mount drivers: private namespaces, images made by a foreign
// tool, and a way to look at a mount from another process.
package mounttest

import (
	"bytes"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/daxfs/daxfs-snapshotter/internal/testns"
	"github.com/daxfs/daxfs-snapshotter/mount/internal/sys"
)

const envHelper = "DAXFS_MOUNTTEST_HELPER"

// Main is the body of a TestMain. As root it starts the test binary again in its own namespaces,
// so that no test can leave a mount or a server behind. If Command asks for a helper by name, Main runs that
// instead of tests; "compare" and "readall" always exist.
func Main(m *testing.M, helpers map[string]func(args []string) error) {
	if name := os.Getenv(envHelper); name != "" {
		f := helpers[name]
		switch name {
		case "compare":
			f = compare
		case "readall":
			f = readall
		case "readall-in":
			f = readallIn
		}
		if f == nil {
			fmt.Fprintf(os.Stderr, "no helper %q\n", name)
			os.Exit(2)
		}
		if err := f(os.Args[1:]); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	os.Exit(testns.Main(m))
}

// Root skips the test unless it runs as root in the private namespaces.
func Root(t testing.TB) {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("mounting needs root")
	}
	if !testns.Inside() {
		t.Fatal("TestMain does not call mounttest.Main")
	}
}

// Tmpfs mounts a tmpfs with options of mount(8) for the duration of the test, and returns its directory.
func Tmpfs(t testing.TB, options string) string {
	t.Helper()
	dir := t.TempDir()
	if err := unix.Mount("tmpfs", dir, "tmpfs", 0, options); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { sys.Detach(dir) })
	return dir
}

// Command returns a command that runs a helper of this test binary in the same mount namespace.
func Command(helper string, args ...string) *exec.Cmd {
	cmd := exec.Command("/proc/self/exe", args...)
	cmd.Env = append(os.Environ(), envHelper+"="+helper)
	return cmd
}

// Server finds the process that serves the FUSE mount on dir, by its command line.
func Server(t testing.TB, dir string) int {
	t.Helper()
	all, err := filepath.Glob("/proc/[0-9]*/cmdline")
	if err != nil {
		t.Fatal(err)
	}
	for _, name := range all {
		b, err := os.ReadFile(name)
		if err == nil && bytes.HasSuffix(b, []byte("\x00"+dir+"\x00")) && bytes.Contains(b, []byte("--ready-fd")) {
			pid, err := strconv.Atoi(strings.Split(name, "/")[2])
			if err != nil {
				t.Fatal(err)
			}
			return pid
		}
	}
	t.Fatalf("no process serves %q", dir)
	return 0
}

// Tree makes a directory with every kind of file that an image can hold.
func Tree(t testing.TB) string {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("makes files of other users, which needs root")
	}
	dir := t.TempDir()
	if err := os.Chmod(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	must(os.MkdirAll(filepath.Join(dir, "usr/bin"), 0o755))
	must(os.MkdirAll(filepath.Join(dir, "empty"), 0o711))
	must(os.WriteFile(filepath.Join(dir, "hello"), []byte("hello, world\n"), 0o644))
	must(os.WriteFile(filepath.Join(dir, "nothing"), nil, 0o600))
	must(os.WriteFile(filepath.Join(dir, "name with spaces\n and ü"), bytes.Repeat([]byte("x"), 4096), 0o640))
	big := make([]byte, 5<<20+123)
	for i := range big {
		big[i] = byte(i>>12) ^ byte(i)
	}
	must(os.WriteFile(filepath.Join(dir, "usr/bin/big"), big, 0o755))
	must(os.Chown(filepath.Join(dir, "usr/bin/big"), 1000, 2000))
	must(os.Chmod(filepath.Join(dir, "usr/bin/big"), 0o755|os.ModeSetuid))
	must(os.Link(filepath.Join(dir, "hello"), filepath.Join(dir, "usr/hello-too")))
	must(os.Symlink("usr/bin/big", filepath.Join(dir, "link")))
	must(os.Symlink(strings.Repeat("long/", 200)+"end", filepath.Join(dir, "longlink")))
	must(unix.Mkfifo(filepath.Join(dir, "fifo"), 0o622))
	must(unix.Mknod(filepath.Join(dir, "null"), unix.S_IFCHR|0o666, int(unix.Mkdev(1, 3))))
	must(unix.Setxattr(filepath.Join(dir, "hello"), "user.note", []byte("a note"), 0))
	must(unix.Setxattr(filepath.Join(dir, "usr"), "trusted.overlay.opaque", []byte("n"), 0))
	// cap_net_raw=ep, revision 2
	must(unix.Setxattr(filepath.Join(dir, "usr/bin/big"), "security.capability",
		append([]byte{1, 0, 0, 2, 0, 0x20}, make([]byte, 14)...), 0))
	many := filepath.Join(dir, "many")
	must(os.Mkdir(many, 0o755))
	for i := range 700 {
		must(os.WriteFile(filepath.Join(many, fmt.Sprintf("file-number-%04d", i)), []byte{byte(i)}, 0o644))
	}
	return dir
}

// Mkfs makes an EROFS image of dir with mkfs.erofs, an independent tool, or skips the test.
func Mkfs(t testing.TB, dir, image string) {
	t.Helper()
	if _, err := exec.LookPath("mkfs.erofs"); err != nil {
		t.Skip("mkfs.erofs is not installed (erofs-utils)")
	}
	out, err := exec.Command("mkfs.erofs", "-Enoinline_data", "--preserve-mtime", "--quiet", image,
		dir).CombinedOutput()
	if err != nil {
		t.Fatalf("mkfs.erofs: %v\n%s", err, out)
	}
}
