package main

import (
	"archive/tar"
	"bytes"
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"

	"github.com/opencontainers/go-digest"
	"github.com/rogpeppe/go-internal/testscript"
	"github.com/urfave/cli/v2"
	"golang.org/x/sys/unix"

	"github.com/daxfs/daxfs-snapshotter/internal/ocitest"
	"github.com/daxfs/daxfs-snapshotter/internal/testns"
	. "github.com/daxfs/daxfs-snapshotter/internal/treetest"
)

func TestMain(m *testing.M) {
	testscript.Main(isolated{m}, map[string]func(){"daxfs": main})
}

// isolated runs the tests in namespaces of their own: they start daemons and servers of mounts.
type isolated struct{ m *testing.M }

func (i isolated) Run() int { return testns.Main(i.m) }

// TestScripts runs the stories in testdata. Each begins in a directory that holds images:
//
//	layout          OCI layout with one image of two layers, tags v1 and v2 (v2 has a wrong diff ID)
//	docker.tar      docker archive of the same layers
//	multi           OCI layout with an index for linux/amd64 and linux/arm64
func TestScripts(t *testing.T) {
	testscript.Run(t, testscript.Params{
		Dir: "testdata",
		Setup: func(e *testscript.Env) error {
			e.Setenv("HOME", e.WorkDir)
			setup(t, e.WorkDir)
			return nil
		},
		Cmds: map[string]func(*testscript.TestScript, bool, []string){
			"status": wantStatus, "json": wantField, "sametar": sameTar, "layout": newLayout, "flip": flipBit,
			"interrupt": interrupt,
			"setxattr":  setXattr, "hash": rootHashOf, "strip": stripDigests, "lie": lieInFooter, "truncate": truncate,
		},
		Condition: func(cond string) (bool, error) {
			if cond != "root" {
				return false, fmt.Errorf("unknown condition %q", cond)
			}
			return os.Geteuid() == 0, nil
		},
		RequireExplicitExec: true,
	})
}

func setup(t *testing.T, dir string) {
	tars := [][]byte{
		Tar(Dir("etc").Own(1, 2), Reg("etc/passwd", "root:x:0:0::/:/bin/sh\n").Perm(0o600),
			Reg("bin", strings.Repeat("x", 3<<20)),
			Sym("link", "etc/passwd"), Special(tar.TypeChar, "null", 1, 3), Special(tar.TypeFifo, "fifo", 0, 0),
			Hard("etc/passwd-", "etc/passwd").Perm(0o600), Reg("etc/gone", "gone")),
		Tar(Dir("etc").Own(1, 2), Reg("etc/.wh.gone", ""), Reg("a\nb", "strange name"),
			Reg("cap", "c").X("user.note", "hello")),
	}
	layers := []ocitest.Layer{{Tar: tars[0], Compression: ocitest.Gzip}, {Tar: tars[1], Compression: ocitest.Zstd}}
	l := ocitest.NewLayout(t, filepath.Join(dir, "layout"))
	l.Tag("v1", l.Manifest(ocitest.LinuxAMD64, layers...))
	bad := slices.Clone(layers)
	bad[1].DiffID = digest.FromString("something else")
	l.Tag("v2", l.Manifest(ocitest.LinuxAMD64, bad...))
	ocitest.DockerArchive(t, filepath.Join(dir, "docker.tar"), "example:v1", layers...)
	m := ocitest.NewLayout(t, filepath.Join(dir, "multi"))
	arm := ocitest.LinuxAMD64
	arm.Architecture = "arm64"
	amd := m.Manifest(ocitest.LinuxAMD64, ocitest.Layer{Tar: Tar(Reg("amd64", "1"))})
	m.Tag("", m.Index(m.Index(amd), m.Manifest(arm, ocitest.Layer{Tar: Tar(Reg("arm64", "1"))})))
}

// wantStatus runs daxfs and expects an exit status: status N ARGS...
func wantStatus(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) < 1 {
		ts.Fatalf("usage: status N ARGS...")
	}
	got := 0
	if err := ts.Exec("daxfs", args[1:]...); err != nil {
		var exit interface{ ExitCode() int }
		if !errors.As(err, &exit) {
			ts.Fatalf("daxfs: %v", err)
		}
		got = exit.ExitCode()
	}
	if fmt.Sprint(got) != args[0] {
		ts.Fatalf("status %d, expected %s", got, args[0])
	}
}

// wantField expects a value of a JSON field in a file (or stdout): json FILE PATH.TO.FIELD VALUE
func wantField(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) != 3 {
		ts.Fatalf("usage: json FILE FIELD VALUE")
	}
	var v any
	ts.Check(json.Unmarshal([]byte(ts.ReadFile(args[0])), &v))
	for _, k := range strings.Split(args[1], ".") {
		m, ok := v.(map[string]any)
		if !ok || m[k] == nil {
			ts.Fatalf("no field %q", args[1])
		}
		v = m[k]
	}
	got, err := json.Marshal(v)
	ts.Check(err)
	if string(got) != args[2] {
		ts.Fatalf("%s is %s, expected %s", args[1], got, args[2])
	}
}

// newLayout makes an OCI layout with one layer from a tar: layout TAR DIR
func newLayout(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) != 2 {
		ts.Fatalf("usage: layout TAR DIR")
	}
	tb := &testing.B{} // if writing the layout fails, reading it fails
	l := ocitest.NewLayout(tb, ts.MkAbs(args[1]))
	l.Tag("",
		l.Manifest(ocitest.LinuxAMD64, ocitest.Layer{Tar: []byte(ts.ReadFile(args[0])), Compression: ocitest.Gzip}))
}

// setXattr sets an extended attribute of a file: setxattr FILE NAME VALUE. (setfattr is a package of its own.)
func setXattr(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) != 3 {
		ts.Fatalf("usage: setxattr FILE NAME VALUE")
	}
	ts.Check(unix.Setxattr(ts.MkAbs(args[0]), args[1], []byte(args[2]), 0))
}

// sameTar compares two tars: sametar A B. (cmp would print them.)
func sameTar(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) != 2 {
		ts.Fatalf("usage: sametar A B")
	}
	a, b := []byte(ts.ReadFile(args[0])), []byte(ts.ReadFile(args[1]))
	if len(a) < 1024 || !bytes.Equal(a, b) {
		ts.Fatalf("tars of %d and %d bytes differ", len(a), len(b))
	}
}

// flipBit changes a bit of a file: flip FILE OFFSET
func flipBit(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) != 2 {
		ts.Fatalf("usage: flip FILE OFFSET")
	}
	name := ts.MkAbs(args[0])
	b, err := os.ReadFile(name)
	ts.Check(err)
	var off int
	_, err = fmt.Sscan(args[1], &off)
	ts.Check(err)
	b[off] ^= 1
	ts.Check(os.WriteFile(name, b, 0o644))
}

// footerOff is the offset of the digest table's footer from the end of an image, as in docs/format.md.
const footerOff = 8192 + 160

// rootHashOf computes the root hash of an image by the rules of docs/format.md: hash FILE VARIABLE
func rootHashOf(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) != 2 {
		ts.Fatalf("usage: hash FILE VARIABLE")
	}
	b := []byte(ts.ReadFile(args[0]))
	sum := sha256.Sum256(b[len(b)-footerOff:][:128])
	ts.Setenv(args[1], hex.EncodeToString(sum[:]))
}

// stripDigests copies an image without its digest table: strip FILE NEW
func stripDigests(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) != 2 {
		ts.Fatalf("usage: strip FILE NEW")
	}
	b := []byte(ts.ReadFile(args[0]))
	clear(b[binary.LittleEndian.Uint64(b[len(b)-footerOff+16:]) : len(b)-8192])
	ts.Check(os.WriteFile(ts.MkAbs(args[1]), b, 0o644))
}

// lieInFooter changes 4 bytes of the digest table's footer, and its checksum: lie FILE NEW OFFSET VALUE
func lieInFooter(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) != 4 {
		ts.Fatalf("usage: lie FILE NEW OFFSET VALUE")
	}
	b := []byte(ts.ReadFile(args[0]))
	off, err := strconv.Atoi(args[2])
	ts.Check(err)
	value, err := strconv.ParseUint(args[3], 10, 32)
	ts.Check(err)
	foot := b[len(b)-footerOff:][:160]
	binary.LittleEndian.PutUint32(foot[off:], uint32(value))
	sum := sha256.Sum256(foot[:128])
	copy(foot[128:], sum[:])
	ts.Check(os.WriteFile(ts.MkAbs(args[1]), b, 0o644))
}

// truncate copies a file without its last bytes: truncate FILE NEW BYTES
func truncate(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) != 3 {
		ts.Fatalf("usage: truncate FILE NEW BYTES")
	}
	b := ts.ReadFile(args[0])
	n, err := strconv.Atoi(args[2])
	ts.Check(err)
	ts.Check(os.WriteFile(ts.MkAbs(args[1]), []byte(b[:len(b)-n]), 0o644))
}

// TestReorder: options may stand before and after arguments.
func TestReorder(t *testing.T) {
	app := newApp(&env{stdin: nil, stdout: io.Discard, stderr: io.Discard})
	for _, c := range []struct{ in, want string }{
		{"daxfs convert SRC -o OUT", "daxfs convert -o OUT SRC"},
		{"daxfs convert SRC --output=OUT --quiet", "daxfs convert --output=OUT --quiet SRC"},
		{"daxfs convert -o OUT SRC", "daxfs convert -o OUT SRC"},
		{"daxfs ls IMG PATH -lR", "daxfs ls -lR IMG PATH"},
		{"daxfs cat IMG -- -file", "daxfs cat -- IMG -file"},
		{"daxfs --version", "daxfs --version"},
		{"daxfs convert SRC -q -o", "daxfs convert -q -o"},
		{"daxfs pool rm POOL KEY --index", "daxfs pool rm --index"},
		{"daxfs unknown -o x", "daxfs -o unknown x"},
		{"daxfs", "daxfs"},
	} {
		if got := strings.Join(reorder(strings.Fields(c.in), app.Flags, app.Commands), " "); got != c.want {
			t.Errorf("%q becomes %q, expected %q", c.in, got, c.want)
		}
	}
}

// TestEveryCommandIsDocumented: every command has a help text with examples, which use existing commands and flags.
func TestEveryCommandIsDocumented(t *testing.T) {
	examples := 0
	var check func(name string, c *cli.Command)
	check = func(name string, c *cli.Command) {
		_, after, found := strings.Cut(c.Description, "Example")
		if c.Usage == "" || !found || !strings.Contains(after, name) {
			t.Errorf("%q lacks a usage or an example of itself", name)
		}
		for line := range strings.Lines(after) {
			_, args, ok := strings.Cut(line, "daxfs ")
			if !ok || strings.Contains(line, "mount -t ") {
				continue
			}
			if i := strings.IndexAny(args, "|>&)"); i >= 0 {
				args = args[:i]
			}
			examples++
			// The parser reports unknown names as wrong usage before it looks at --help.
			var stdout, stderr bytes.Buffer
			words := append(append([]string{"daxfs"}, strings.Fields(args)...), "--help")
			if status := run(t.Context(), words, nil, &stdout, &stderr); status != statusOK {
				t.Errorf("%q: example %q: %s", name, strings.TrimSpace(line), stderr.String())
			} else if want := "daxfs " + strings.Fields(args)[0]; !strings.Contains(stdout.String(), want) {
				t.Errorf("%q: example %q shows no help of %q", name, strings.TrimSpace(line), want)
			}
		}
		for _, s := range c.Subcommands {
			check(name+" "+s.Name, s)
		}
	}
	for _, c := range newApp(&env{stdout: io.Discard, stderr: io.Discard}).Commands {
		check("daxfs "+c.Name, c)
	}
	if examples < 20 {
		t.Errorf("found %d examples", examples)
	}
}

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}
