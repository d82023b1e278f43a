package daxfs_test

import (
	"fmt"
	"strings"
	"testing"

	"github.com/daxfs/daxfs-snapshotter/daxfs"
	"golang.org/x/sys/unix"
)

// kernelTrees returns trees that each exercise one limit of the layout.
func kernelTrees() map[string]func(s *store) *daxfs.Node {
	trees := map[string]func(s *store) *daxfs.Node{
		"empty root": func(*store) *daxfs.Node { return dir(nil) },
		"huge directory": func(*store) *daxfs.Node {
			root := dir(map[string]*daxfs.Node{})
			for i := range 20_000 {
				root.Entries[fmt.Sprintf("file-%d", i)] = &daxfs.Node{Mode: unix.S_IFREG | 0o644}
			}
			return root
		},
		"deep": func(s *store) *daxfs.Node {
			n := dir(map[string]*daxfs.Node{"leaf": {Mode: unix.S_IFREG | 0o600, Data: s.put([]byte("at the bottom"))}})
			for range 500 {
				n = dir(map[string]*daxfs.Node{"d": n})
			}
			return n
		},
		"long names": func(*store) *daxfs.Node {
			root := dir(map[string]*daxfs.Node{})
			for i := range 300 {
				root.Entries[fmt.Sprintf("%03d%s", i, strings.Repeat("n", 252))] = dir(nil)
			}
			return root
		},
		"names around dots": func(*store) *daxfs.Node {
			root := dir(map[string]*daxfs.Node{})
			for b := 1; b < 256; b++ {
				if b != '/' && b != '.' {
					root.Entries[string([]byte{byte(b)})] = symlink("x")
				}
				if b != '/' {
					root.Entries[string([]byte{'.', '.', byte(b)})] = symlink("x")
				}
			}
			root.Entries["-"] = dir(map[string]*daxfs.Node{"\x01": dir(nil), "...": dir(nil)})
			return root
		},
		"xattrs": func(s *store) *daxfs.Node {
			root := dir(map[string]*daxfs.Node{})
			for i := range 40 {
				n := &daxfs.Node{Mode: unix.S_IFREG | 0o644, Data: s.put([]byte("x"))}
				for k := range i * 10 { // more than 255 shared ones
					n.Xattrs = append(n.Xattrs,
						daxfs.Xattr{Name: fmt.Sprintf("user.a%d", k), Value: []byte("eight888")})
				}
				root.Entries[fmt.Sprint("f", i)] = n
			}
			big := dir(map[string]*daxfs.Node{})
			for i := range 3 {
				big.Xattrs = append(big.Xattrs,
					daxfs.Xattr{Name: fmt.Sprintf("trusted.%d", i), Value: make([]byte, 65535)})
			}
			for i := range 200 {
				big.Entries[fmt.Sprint("e", i)] = symlink(fmt.Sprint("to", i))
			}
			root.Entries["big"] = big
			link := symlink("target of a link with large xattrs")
			link.Xattrs = []daxfs.Xattr{{Name: "trusted.v", Value: make([]byte, 5000)}, {Name: "security.empty"}}
			root.Entries["link"] = link
			return root
		},
		"symlinks": func(*store) *daxfs.Node {
			root := dir(map[string]*daxfs.Node{})
			for n := 1; n <= 4095; n += 13 {
				root.Entries[fmt.Sprint(n)] = symlink(strings.Repeat("t", n))
			}
			for n := 3900; n <= 4095; n++ {
				root.Entries[fmt.Sprint(n)] = symlink(strings.Repeat("u", n))
			}
			return root
		},
		"directory tails": func(*store) *daxfs.Node {
			root := dir(map[string]*daxfs.Node{})
			for n := range 260 { // sizes around one and two blocks
				d := dir(map[string]*daxfs.Node{})
				for k := range 15 + n%20 {
					d.Entries[fmt.Sprintf("%0*d", 200+n%56, k)] = symlink("x")
				}
				root.Entries[fmt.Sprint(n)] = d
			}
			return root
		},
		"links": func(s *store) *daxfs.Node {
			root := dir(map[string]*daxfs.Node{})
			f := &daxfs.Node{Mode: unix.S_IFREG | 0o644, Data: s.put([]byte("linked")), UID: 1}
			for i := range 70_000 { // link counts of more than 16 bits
				root.Entries[fmt.Sprint(i)] = f
			}
			return root
		},
		"large": func(s *store) *daxfs.Node { return randomTree(7, 60_000, s) },
	}
	for seed := range uint64(12) {
		trees[fmt.Sprintf("random %d", seed)] = func(s *store) *daxfs.Node {
			return randomTree(seed, 30<<(seed/2), s)
		}
	}
	return trees
}

// TestKernel mounts images with the running kernel and compares its view with the input.
func TestKernel(t *testing.T) {
	for name, make := range kernelTrees() {
		t.Run(name, func(t *testing.T) {
			if testing.Short() && (name == "large" || name == "huge directory") {
				t.Skip("takes seconds")
			}
			s := newStore(daxfs.BlockSize)
			root := make(s)
			_, img := s.fileImage(t, root, daxfs.Options{Label: "test", Digests: true})
			file := writeTemp(t, img)
			for _, backing := range []string{"file", "loop"} {
				t.Run(backing, func(t *testing.T) {
					if testing.Short() && backing == "loop" && !strings.HasPrefix(name, "random") {
						t.Skip("slow: mounts every tree twice")
					}
					compareMount(t, backing, file, 0, int64(len(img)), root, s)
				})
			}
			t.Run("fsck", func(t *testing.T) { fsck(t, file) })
		})
	}
}

// TestKernelWindow mounts windows of a pool: segments low, data high, several windows over the same data.
func TestKernelWindow(t *testing.T) {
	if testing.Short() {
		t.Skip("slow: mounts and compares three trees of 3000 files")
	}
	const poolData = 64 << 20
	s := newStore(poolData)
	root := randomTree(3, 3000, s)
	other := dir(map[string]*daxfs.Node{"same": root.Entries[anyFile(root)], "empty": {Mode: unix.S_IFREG | 0o600}})
	for _, w := range []struct {
		name string
		root *daxfs.Node
		off  int64
	}{{"first", root, 0}, {"second", other, 4 << 20}, {"third", root, 8 << 20}} {
		_, img := s.windowImage(t, w.root, w.off)
		size := int64(len(img))
		t.Run(w.name, func(t *testing.T) {
			file := writeTemp(t, s.f.b)
			for _, backing := range []string{"file", "loop"} {
				t.Run(backing, func(t *testing.T) { compareMount(t, backing, file, w.off, size, w.root, s) })
			}
			t.Run("fsck", func(t *testing.T) { fsck(t, writeTemp(t, img)) })
		})
	}
}

func anyFile(n *daxfs.Node) string {
	best := ""
	for name, k := range n.Entries {
		if k.Data.Size > 0 && (best == "" || name < best) {
			best = name
		}
	}
	return best
}

func compareMount(t *testing.T, backing, file string, off, size int64, root *daxfs.Node, s *store) {
	mountNamespace(t)
	log := kernelLog(t)
	mnt, device := mountImage(t, backing, file, off, size)
	compareTree(t, mnt, root, s)
	if device != "" {
		for _, line := range log(device) {
			t.Errorf("the kernel says %s", line)
		}
	}
	var st unix.Statfs_t
	if err := unix.Statfs(mnt, &st); err != nil || int64(st.Blocks)*int64(st.Bsize) != size {
		t.Errorf("statfs: %d blocks of %d, %v; expected %d bytes", st.Blocks, st.Bsize, err, size)
	}
}

// fsck checks the whole image with the reference tool.
func fsck(t *testing.T, file string) {
	t.Helper()
	out, err := runTool(t, "fsck.erofs", "-d1", "--extract", file)
	if err != nil || strings.Contains(out, "<E>") {
		t.Errorf("fsck.erofs: %v\n%s", err, out)
	}
}

// recorder counts the reports of a test.
type recorder struct {
	testing.TB
	errors []string
}

func (r *recorder) Helper() {}

func (r *recorder) Errorf(format string, args ...any) {
	r.errors = append(r.errors, fmt.Sprintf(format, args...))
}

// TestCompareTree changes one expectation of a mount at a time: the comparison must find each difference.
func TestCompareTree(t *testing.T) {
	s := newStore(daxfs.BlockSize)
	make := func() *daxfs.Node {
		f := &daxfs.Node{
			Mode: unix.S_IFREG | 0o644, Data: s.put([]byte("text")),
			Xattrs: []daxfs.Xattr{{Name: "user.a", Value: []byte("1")}},
		}
		return dir(map[string]*daxfs.Node{
			"f": f, "g": f, "l": symlink("f"), "d": dir(nil),
			"c": {Mode: unix.S_IFCHR, Rdev: 259},
		})
	}
	_, img := s.fileImage(t, make(), daxfs.Options{})
	mountNamespace(t)
	mnt, _ := mountImage(t, "loop", writeTemp(t, img), 0, int64(len(img)))
	compareTree(t, mnt, make(), s)
	for name, change := range map[string]func(root *daxfs.Node){
		"mode":          func(r *daxfs.Node) { r.Entries["f"].Mode ^= 1 },
		"root mode":     func(r *daxfs.Node) { r.Mode ^= 1 },
		"type":          func(r *daxfs.Node) { r.Entries["c"].Mode = unix.S_IFBLK },
		"uid":           func(r *daxfs.Node) { r.Entries["d"].UID++ },
		"gid":           func(r *daxfs.Node) { r.Entries["l"].GID++ },
		"seconds":       func(r *daxfs.Node) { r.Entries["c"].Mtime.Sec++ },
		"nanoseconds":   func(r *daxfs.Node) { r.Entries["c"].Mtime.Nsec++ },
		"device":        func(r *daxfs.Node) { r.Entries["c"].Rdev++ },
		"contents":      func(r *daxfs.Node) { r.Entries["f"].Data = s.put([]byte("tex!")) },
		"length":        func(r *daxfs.Node) { r.Entries["f"].Data.Size-- },
		"target":        func(r *daxfs.Node) { r.Entries["l"].Target = "g" },
		"xattr value":   func(r *daxfs.Node) { r.Entries["f"].Xattrs[0].Value = nil },
		"xattr missing": func(r *daxfs.Node) { r.Entries["f"].Xattrs = nil },
		"xattr more":    func(r *daxfs.Node) { r.Xattrs = []daxfs.Xattr{{Name: "user.b"}} },
		"entry missing": func(r *daxfs.Node) { delete(r.Entries, "d") },
		"entry more":    func(r *daxfs.Node) { r.Entries["d"].Entries = map[string]*daxfs.Node{"x": symlink("y")} },
		"hard link": func(r *daxfs.Node) {
			f := *r.Entries["f"]
			r.Entries["g"] = &f
		},
	} {
		root := make()
		change(root)
		r := &recorder{TB: t}
		compareTree(r, mnt, root, s)
		if len(r.errors) == 0 {
			t.Errorf("%s: the comparison does not see it", name)
		}
	}
}
