package converter_test

import (
	"bytes"
	"context"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"testing"

	"github.com/containerd/log"
	"github.com/sirupsen/logrus"

	"github.com/daxfs/daxfs-snapshotter/converter"
	"github.com/daxfs/daxfs-snapshotter/converter/source"
	"github.com/daxfs/daxfs-snapshotter/daxfs"
	"github.com/daxfs/daxfs-snapshotter/internal/ocitest"
	. "github.com/daxfs/daxfs-snapshotter/internal/treetest"
)

func TestMain(m *testing.M) {
	if memory := os.Getenv(helperEnv); memory != "" {
		if err := convertHelper(memory); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	log.L.Logger.SetLevel(logrus.ErrorLevel) // containerd's applier warns of every attribute it ignores
	os.Exit(m.Run())
}

// noise is text that neither compresses well nor repeats.
func noise(seed uint64, n int) string {
	rnd := rand.New(rand.NewPCG(seed, 7))
	b := make([]byte, n)
	for i := range b {
		b[i] = byte(rnd.Uint32()) & 0x3f
	}
	return string(b)
}

// treeTar is a layer of n files of 1 MiB each that differ in every block.
func treeTar(seed uint64, n int) []byte {
	body := []byte(noise(seed, 1<<20))
	var files []File
	for i := range n {
		for at := 0; at < len(body); at += 4096 {
			body[at], body[at+1] = byte(i), byte(seed)
		}
		files = append(files, Reg(fmt.Sprintf("file-%d-%d", seed, i), string(body)))
	}
	return Tar(files...)
}

// exampleLayers use every interaction of layers once; package tree tests them in depth.
func exampleLayers() [][]byte {
	big := noise(1, 3<<20)
	return [][]byte{
		Tar(
			Dir("bin"), Dir("etc"), Dir("lib").Own(7, 8), Dir("var"), Dir("var/cache"), Dir("opt"),
			Reg("bin/sh", noise(2, 200_000)).Perm(0o4755), Hard("bin/bash", "bin/sh"),
			Reg("etc/passwd", "root:x:0:0::/:/bin/sh\n"), Reg("etc/shadow", "root:!\n").Perm(0o600).Own(0, 42),
			Reg("lib/big.so", big), Reg("lib/gone.so", noise(3, 5<<20)), Sym("lib64", "lib"),
			Reg("var/cache/a", noise(4, 70_000)), Reg("var/cache/b", "b"),
			Reg("opt/replaced", noise(5, 900_000)),
			Reg("opt/ping", "p").X("security.capability",
				"\x01\x00\x00\x02\x00\x20\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00"),
			Reg("opt/user", "u").X("user.note", "hello").Own(4294967294, 3000000000),
			Special('3', "opt/null", 1, 3), Special('4', "opt/disk", 8, 1), Special('6', "opt/fifo", 0, 0),
		),
		Tar(
			Reg("lib/.wh.gone.so", ""), Reg("var/cache/.wh..wh..opq", ""), Reg("var/cache/c", "b"),
			Dir("opt/replaced"), Reg("opt/replaced/file", "now a directory"), Hard("etc/passwd-", "etc/passwd"),
			Reg("lib64/through-link", noise(6, 10_000)), Reg("lib/big-again.so", big),
		),
		Tar(
			Reg("etc/motd", "welcome\n"), Dir("empty"), Reg("etc/passwd", "changed\n"),
			Reg("lib/other.so", noise(8, 2<<20)),
		),
	}
}

func packed(tars [][]byte, c ocitest.Compression) []ocitest.Layer {
	var l []ocitest.Layer
	for _, t := range tars {
		l = append(l, ocitest.Layer{Tar: t, Compression: c})
	}
	return l
}

// newLayout writes an image of the layers and returns its directory.
func newLayout(t testing.TB, layers ...ocitest.Layer) *ocitest.Layout {
	t.Helper()
	l := ocitest.NewLayout(t, filepath.Join(t.TempDir(), "layout"))
	l.Tag("", l.Manifest(ocitest.LinuxAMD64, layers...))
	return l
}

// convert converts the named source to a file that is the only one of its directory.
func convert(t testing.TB, name string, o converter.Options) (string, *converter.Result, error) {
	t.Helper()
	src, err := source.Parse(name, source.Config{PlainHTTP: true})
	if err != nil {
		t.Fatal(err)
	}
	defer src.Close()
	out := filepath.Join(t.TempDir(), "image")
	if err := os.WriteFile(out, []byte(before), 0o600); err != nil {
		t.Fatal(err)
	}
	res, err := converter.Convert(context.Background(), src, out, o)
	return out, res, err
}

// before is the content of the output before a conversion, and after a failed one.
const before = "what was there before"

// mustConvert is convert for good images. The result must pass Check.
func mustConvert(t testing.TB, name string, o converter.Options) ([]byte, *converter.Result) {
	t.Helper()
	out, res, err := convert(t, name, o)
	if err != nil {
		t.Fatal(err)
	}
	b, err := os.ReadFile(out)
	if err != nil {
		t.Fatal(err)
	}
	if res.BytesOut != int64(len(b)) {
		t.Errorf("the result says %d bytes, the image has %d", res.BytesOut, len(b))
	}
	if err := daxfs.Check(bytes.NewReader(b), int64(len(b)), func(f daxfs.Finding) bool {
		t.Errorf("Check: %v", f)
		return true
	}); err != nil {
		t.Fatal(err)
	}
	return b, res
}
