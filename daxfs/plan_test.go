package daxfs_test

import (
	"bytes"
	"errors"
	"fmt"
	"math"
	"os"
	"strings"
	"testing"

	"github.com/daxfs/daxfs-snapshotter/daxfs"
	"golang.org/x/sys/unix"
)

func file(d daxfs.Data) *daxfs.Node { return &daxfs.Node{Mode: unix.S_IFREG | 0o644, Data: d} }

func withXattr(name string, value []byte) *daxfs.Node {
	return ofType(unix.S_IFREG, name, value)
}

func ofType(mode uint32, name string, value []byte) *daxfs.Node {
	return &daxfs.Node{Mode: mode, Xattrs: []daxfs.Xattr{{Name: name, Value: value}}}
}

func TestPlanRefuses(t *testing.T) {
	link := symlink("t")
	link.Xattrs = []daxfs.Xattr{{Name: "system.posix_acl_access", Value: acl(1)}}
	loop := dir(map[string]*daxfs.Node{})
	loop.Entries["x"] = dir(map[string]*daxfs.Node{"up": loop})
	twice := dir(nil)
	deep := dir(nil)
	for range 256 { // the root's path is empty: 256 names of 255 bytes are one byte too many
		deep = dir(map[string]*daxfs.Node{strings.Repeat("n", 255): deep})
	}
	many := &daxfs.Node{Mode: unix.S_IFREG}
	for _, name := range []string{"user.a", "user.b", "user.c", "user.d", "user.e"} {
		many.Xattrs = append(many.Xattrs, daxfs.Xattr{Name: name, Value: make([]byte, 60_000)})
	}
	longList := &daxfs.Node{Mode: unix.S_IFREG}
	for i := range 257 {
		longList.Xattrs = append(longList.Xattrs, daxfs.Xattr{Name: fmt.Sprintf("user.%0250d", i)})
	}
	for name, c := range map[string]struct {
		root *daxfs.Node
		path string
		want string // part of the message
	}{
		"no root":    {nil, "/", "not a directory"},
		"file root":  {file(daxfs.Data{}), "/", "not a directory"},
		"nil node":   {dir(map[string]*daxfs.Node{"a": nil}), "/a", "nil"},
		"empty name": {dir(map[string]*daxfs.Node{"": dir(nil)}), "/", "no name"},
		"dot": {
			dir(map[string]*daxfs.Node{"d": dir(map[string]*daxfs.Node{".": dir(nil)})}),
			"/d", "reserved",
		},
		"dotdot":    {dir(map[string]*daxfs.Node{"..": dir(nil)}), "/", "reserved"},
		"slash":     {dir(map[string]*daxfs.Node{"a/b": dir(nil)}), "/", "'/'"},
		"NUL name":  {dir(map[string]*daxfs.Node{"a\x00b": dir(nil)}), "/", "NUL"},
		"long name": {dir(map[string]*daxfs.Node{strings.Repeat("n", 256): dir(nil)}), "/", "256 bytes"},
		"cycle":     {loop, "/x", `entry "up" is the directory "/"`},
		"directory link": {
			dir(map[string]*daxfs.Node{"a": twice, "b": twice}), "/",
			`entry "b" is the directory "/a"`,
		},
		"no type":   {dir(map[string]*daxfs.Node{"a": {Mode: 0o644}}), "/a", "file type"},
		"odd type":  {dir(map[string]*daxfs.Node{"a": {Mode: 0o160000}}), "/a", "file type"},
		"mode bits": {dir(map[string]*daxfs.Node{"a": {Mode: 1<<16 | unix.S_IFREG}}), "/a", "mode"},
		"uid": {
			dir(map[string]*daxfs.Node{"a": {Mode: unix.S_IFREG, UID: math.MaxUint32}}),
			"/a", "4294967295",
		},
		"gid": {
			dir(map[string]*daxfs.Node{"a": {Mode: unix.S_IFREG, GID: math.MaxUint32}}),
			"/a", "4294967295",
		},
		"nanoseconds": {
			dir(map[string]*daxfs.Node{"a": {Mode: unix.S_IFREG, Mtime: daxfs.Time{Nsec: 1e9}}}),
			"/a", "1000000000",
		},
		"empty target": {dir(map[string]*daxfs.Node{"a": symlink("")}), "/a", "0 bytes"},
		"long target":  {dir(map[string]*daxfs.Node{"a": symlink(strings.Repeat("t", 4096))}), "/a", "4096 bytes"},
		"NUL target":   {dir(map[string]*daxfs.Node{"a": symlink("a\x00b")}), "/a", "NUL"},
		"major": {
			dir(map[string]*daxfs.Node{"a": {Mode: unix.S_IFBLK, Rdev: unix.Mkdev(4096, 0)}}),
			"/a", "4096:0",
		},
		"minor": {
			dir(map[string]*daxfs.Node{"a": {Mode: unix.S_IFCHR, Rdev: unix.Mkdev(0, 1<<20)}}),
			"/a", "0:1048576",
		},
		"path too deep": {
			deep, strings.Repeat("/"+strings.Repeat("n", 255), 256),
			"the path of a directory has 65536 bytes, expected at most 65535",
		},
		"directory with device": {
			dir(map[string]*daxfs.Node{"a": {Mode: unix.S_IFDIR, Rdev: 1}}), "/a",
			"a directory cannot have a device number",
		},
		"contents that overlap": {
			dir(map[string]*daxfs.Node{
				"a": file(daxfs.Data{Size: 4097, Off: 4096}), "b": file(daxfs.Data{Size: 1, Off: 8192}),
			}), "/b", `contents of 1 bytes at 8192 overlap those of "/a", 4097 bytes at 4096`,
		},
		"contents of two sizes": {
			dir(map[string]*daxfs.Node{
				"a": file(daxfs.Data{Size: 2, Off: 4096}), "b": file(daxfs.Data{Size: 1, Off: 4096}),
			}), "/a", `overlap those of "/b"`,
		},
		"negative size":  {dir(map[string]*daxfs.Node{"a": file(daxfs.Data{Size: -1})}), "/a", "negative"},
		"unaligned data": {dir(map[string]*daxfs.Node{"a": file(daxfs.Data{Size: 1, Off: 100})}), "/a", "multiple"},
		"negative data": {
			dir(map[string]*daxfs.Node{"a": file(daxfs.Data{Size: 1, Off: -4096})}),
			"/a", "multiple",
		},
		"endless data": {
			dir(map[string]*daxfs.Node{"a": file(daxfs.Data{Size: math.MaxInt64, Off: 4096})}),
			"/a", "63 bits",
		},
		"fifo with data": {
			dir(map[string]*daxfs.Node{"a": {Mode: unix.S_IFIFO, Data: daxfs.Data{Size: 1}}}), "/a",
			"a fifo cannot have contents",
		},
		"file with target": {
			dir(map[string]*daxfs.Node{"a": {Mode: unix.S_IFREG, Target: "x"}}), "/a",
			"symlink target",
		},
		"file with entries": {dir(map[string]*daxfs.Node{"a": {
			Mode:    unix.S_IFREG,
			Entries: map[string]*daxfs.Node{"b": dir(nil)},
		}}), "/a", "entries"},
		"file with device": {dir(map[string]*daxfs.Node{"a": {Mode: unix.S_IFREG, Rdev: 1}}), "/a", "device number"},
		"xattr namespace": {
			dir(map[string]*daxfs.Node{"a": withXattr("system.nfs4_acl", nil)}), "/a",
			`"system.nfs4_acl"`,
		},
		"xattr no name": {dir(map[string]*daxfs.Node{"a": withXattr("user.", nil)}), "/a", `"user."`},
		"xattr NUL":     {dir(map[string]*daxfs.Node{"a": withXattr("user.a\x00", nil)}), "/a", "xattr"},
		"xattr long name": {
			dir(map[string]*daxfs.Node{"a": withXattr("user."+strings.Repeat("n", 251), nil)}), "/a",
			"255",
		},
		"xattr long value": {
			dir(map[string]*daxfs.Node{"a": withXattr("user.a", make([]byte, 65536))}),
			"/a", "65536 bytes",
		},
		"xattr twice": {dir(map[string]*daxfs.Node{"a": {Mode: unix.S_IFREG, Xattrs: []daxfs.Xattr{
			{Name: "user.a"}, {Name: "user.b"}, {Name: "user.a", Value: []byte("x")},
		}}}), "/a", "twice"},
		"xattrs too many": {dir(map[string]*daxfs.Node{"a": many}), "/a", "xattrs take"},
		"acl short": {dir(map[string]*daxfs.Node{"a": withXattr("system.posix_acl_access",
			[]byte{2, 0, 0, 0})}), "/a", "POSIX ACL"},
		"acl version": {dir(map[string]*daxfs.Node{"a": withXattr("system.posix_acl_access",
			append([]byte{1}, acl(1)[1:]...))}), "/a", "POSIX ACL"},
		"acl tag": {dir(map[string]*daxfs.Node{"a": withXattr("system.posix_acl_access",
			append([]byte{2, 0, 0, 0, 3}, make([]byte, 7)...))}), "/a", "tag 0x3"},
		"acl id": {dir(map[string]*daxfs.Node{"a": withXattr("system.posix_acl_access",
			acl(math.MaxUint32))}), "/a", "4294967295"},
		"acl owner id": {dir(map[string]*daxfs.Node{"a": withXattr("system.posix_acl_access",
			append([]byte{2, 0, 0, 0, 1}, make([]byte, 7)...))}), "/a", "tag 0x1 names id 0"},
		"acl without others": {
			dir(map[string]*daxfs.Node{"a": withXattr("system.posix_acl_access", acl(1)[:36])}),
			"/a", "others",
		},
		"acl of a link":  {dir(map[string]*daxfs.Node{"a": link}), "/a", "symbolic link"},
		"user of a fifo": {dir(map[string]*daxfs.Node{"a": ofType(unix.S_IFIFO, "user.a", nil)}), "/a", "fifo"},
		"capability": {
			dir(map[string]*daxfs.Node{"a": withXattr("security.capability", []byte{0, 0, 0, 1})}),
			"/a", "header 0x1000000",
		},
		"capability root": {dir(map[string]*daxfs.Node{"a": withXattr("security.capability",
			append([]byte{0, 0, 0, 3}, make([]byte, 20)...))}), "/a", "user 0"},
		"xattr list": {dir(map[string]*daxfs.Node{"a": longList}), "/a", "65792 bytes"},
	} {
		t.Run(name, func(t *testing.T) {
			_, err := daxfs.NewPlan(c.root, daxfs.Options{})
			_, live := daxfs.NewLivePlan(c.root, daxfs.Options{}, false)
			_, window := daxfs.NewLivePlan(c.root, daxfs.Options{}, true)
			for _, err := range []error{err, live, window} {
				var te *daxfs.TreeError
				if !errors.Is(err, daxfs.ErrInvalid) || !errors.As(err, &te) {
					t.Fatalf("error %v, expected a TreeError that wraps ErrInvalid", err)
				}
				if te.Path != c.path || !strings.Contains(err.Error(), c.want) {
					t.Errorf("error %q at %q, expected %q at %q", err, te.Path, c.want, c.path)
				}
			}
		})
	}
	for _, label := range []string{"sixteen letters!", "a\x00"} {
		if _, err := daxfs.NewPlan(dir(nil), daxfs.Options{Label: label}); !errors.Is(err, daxfs.ErrInvalid) {
			t.Errorf("label %q: error %v", label, err)
		}
	}
}

// TestPlanTakes: with Options.Take a plan is the same, and directories lose their entries, also after an error.
func TestPlanTakes(t *testing.T) {
	s := newStore(daxfs.BlockSize)
	tree := func() *daxfs.Node {
		root := randomTree(3, 300, s)
		root.Entries["sub"] = dir(map[string]*daxfs.Node{"x": dir(nil)})
		return root
	}
	root := tree()
	kept, err := daxfs.NewPlan(root, daxfs.Options{})
	if err != nil {
		t.Fatal(err)
	}
	sub := root.Entries["sub"]
	if sub == nil || len(sub.Entries) != 1 {
		t.Error("a plan without Take changed the tree")
	}
	taken, err := daxfs.NewPlan(root, daxfs.Options{Take: true})
	if err != nil {
		t.Fatal(err)
	}
	if taken.String() != kept.String() {
		t.Error("Take gives another plan")
	}
	if len(root.Entries) != 0 || len(sub.Entries) != 0 {
		t.Errorf("%d and %d entries are left", len(root.Entries), len(sub.Entries))
	}
	root = tree()
	sub = root.Entries["sub"]
	root.Entries["sub\x00"] = nil // fails after "sub" was planned
	if _, err := daxfs.NewPlan(root, daxfs.Options{Take: true}); !errors.Is(err, daxfs.ErrInvalid) {
		t.Errorf("error %v, expected %v", err, daxfs.ErrInvalid)
	}
	if root.Entries["sub"] != nil || len(sub.Entries) != 0 {
		t.Error("a plan that fails left a directory its entries")
	}
}

func TestPlaceRefuses(t *testing.T) {
	const block = daxfs.BlockSize
	p, err := daxfs.NewPlan(dir(map[string]*daxfs.Node{
		"low":  file(daxfs.Data{Off: 10 * block, Size: block + 1}),
		"none": file(daxfs.Data{Off: 1}),
	}), daxfs.Options{})
	if err != nil {
		t.Fatal(err)
	}
	m := p.MetaSize()
	if err := p.WriteTo(&memFile{}); !errors.Is(err, daxfs.ErrNotPlaced) {
		t.Errorf("write without a place: error %v", err)
	}
	for name, c := range map[string]struct {
		pl   daxfs.Placement
		want string
	}{
		"unaligned image":     {daxfs.Placement{Image: 1, Meta: 12 * block, End: 12*block + m}, "multiples"},
		"unaligned meta":      {daxfs.Placement{Meta: 12*block + 1, End: 13*block + m}, "multiples"},
		"unaligned end":       {daxfs.Placement{Meta: 12 * block, End: 12*block + m + 1}, "multiples"},
		"negative":            {daxfs.Placement{Image: -block, Meta: 12 * block, End: 12*block + m}, "multiples"},
		"meta on block 0":     {daxfs.Placement{Image: block, Meta: block, End: 20*block + m}, "block 0"},
		"end too low":         {daxfs.Placement{Meta: 12 * block, End: 11*block + m}, "before the end"},
		"overflow":            {daxfs.Placement{Meta: 12 * block, End: math.MinInt64}, "before the end"},
		"too large":           {daxfs.Placement{Meta: 12 * block, End: 1 << 44}, "32 bits"},
		"data below image":    {daxfs.Placement{Image: 10 * block, Meta: 12 * block, End: 12*block + m}, "between"},
		"data behind the end": {daxfs.Placement{Meta: block, End: block + m}, "between"},
		"meta on the start":   {daxfs.Placement{Meta: 10 * block, End: 10*block + m}, "overlap"},
		"meta on the tail":    {daxfs.Placement{Meta: 11 * block, End: 11*block + m}, "overlap"},
		"meta ends in data":   {daxfs.Placement{Meta: 11*block - m, End: 30 * block}, "overlap"},
	} {
		if err := p.Place(c.pl); !errors.Is(err, daxfs.ErrInvalid) || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: error %v, expected %q", name, err, c.want)
		}
	}

	two, err := daxfs.NewPlan(dir(map[string]*daxfs.Node{
		"low":  file(daxfs.Data{Off: block, Size: 1}),
		"high": file(daxfs.Data{Off: 1 << 20, Size: 1}),
	}), daxfs.Options{})
	if err != nil {
		t.Fatal(err)
	}
	err = two.Place(daxfs.Placement{Meta: 2 * block, End: 1<<20 + block})
	var te *daxfs.TreeError
	if !errors.As(err, &te) || te.Path != "/high" || !strings.Contains(err.Error(), "/low") {
		t.Errorf("data on both sides: error %v", err)
	}
}

// TestPlaceAgain moves one plan through several places: each gives the same image as a fresh plan.
func TestPlaceAgain(t *testing.T) {
	s := newStore(4 << 20)
	root := randomTree(5, 500, s)
	p, err := daxfs.NewPlan(root, daxfs.Options{})
	if err != nil {
		t.Fatal(err)
	}
	before := p.String()
	file := daxfs.Placement{Meta: s.next, End: s.next + p.MetaSize()}
	seg := daxfs.Placement{Image: 1 << 20, Meta: 1<<20 + daxfs.BlockSize, End: s.next}
	var images [4]memFile
	for i, pl := range []daxfs.Placement{file, seg, file, seg} {
		if err := p.Place(pl); err != nil {
			t.Fatal(err)
		}
		if err := p.Place(daxfs.Placement{Meta: s.next - daxfs.BlockSize}); err == nil {
			t.Fatal("a bad place was taken")
		}
		if err := p.WriteTo(&images[i]); err != nil {
			t.Fatal(err)
		}
	}
	if !bytes.Equal(images[0].b, images[2].b) || !bytes.Equal(images[1].b, images[3].b) {
		t.Error("the same place gave different bytes")
	}
	if after := p.String(); !strings.Contains(after, "\nplace image=1048576 ") || strings.Contains(before, "\nplace") {
		t.Error("the dump does not tell where the image is")
	}
}

func TestPlanDeterministic(t *testing.T) {
	var dumps, images [3][]byte
	for i := range dumps {
		s := newStore(daxfs.BlockSize)
		p, img := s.fileImage(t, randomTree(11, 2000, s), daxfs.Options{Label: "same"})
		dumps[i], images[i] = []byte(p.String()), img
	}
	for i := range dumps {
		if !bytes.Equal(dumps[0], dumps[i]) || !bytes.Equal(images[0], images[i]) {
			t.Errorf("run %d differs from the first", i)
		}
	}
}

// TestUUID: each single change gives another UUID, but the place of the contents does not matter.
func TestUUID(t *testing.T) {
	tree := func() *daxfs.Node {
		return dir(map[string]*daxfs.Node{
			"f": {
				Mode: unix.S_IFREG | 0o644, Data: daxfs.Data{Off: 4096, Size: 5, Sum: [32]byte{1}},
				Xattrs: []daxfs.Xattr{{Name: "user.a", Value: []byte("1")}, {Name: "user.b"}},
			},
			"l": symlink("f"),
			"c": {Mode: unix.S_IFCHR, Rdev: 1},
		})
	}
	seen := map[[16]byte]string{}
	try := func(name string, o daxfs.Options, change func(*daxfs.Node)) [16]byte {
		root := tree()
		change(root)
		p, err := daxfs.NewPlan(root, o)
		if err != nil {
			t.Fatal(err)
		}
		id := p.UUID()
		if id[6]>>4 != 8 || id[8]>>6 != 2 {
			t.Errorf("%s: %x is not a version 8 UUID", name, id)
		}
		return id
	}
	base := try("base", daxfs.Options{}, func(*daxfs.Node) {})
	seen[base] = "base"
	for name, change := range map[string]func(*daxfs.Node){
		"mode":        func(r *daxfs.Node) { r.Entries["f"].Mode++ },
		"uid":         func(r *daxfs.Node) { r.Entries["f"].UID++ },
		"gid":         func(r *daxfs.Node) { r.Entries["f"].GID++ },
		"rdev":        func(r *daxfs.Node) { r.Entries["c"].Rdev++ },
		"seconds":     func(r *daxfs.Node) { r.Mtime.Sec++ },
		"nanoseconds": func(r *daxfs.Node) { r.Mtime.Nsec++ },
		"size":        func(r *daxfs.Node) { r.Entries["f"].Data.Size++ },
		"sum":         func(r *daxfs.Node) { r.Entries["f"].Data.Sum[31]++ },
		"target":      func(r *daxfs.Node) { r.Entries["l"].Target = "g" },
		"xattr name":  func(r *daxfs.Node) { r.Entries["f"].Xattrs[0].Name = "user.c" },
		"xattr value": func(r *daxfs.Node) { r.Entries["f"].Xattrs[0].Value = []byte("2") },
		"name":        func(r *daxfs.Node) { r.Entries["m"] = r.Entries["l"]; delete(r.Entries, "l") },
		"hard link":   func(r *daxfs.Node) { r.Entries["m"] = r.Entries["l"] },
		"copy":        func(r *daxfs.Node) { r.Entries["m"] = symlink("f") },
	} {
		id := try(name, daxfs.Options{}, change)
		if other, ok := seen[id]; ok {
			t.Errorf("%q has the UUID of %q", name, other)
		}
		seen[id] = name
	}
	if try("label", daxfs.Options{Label: "x"}, func(*daxfs.Node) {}) == base {
		t.Error("the label does not count")
	}
	for name, change := range map[string]func(*daxfs.Node){
		"place":       func(r *daxfs.Node) { r.Entries["f"].Data.Off += 4096 },
		"xattr order": func(r *daxfs.Node) { x := r.Entries["f"].Xattrs; x[0], x[1] = x[1], x[0] },
	} {
		if try(name, daxfs.Options{}, change) != base {
			t.Errorf("%s: the UUID is another", name)
		}
	}
}

// TestPlanGolden pins the layout of a small image with one of everything: it detects changes of the format.
func TestPlanGolden(t *testing.T) {
	p, img := goldenImage(t)
	got := p.String() + imageSum(img)
	const name = "testdata/golden.txt"
	if os.Getenv("DAXFS_UPDATE_GOLDEN") != "" {
		if err := os.MkdirAll("testdata", 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(name, []byte(got), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(name)
	if err != nil {
		t.Fatal(err)
	}
	if got != string(want) {
		t.Errorf("the image differs from %s; with DAXFS_UPDATE_GOLDEN=1 the file is written anew\n%s", name, got)
	}
}

func TestPlanReports(t *testing.T) {
	p, _ := goldenImage(t)
	want := []daxfs.LeftOut{
		{Path: "/dev/fifo", Reason: "fifo"},
		{Path: "/dev/null", Reason: "character device"},
		{Path: "/dev/sda", Reason: "block device"},
		{Path: "/dev/sock", Reason: "socket"},
		{Path: "/null-again", Reason: "character device"},
	}
	if got := p.LeftOut(); len(got) != len(want) {
		t.Errorf("left out: %v", got)
	} else {
		for i := range want {
			if got[i] != want[i] {
				t.Errorf("left out: %v, expected %v", got[i], want[i])
			}
		}
	}
	got := p.Stats()
	if got.MetaBytes != p.MetaSize() {
		t.Errorf("metadata %d, expected %d", got.MetaBytes, p.MetaSize())
	}
	got.MetaBytes = 0
	if want := (daxfs.Stats{
		Inodes: 13, Names: 14, Directories: 3, Files: 3, Symlinks: 3, Others: 4, Xattrs: 3,
		V8Inodes: 9, V8Names: 9, FileBytes: 5 + 5000,
	}); got != want {
		t.Errorf("stats %+v, expected %+v", got, want)
	}
	n := 0
	p.Contents(func(d daxfs.Data) {
		if d.Size == 0 || d.Off < daxfs.BlockSize {
			t.Errorf("contents %+v", d)
		}
		n++
	})
	if n != 2 {
		t.Errorf("%d files have contents, expected 2", n)
	}
}

// TestPlanListIsBounded: the list of left out names does not grow with the square of the tree.
func TestPlanListIsBounded(t *testing.T) {
	root := dir(nil)
	deep := root
	for range 15 {
		d := dir(nil)
		deep.Entries = map[string]*daxfs.Node{strings.Repeat("d", 250): d}
		deep = d
	}
	const n = 50_000 // their paths have 190 MB
	deep.Entries = map[string]*daxfs.Node{}
	for i := range n {
		deep.Entries[fmt.Sprint(i)] = &daxfs.Node{Mode: unix.S_IFIFO}
	}
	p, err := daxfs.NewPlan(root, daxfs.Options{})
	if err != nil {
		t.Fatal(err)
	}
	size := 0
	for _, l := range p.LeftOut() {
		size += len(l.Path)
	}
	if size < 16<<20 || size > 17<<20 {
		t.Errorf("paths of %d bytes are listed, expected 16 MiB", size)
	}
	if s := p.Stats(); s.Names-s.V8Names != n {
		t.Errorf("%d names are left out, expected %d", s.Names-s.V8Names, n)
	}
}
