package testimage

import (
	"fmt"
	"os"
	"os/exec"
	"runtime"
	"sort"
	"strings"
	"time"

	v1 "github.com/google/go-containerregistry/pkg/v1"
)

const architecture = runtime.GOARCH

// busyboxPaths are where distributions put a static busybox.
var busyboxPaths = []string{"/bin/busybox", "/usr/bin/busybox"}

// Busybox returns the base layer: a static busybox with its applets, and the directories that a runtime expects.
func Busybox() ([]Entry, error) {
	var body []byte
	var err error
	var where string
	for _, where = range busyboxPaths {
		if body, err = os.ReadFile(where); err == nil {
			break
		}
	}
	if err != nil {
		return nil, fmt.Errorf("no busybox (Debian: busybox-static): %w", err)
	}
	list, err := exec.Command(where, "--list").Output()
	if err != nil {
		return nil, fmt.Errorf("list the applets of %q: %w", where, err)
	}
	entries := []Entry{
		Dir("bin", 0o755), Dir("dev", 0o755), Dir("etc", 0o755), Dir("proc", 0o555), Dir("root", 0o700),
		Dir("run", 0o755), Dir("sys", 0o555), Dir("tmp", 0o1777), Dir("usr", 0o755), Dir("usr/bin", 0o755),
		File("bin/busybox", 0o755, body),
		File("etc/passwd", 0o644, []byte("root:x:0:0:root:/root:/bin/sh\nuser:x:1000:1000::/tmp:/bin/sh\n")),
		File("etc/group", 0o644, []byte("root:x:0:\nuser:x:1000:\n")),
		File("etc/hostname", 0o644, []byte("tiny\n")),
	}
	applets := strings.Fields(string(list))
	sort.Strings(applets)
	for _, a := range applets {
		if a != "busybox" { // busybox lists itself
			entries = append(entries, Symlink("bin/"+a, "busybox"))
		}
	}
	return entries, nil
}

// Tiny is an image of one layer: busybox.
func Tiny() (v1.Image, error) { return onBusybox() }

func onBusybox(layers ...[]Entry) (v1.Image, error) {
	base, err := Busybox()
	if err != nil {
		return nil, err
	}
	return Image(append([][]Entry{base}, layers...)...)
}

// Special is an image with everything that a tree can hold: owners, special mode bits, devices, fifos,
// hard links, extended attributes and capabilities, odd names, odd times, and sizes around block and
// huge page borders. A second layer changes parts of it.
func Special() (v1.Image, error) { return onBusybox(SpecialLayers()...) }

// SpecialLayers are the two layers of Special above the base.
func SpecialLayers() [][]Entry {
	// The value of security.capability for cap_net_raw=ep: version 2, effective flag, the set.
	const netRaw = "\x01\x00\x00\x02\x00\x20\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00"
	device := func(name string, kind byte, major, minor int64) Entry {
		e := Entry{}
		e.Typeflag, e.Name, e.Mode, e.Devmajor, e.Devminor = kind, name, 0o640, major, minor
		return e
	}
	lower := []Entry{
		Dir("s", 0o755),
		File("s/setuid", 0o4755, []byte("#!/bin/sh\nid\n")),
		File("s/setgid", 0o2755, []byte("x")),
		Dir("s/sticky", 0o1777),
		File("s/secret", 0o000, []byte("nobody reads this")),
		File("s/owned", 0o640, []byte("owned")).Owned(1000, 1000),
		File("s/bigid", 0o644, []byte("id")).Owned(1<<31+5, 1<<31+6),
		File("s/capable", 0o755, []byte("#!/bin/sh\n")).Xattr("security.capability", netRaw),
		File("s/attrs", 0o644, []byte("a")).Xattr("user.one", "1").Xattr("user.empty", "").
			Xattr("user.long", strings.Repeat("v", 300)).Xattr("user.binary", "\x00\xff\x00"),
		Dir("s/attrdir", 0o755).Xattr("user.on.dir", "yes"),
		File("s/link1", 0o644, []byte("three names")), Link("s/link2", "s/link1", 0o644),
		Link("s/sticky/link3", "s/link1", 0o644),
		Symlink("s/relative", "sticky/link3"), Symlink("s/absolute", "/etc/passwd"),
		Symlink("s/dangling", "/no/such/file"),
		Symlink("s/longlink", strings.Repeat("d/", 2000)+"end"),
		device("s/char", '3', 1, 3), device("s/block", '4', 7, 200), device("s/bigdev", '3', 300, 70000),
		device("s/fifo", '6', 0, 0),
		File("s/"+strings.Repeat("n", 255), 0o644, []byte("long name")),
		File("s/name with space", 0o644, []byte("space")),
		File("s/ünïcödé ✓", 0o644, []byte("unicode")),
		File("s/new\nline", 0o644, []byte("newline")),
		File("s/bytes-\xff\xfe", 0o644, []byte("not UTF-8")),
		File("s/-rf", 0o644, []byte("dash")),
		File("s/before-1970", 0o644, []byte("old")).At(time.Unix(-86400, 0)),
		File("s/nanoseconds", 0o644, []byte("ns")).At(time.Unix(1600000000, 123456789)),
		File("s/after-2038", 0o644, []byte("new")).At(time.Unix(1<<33, 0)),
	}
	for _, size := range []int{0, 1, 4095, 4096, 4097, 2<<20 - 1, 2 << 20, 2<<20 + 1, 5 << 20} {
		lower = append(lower, File(fmt.Sprintf("s/size-%d", size), 0o644, Noise(uint64(size)+1, size)))
	}
	zeros := make([]byte, 3<<20)
	zeros[1<<20] = 1
	lower = append(lower, File("s/sparse", 0o644, zeros))
	lower = append(lower, Dir("s/many", 0o755))
	for i := range 300 { // more than one block of directory entries
		lower = append(lower, File(fmt.Sprintf("s/many/%03d", i), 0o644, []byte(fmt.Sprint(i))))
	}
	lower = append(lower,
		Dir("s/hidden", 0o755), File("s/hidden/old", 0o644, []byte("old")),
		Dir("s/replaced", 0o755), File("s/replaced/in-dir", 0o644, []byte("x")),
		File("s/was-file", 0o644, []byte("file")),
		Dir("s/was-dir", 0o755), File("s/was-dir/x", 0o644, []byte("x")), File("s/removed", 0o644, []byte("gone")),
		Dir("s/tree", 0o755), File("s/tree/a", 0o644, []byte("a")), Dir("s/tree/b", 0o755),
		File("s/tree/b/c", 0o644, []byte("c")),
	)
	// The directories that this layer changes have entries: without them, containerd keeps the time of the unpack.
	upper := []Entry{
		Dir("s", 0o755), Dir("s/sticky", 0o1777), Dir("s/replaced", 0o755),
		Whiteout("s/removed"), Whiteout("s/tree"),
		Dir("s/hidden", 0o700), Opaque("s/hidden"), File("s/hidden/new", 0o644, []byte("new")),
		Whiteout("s/replaced/in-dir"), File("s/replaced/new", 0o644, []byte("x")),
		File("s/was-dir", 0o644, []byte("a file now")),
		Dir("s/was-file", 0o755), File("s/was-file/inside", 0o644, []byte("inside")),
		// The mode of a lower directory changes. The entry repeats its attribute, like archivers do: without
		// that, overlayfs would hide the attribute, while converting a layer keeps it (see package tree).
		Dir("s/attrdir", 0o711).Xattr("user.on.dir", "yes"),
		Whiteout("s/link2"),                           // one of three names is removed
		File("s/sticky/link3", 0o600, []byte("own")),  // one becomes a file of its own
		File("s/size-4096", 0o644, []byte("smaller")), // contents change
	}
	return [][]Entry{lower, upper}
}

// Layers is an image of n layers above busybox. Each layer adds files, most remove or replace some of
// a lower one, and every seventh makes a directory opaque.
func Layers(n int) (v1.Image, error) {
	layers := make([][]Entry, n)
	for i := range layers {
		text := []byte(fmt.Sprintf("layer %d\n", i))
		layers[i] = []Entry{
			Dir("l", 0o755),
			File(fmt.Sprintf("l/own-%03d", i), 0o644, text),
			File("l/top", 0o644, text),
			Dir("l/shared", 0o755),
			File(fmt.Sprintf("l/shared/%03d", i), 0o644, text),
			Dir(fmt.Sprintf("l/d%d", i%5), 0o755),
			File(fmt.Sprintf("l/d%d/%03d", i%5, i), 0o644, Noise(uint64(i), 5000)),
		}
		if i%3 == 2 {
			layers[i] = append(layers[i], Whiteout(fmt.Sprintf("l/own-%03d", i-1)))
		}
		if i%5 == 4 {
			layers[i] = append(layers[i], Whiteout(fmt.Sprintf("l/d%d", (i+1)%5)))
		}
		if i%7 == 6 {
			layers[i] = append(layers[i], Opaque("l/shared"))
		}
	}
	return onBusybox(layers...)
}

// Small is an image with n small files in nested directories, similar to packages of scripting
// languages. seed selects the contents, so two images share files only if they have the same seed.
func Small(n int, seed uint64) (v1.Image, error) { return onBusybox(SmallFiles(n, seed)) }

// SmallFiles is the layer of Small.
func SmallFiles(n int, seed uint64) []Entry {
	entries := []Entry{Dir("node_modules", 0o755)}
	const perPackage = 40
	for i := range n {
		dir := fmt.Sprintf("node_modules/package-%04d", i/perPackage)
		if i%perPackage == 0 {
			entries = append(entries, Dir(dir, 0o755), Dir(dir+"/lib", 0o755))
		}
		size := 100 + int(mix(seed, uint64(i))%6000)
		entries = append(entries,
			File(fmt.Sprintf("%s/lib/file-%d.js", dir, i), 0o644, Noise(mix(seed, uint64(i)), size)))
	}
	return entries
}

// Noise returns size pseudo-random bytes that depend only on seed. They do not compress.
func Noise(seed uint64, size int) []byte {
	b := make([]byte, (size+7)&^7)
	for i := 0; i < len(b); i += 8 {
		v := mix(seed, uint64(i))
		for j := range 8 {
			b[i+j] = byte(v >> (8 * j))
		}
	}
	return b[:size]
}

// mix is the finalizer of splitmix64 over two numbers.
func mix(a, b uint64) uint64 {
	z := a*0x9e3779b97f4a7c15 + b + 0x9e3779b97f4a7c15
	z = (z ^ z>>30) * 0xbf58476d1ce4e5b9
	z = (z ^ z>>27) * 0x94d049bb133111eb
	return z ^ z>>31
}
