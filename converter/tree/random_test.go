package tree

import (
	"archive/tar"
	"flag"
	"fmt"
	"io"
	"math/rand/v2"
	"path"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/daxfs/daxfs-snapshotter/daxfs"
	"github.com/daxfs/daxfs-snapshotter/internal/treetest"
)

var (
	seedFlag   = flag.Uint64("tree.seed", 0, "seed of the first random stack; 0 takes one from the clock")
	stacksFlag = flag.Int("tree.stacks", 300, "number of random stacks of layers to compare with containerd")
)

// TestRandomStacks compares random stacks of layers with containerd.
func TestRandomStacks(t *testing.T) {
	requireRoot(t)
	seed, count := *seedFlag, *stacksFlag
	if seed == 0 {
		seed = uint64(time.Now().UnixNano())
	}
	if testing.Short() {
		count = min(count, 10)
	}
	spared, failed := 0, 0
	for i := range count {
		g := generator{r: rand.New(rand.NewPCG(seed+uint64(i), 0))}
		s := g.stack()
		probe := &quiet{TB: t}
		if compare(probe, s.tars()) > 0 {
			spared++
		}
		if probe.message == "" {
			continue
		}
		s, message := shrink(t, s, probe.message)
		t.Errorf("-tree.seed=%d -tree.stacks=1\n%s%s", seed+uint64(i), s, message)
		if failed++; failed == 3 {
			t.FailNow()
		}
	}
	t.Logf("%d stacks from seed %d, of which %d touch the one deliberate difference and were not compared",
		count, seed, spared)
}

// quiet suppresses the output of a comparison.
type quiet struct {
	testing.TB
	message string
}

func (q *quiet) Errorf(format string, args ...any) { q.message = fmt.Sprintf(format, args...) }

// shrink removes entries while the comparison keeps failing.
func shrink(t *testing.T, s stack, message string) (stack, string) {
	for again := true; again; {
		again = false
		for l := range s {
			for i := 0; i < len(s[l]); i++ {
				smaller := append(stack{}, s...)
				smaller[l] = append(append([]treetest.File{}, s[l][:i]...), s[l][i+1:]...)
				probe := &quiet{TB: t}
				if compare(probe, smaller.tars()); probe.message != "" {
					s, message, again = smaller, probe.message, true
					i--
				}
			}
		}
	}
	return s, message
}

func (s stack) String() string {
	var b strings.Builder
	for i, files := range s {
		for _, f := range files {
			fmt.Fprintf(&b, "layer %d: %c %q -> %q mode %o owner %d:%d time %v dev %d:%d %q\n", i, f.Typeflag,
				f.Name, f.Linkname,
				f.Mode, f.Uid, f.Gid, f.ModTime.UTC(), f.Devmajor, f.Devminor, f.PAXRecords)
		}
	}
	return b.String()
}

// generator makes mostly valid stacks of layers: it merges the stack so far to know its tree. Names
// begin with q, so that a link to "/qa" finds nothing on the host.
type generator struct {
	r       *rand.Rand
	done    stack
	cur     []treetest.File
	all     []string // paths of the current tree, by type
	dirs    []string
	links   []string // symbolic links
	others  []string
	counter int
}

func (g *generator) stack() stack {
	layers := 1 + g.r.IntN(4)
	for range layers {
		g.cur = nil
		for range 1 + g.r.IntN(12) {
			f := g.attributes(g.file())
			tried := append(append(stack{}, g.done...), append(append([]treetest.File{}, g.cur...), f))
			root, err := mergeTars(tried)
			if err != nil && g.r.IntN(60) > 0 {
				continue
			}
			g.cur = append(g.cur, f)
			if err != nil {
				return append(g.done, g.cur)
			}
			g.look(root)
		}
		g.done = append(g.done, g.cur)
	}
	return g.done
}

func (g *generator) look(root *daxfs.Node) {
	g.all, g.dirs, g.links, g.others = nil, []string{""}, nil, nil
	tree, err := treetest.FromNode(root, func(daxfs.Data) (io.Reader, error) { return zeros{}, nil })
	if err != nil {
		panic(err)
	}
	for _, e := range tree[1:] {
		g.all = append(g.all, e.Path)
		switch e.Mode & unix.S_IFMT {
		case unix.S_IFDIR:
			g.dirs = append(g.dirs, e.Path)
		case unix.S_IFLNK:
			g.links = append(g.links, e.Path)
		default:
			g.others = append(g.others, e.Path)
		}
	}
}

func pick[T any](g *generator, from []T) (v T) {
	if len(from) == 0 {
		return v
	}
	return from[g.r.IntN(len(from))]
}

// file returns a random entry without attributes.
func (g *generator) file() treetest.File {
	name := g.spell(g.place())
	switch g.r.IntN(20) {
	case 0, 1, 2, 3:
		return treetest.Dir(name)
	case 4, 5, 6, 7:
		g.counter++
		return treetest.Reg(name, strings.Repeat(fmt.Sprint(g.counter), g.r.IntN(3000)))
	case 8, 9, 10, 11:
		return treetest.Sym(name, g.target())
	case 12, 13:
		return treetest.Hard(name, g.spell(pick(g, append(g.others, g.links...))))
	case 14:
		typ := pick(g, []byte{tar.TypeChar, tar.TypeBlock, tar.TypeFifo})
		return treetest.Special(typ, name, int64(g.r.IntN(5000)), int64(g.r.IntN(1<<21)))
	case 15, 16, 17:
		p := g.place()
		if g.r.IntN(4) > 0 && len(g.all) > 0 {
			p = pick(g, g.all)
		}
		dir, base := path.Split(p)
		return treetest.Reg(g.spell(dir+".wh."+base), "")
	case 18:
		return treetest.Reg(g.spell(path.Join(pick(g, append(g.dirs, g.links...)), ".wh..wh..opq")), "")
	default:
		switch g.r.IntN(3) {
		case 0:
			return treetest.Reg(path.Join(pick(g, g.dirs), ".wh..wh.plnk", "qx"), "x")
		case 1:
			return treetest.Dir(path.Join(pick(g, g.dirs), ".wh..wh.aufs"))
		default:
			return treetest.Dir(pick(g, []string{"./", "/", "..", "../qa", "./../../qb"}))
		}
	}
}

var names = []string{
	"qa", "qb", "qc", "qd", "qe", "q f", "qü", "q\xff\xfe", "q.wh.", ".qa", "q\n",
	"q" + strings.Repeat("n", 254),
}

// place returns a path for an entry: an existing one, a new one in an existing directory, or one with
// missing parents.
func (g *generator) place() string {
	switch g.r.IntN(10) {
	case 0, 1, 2:
		if len(g.all) > 0 {
			return pick(g, g.all)
		}
	case 3, 4, 5:
		if len(g.links) > 0 {
			return path.Join(pick(g, g.links), pick(g, names[:5]))
		}
	case 6:
		return path.Join(pick(g, g.dirs), pick(g, names), pick(g, names[:5]), pick(g, names[:5]))
	}
	name := pick(g, names[:5])
	if g.r.IntN(5) == 0 {
		name = pick(g, names)
	}
	return path.Join(pick(g, g.dirs), name)
}

// spell returns another spelling of a path.
func (g *generator) spell(p string) string {
	how := g.r.IntN(12)
	if first, _, _ := strings.Cut(p, "/"); (how == 2 || how == 5) && slices.Contains(g.links, first) {
		how = 0 // see the package comment, and TestAbsoluteNames
	}
	switch how {
	case 0, 1:
		return "./" + p
	case 2:
		return "/" + p
	case 3:
		return strings.ReplaceAll(p, "/", "//")
	case 4:
		return strings.ReplaceAll(p, "/", "/./")
	case 5:
		return path.Join("..", p)
	case 6:
		return "qz/../" + p
	case 7:
		if len(g.links) > 0 {
			return pick(g, g.links) + "/../" + p
		}
	}
	return p
}

// target returns the target of a symbolic link.
func (g *generator) target() string {
	p := pick(g, append(g.dirs, g.all...))
	switch g.r.IntN(10) {
	case 0, 1:
		return "/" + p
	case 2:
		return strings.Repeat("../", g.r.IntN(4)) + p + "/"
	case 3:
		return pick(g, []string{".", "..", "/", "./..", "../..", "qa/..", "./qa/", "qa/./qb", "qnone", "//qa"})
	case 4:
		return pick(g, names[:5])
	case 5:
		if len(g.links) > 0 {
			return pick(g, g.links) + pick(g, []string{"", "/", "/.", "/..", "/../qa", "/qa", "/./qb"})
		}
	}
	if p == "" {
		p = "."
	}
	return p
}

func (g *generator) attributes(f treetest.File) treetest.File {
	if g.r.IntN(3) == 0 {
		f.Mode = int64(g.r.IntN(0o10000))
	}
	if g.r.IntN(3) == 0 {
		f = f.Own(pick(g, []int{1, 1000, 65534, 1 << 31, 1<<32 - 2, 1<<32 - 1}),
			pick(g, []int{1, 100, 1<<32 - 2, 1<<32 - 1}))
	}
	if g.r.IntN(3) == 0 {
		f = f.At(pick(g, []time.Time{
			time.Unix(0, 0), time.Unix(-1, 5), time.Unix(-100000, 0), time.Unix(1, 999_999_999),
			time.Unix(1<<33, 1), time.Unix(1<<34, 0), time.Unix(int64(g.r.IntN(1<<30)), int64(g.r.IntN(1e9))),
		}))
	}
	for g.r.IntN(5) == 0 {
		f = f.X(pick(g, []string{
			"user.a", "user.b", "security.q", "trusted.a", "trusted.overlay.opaque", "other.a",
			"user.ü",
		}), fmt.Sprint(g.r.IntN(100)))
	}
	if g.r.IntN(10) == 0 {
		f = f.X("security.capability",
			"\x01\x00\x00\x02\x00\x20\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00")
	}
	if g.r.IntN(10) == 0 {
		f = f.X(aclAccess, g.acl())
	}
	if g.r.IntN(4) == 0 && f.Typeflag == tar.TypeDir {
		f = f.X(aclDefault, g.acl())
	}
	return f
}

// acl returns an ACL value, sometimes a useless one.
func (g *generator) acl() string {
	if g.r.IntN(8) == 0 {
		return ""
	}
	perm := func() uint16 { return uint16(g.r.IntN(8)) }
	a := acl{{aclUserObj, perm(), aclNoID}}
	extended := g.r.IntN(3) > 0
	if extended {
		a = append(a, ace{aclUser, perm(), 7}, ace{aclUser, perm(), 8})
	}
	a = append(a, ace{aclGroupObj, perm(), aclNoID})
	if extended || g.r.IntN(2) == 0 {
		a = append(a, ace{aclMask, perm(), 0})
	}
	return string(append(a, ace{aclOther, perm(), aclNoID}).value())
}
