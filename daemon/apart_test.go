package daemon

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/pkg/archive"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"golang.org/x/sys/unix"

	"github.com/daxfs/daxfs-snapshotter/config"
	"github.com/daxfs/daxfs-snapshotter/internal/slow"
	"github.com/daxfs/daxfs-snapshotter/internal/treetest"
)

// Two images share inodes. An action in a container of one must not be visible in any container or
// view of the other, nor in another container of the same image, and its result must be that of
// overlayfs over unpacked directories of the same layers. So each test compares two scenes, ours and overlayfs's.

// places are the mounts of a scene: two containers of the first image, one of the second, and a view of each.
var places = []string{"first", "twin", "second", "first view", "second view"}

// actors are the places where actions happen; the twin is only observed.
var actors = []string{"first", "second", "first view", "second view"}

// scene is one set of mounted places.
type scene struct {
	name  string
	roots map[string]string
	noACL bool // ACLs are not compared: the kernel shows none of an image
}

func (s *scene) dir(place, name string) string { return filepath.Join(s.roots[place], name) }

// snap takes a snapshot of a directory in all places.
func (s *scene) snap(t *testing.T, dir string) map[string]treetest.Tree {
	t.Helper()
	trees := map[string]treetest.Tree{}
	for _, p := range places {
		tree, err := treetest.FromPath(s.dir(p, dir))
		if err != nil {
			t.Fatalf("%s, %s: %v", s.name, p, err)
		}
		for _, e := range tree {
			if s.noACL {
				delete(e.Xattrs, aclName)
				delete(e.Xattrs, aclDefault)
			}
		}
		trees[p] = tree
	}
	return trees
}

// ACLs in the format of setxattr(2): user::rw-, user:5:r--, group::r--, mask::r--, other::r--.
const (
	aclAccess = "\x02\x00\x00\x00" +
		"\x01\x00\x06\x00\xff\xff\xff\xff" + "\x02\x00\x04\x00\x05\x00\x00\x00" + "\x04\x00\x04\x00\xff\xff\xff\xff" +
		"\x10\x00\x04\x00\xff\xff\xff\xff" + "\x20\x00\x04\x00\xff\xff\xff\xff"
	aclName     = "system.posix_acl_access"
	aclDefault  = "system.posix_acl_default"
	aclUserByte = 12 // where the permissions of the named user begin
)

// contents are the contents of most files: equal files could be mistaken for each other.
var contents = strings.Repeat("equal contents\n", 1000)

// stage returns the files of one action's directory.
func stage(dir string) []treetest.File {
	f := func(name string) string { return dir + "/" + name }
	return []treetest.File{
		treetest.Dir(dir),
		treetest.Reg(f("acl"), contents).X(aclName, aclAccess),
		treetest.Special('3', f("dev"), 1, 3),
		treetest.Reg(f("empty1"), ""),
		treetest.Reg(f("empty2"), ""),
		treetest.Special('6', f("fifo"), 0, 0),
		treetest.Reg(f("h1"), contents),
		treetest.Hard(f("h2"), f("h1")),
		treetest.Reg(f("owned"), contents).Own(7, 8).Perm(0o4711),
		treetest.Dir(f("sub")).Perm(0o750),
		treetest.Dir(f("sub/deep")),
		treetest.Reg(f("sub/deep/z"), contents),
		treetest.Reg(f("sub/z"), contents),
		treetest.Sym(f("sym"), "x"),
		treetest.Reg(f("tagged"), contents).X("user.base", "image"),
		treetest.Reg(f("x"), contents),
		treetest.Reg(f("y"), contents),
	}
}

// imagesOf returns the layers of two images with the same stages; each image also has layers of its own.
func imagesOf(stages []string) (first, second [][]byte) {
	var common []treetest.File
	for _, s := range stages {
		common = append(common, stage(s)...)
	}
	layers := func(name string) [][]byte {
		base := append([]treetest.File{
			treetest.Reg(name, name), treetest.Dir("merged"), treetest.Reg("merged/a", contents),
			treetest.Reg("merged/gone", "gone"), treetest.Dir("opaque"), treetest.Reg("opaque/below", contents),
		}, common...)
		return [][]byte{treetest.Tar(base...), treetest.Tar(
			treetest.Dir("merged"), treetest.Reg("merged/.wh.gone", ""), treetest.Reg("merged/b", contents),
			treetest.Dir("opaque"), treetest.Reg("opaque/.wh..wh..opq", ""), treetest.Reg("opaque/above", name),
		)}
	}
	return layers("first"), layers("second")
}

// unpackTar unpacks a layer as containerd does for overlayfs.
func unpackTar(ctx context.Context, dir string, layer []byte) error {
	_, err := archive.Apply(ctx, dir, bytes.NewReader(layer),
		archive.WithConvertWhiteout(archive.OverlayConvertWhiteout))
	return err
}

// pullTars commits layers, streamed or walked, and returns the name of the top.
func (m *machine) pullTars(ctx context.Context, stream bool, layers [][]byte) string {
	m.t.Helper()
	st, parent := &streaming{m.sn, m.ap, m.store}, ""
	for _, layer := range layers {
		m.names++
		name, key := fmt.Sprintf("default/%d/layer", m.names), fmt.Sprintf("default/%d/extract-1-x layer", m.names)
		if stream {
			desc, diffID, err := st.put(ctx, layer)
			m.must(err)
			m.must(st.unpack(ctx, desc, diffID, name, key, parent))
		} else {
			mounts, err := m.sn.Prepare(ctx, key, parent)
			m.must(err)
			dir := upperOf(mounts)
			if dir == "" {
				dir = mounts[0].Source
			}
			m.must(unpackTar(ctx, dir, layer))
			m.must(m.sn.Commit(ctx, name, key))
		}
		parent = name
	}
	return parent
}

// twoScenes mounts two images with the daemon and with overlayfs over their unpacked layers.
func twoScenes(t *testing.T, f flavour, stages []string) (ours, plain *scene) {
	t.Helper()
	_, m := inside(t, f, func(*config.Config) {})
	ctx := namespaces.WithNamespace(t.Context(), "default")
	first, second := imagesOf(stages)
	ours = &scene{name: "daxfs", roots: map[string]string{}}
	plain = &scene{name: "overlayfs", roots: map[string]string{}}
	mountAt := func(s *scene, place string, mounts []mount.Mount) {
		dir := filepath.Join(m.dir, s.name+" "+place)
		m.must(os.Mkdir(dir, 0o755))
		m.must(mount.All(mounts, dir))
		t.Cleanup(func() {
			if err := mount.UnmountAll(dir, 0); err != nil {
				t.Error(err)
			}
		})
		s.roots[place] = dir
	}

	// The first image is streamed, the second walked, and still they share files.
	tops := map[string]string{"first": m.pullTars(ctx, true, first), "second": m.pullTars(ctx, false, second)}
	lowers := map[string]string{}
	for i, p := range places {
		image, key := imageAt(p), fmt.Sprintf("default/%d/c", 100+i)
		make := m.sn.Prepare
		if isView(p) {
			make = func(ctx context.Context, key, parent string, opts ...snapshots.Opt) ([]mount.Mount, error) {
				return m.sn.View(ctx, key, parent, opts...)
			}
		}
		mounts, err := make(ctx, key, tops[image])
		m.must(err)
		lowers[image] = lowerOf(mounts)
		mountAt(ours, p, mounts)
	}
	wantShared(t, lowers["first"], lowers["second"], stages)
	_, err := unix.Lgetxattr(filepath.Join(lowers["first"], stages[0], "acl"), aclName, nil)
	if errors.Is(err, unix.EOPNOTSUPP) {
		t.Logf("NO ACLS: this kernel has no support for ACLs in EROFS, ACLs of the image are not compared")
		ours.noACL, plain.noACL = true, true
	}

	dirs := map[string]string{}
	for image, layers := range map[string][][]byte{"first": first, "second": second} {
		var below []string
		for i, layer := range layers {
			dir := filepath.Join(m.dir, fmt.Sprintf("%s-%d", image, i))
			m.must(os.Mkdir(dir, 0o755))
			m.must(unpackTar(ctx, dir, layer))
			below = append([]string{dir}, below...)
		}
		dirs[image] = strings.Join(below, ":")
	}
	for i, p := range places {
		options := []string{"lowerdir=" + dirs[imageAt(p)]}
		if isView(p) {
			options = append(options, "ro")
		} else {
			upper, work := filepath.Join(m.dir, fmt.Sprint("upper", i)), filepath.Join(m.dir, fmt.Sprint("work", i))
			m.must(errors.Join(os.Mkdir(upper, 0o755), os.Mkdir(work, 0o755)))
			options = append(options, "upperdir="+upper, "workdir="+work, "index=off")
		}
		mountAt(plain, p, []mount.Mount{{Type: "overlay", Source: "overlay", Options: options}})
	}
	return ours, plain
}

func isView(place string) bool { return strings.HasSuffix(place, " view") }

func imageAt(place string) string {
	if strings.HasPrefix(place, "second") {
		return "second"
	}
	return "first"
}

func lowerOf(mounts []mount.Mount) string {
	for _, o := range mounts[0].Options {
		if dir, ok := strings.CutPrefix(o, "lowerdir="); ok {
			return dir
		}
	}
	return ""
}

// wantShared fails the test unless files of two images share inodes, and within an image only hard links do.
func wantShared(t *testing.T, first, second string, stages []string) {
	t.Helper()
	wantLocked(t, filepath.Join(first, stages[0], "x"), filepath.Join(second, stages[0], "x"))
	seen := map[[2]uint64]string{}
	for _, s := range stages {
		for _, f := range stage(s) {
			if f.Typeflag != '0' && f.Typeflag != '1' {
				continue
			}
			var a, b unix.Stat_t
			err := errors.Join(unix.Lstat(filepath.Join(first, f.Name), &a),
				unix.Lstat(filepath.Join(second, f.Name), &b))
			if err != nil {
				t.Fatalf("%s: %v", f.Name, err)
			}
			if a.Dev != b.Dev || a.Ino != b.Ino {
				t.Fatalf("%q is inode %d:%d in one image and %d:%d in the other: nothing is shared, nothing is tested",
					f.Name, a.Dev, a.Ino, b.Dev, b.Ino)
			}
			id, group := [2]uint64{a.Dev, a.Ino}, f.Name
			if f.Typeflag == '1' {
				group = f.Linkname
			}
			if other, ok := seen[id]; ok && other != group {
				t.Fatalf("%q and %q are one inode", other, f.Name)
			}
			seen[id] = group
		}
	}
}

// wantLocked shows the problem: below the containers, a lock in one image blocks the other.
func wantLocked(t *testing.T, first, second string) {
	t.Helper()
	a, err := os.Open(first)
	if err != nil {
		t.Fatal(err)
	}
	defer a.Close()
	b, err := os.Open(second)
	if err != nil {
		t.Fatal(err)
	}
	defer b.Close()
	if err := flock(unix.LOCK_EX)(a); err != nil {
		t.Fatal(err)
	}
	if err := flock(unix.LOCK_EX)(b); err != unix.EWOULDBLOCK {
		t.Fatalf("a second lock of one inode: %v", err)
	}
}

// acting performs one action in one place and notes the results.
type acting struct {
	dir    string
	notes  []string
	unlike []string // what the image's file system cannot do, although a directory can
}

func (a *acting) path(name string) string { return filepath.Join(a.dir, name) }

// note records a result; errors are compared by number.
func (a *acting) note(what string, err error, more ...any) {
	outcome := "ok"
	var no syscall.Errno
	switch {
	case errors.As(err, &no):
		outcome = unix.ErrnoName(no)
	case err != nil:
		outcome = err.Error()
	}
	a.notes = append(a.notes, strings.TrimSpace(what+": "+outcome+" "+fmt.Sprintln(more...)))
}

// open opens a file and passes it to f; it notes an error.
func (a *acting) open(name string, flags int, f func(*os.File)) {
	file, err := os.OpenFile(a.path(name), flags, 0o640)
	a.note(fmt.Sprintf("open %s %#x", name, flags), err)
	if err != nil {
		return
	}
	f(file)
	a.note("close "+name, file.Close())
}

// write opens a file and writes to it.
func (a *acting) write(name string, flags int, text string) {
	a.open(name, flags, func(f *os.File) {
		n, err := f.WriteString(text)
		a.note("write "+name, err, n)
	})
}

// identity notes whether f preserves a file's inode number, as overlayfs does on copy-up.
func (a *acting) identity(name string, f func()) {
	var before, after unix.Stat_t
	err := unix.Lstat(a.path(name), &before)
	f()
	err = errors.Join(err, unix.Lstat(a.path(name), &after))
	a.note("identity of "+name, err, before.Dev == after.Dev && before.Ino == after.Ino)
}

// now makes times equal if both are after start.
func now(start time.Time) treetest.Exempt {
	fresh := func(e *treetest.Entry) bool { return !time.Unix(e.Mtime.Sec, int64(e.Mtime.Nsec)).Before(start) }
	return func(want, got *treetest.Entry) {
		if fresh(want) && fresh(got) {
			want.Mtime = got.Mtime
		}
	}
}

// TestApart performs every action of a container on files in every place.
func TestApart(t *testing.T) {
	slow.Skip(t, "compares every act in every place")
	for _, f := range fewFlavours(3) {
		t.Run(f.name, func(t *testing.T) {
			var stages []string
			for _, a := range acts {
				stages = append(stages, a.name)
			}
			start := time.Now().Add(-time.Second) // file systems take their time from a coarse clock
			ours, plain := twoScenes(t, f, stages)
			for _, a := range acts {
				t.Run(a.name, func(t *testing.T) {
					was := map[*scene]map[string]treetest.Tree{ours: ours.snap(t, a.name), plain: plain.snap(t, a.name)}
					for _, p := range places {
						if d := treetest.Diff(was[plain][p], was[ours][p], nil); d != "" {
							t.Fatalf("%s at first (- overlayfs, + daxfs):\n%s", p, d)
						}
					}
					for _, actor := range actors {
						notes := map[*scene][]string{}
						for s := range was {
							do := &acting{dir: s.dir(actor, a.name)}
							a.do(do)
							notes[s] = do.notes
							if len(do.unlike) > 0 && s == plain {
								t.Errorf("overlayfs cannot do %q", do.unlike)
							} else if len(do.unlike) > 0 {
								t.Logf("NOT AS ON OVERLAYFS in %s: %q", actor, do.unlike)
							}
							is := s.snap(t, a.name)
							for _, p := range places {
								if p == actor && !isView(p) {
									continue
								}
								if d := treetest.Diff(was[s][p], is[p], nil); d != "" {
									t.Errorf("%s: what was done in %s changed %s:\n%s", s.name, actor, p, d)
								}
							}
							was[s] = is
						}
						same(t, actor, notes[plain], notes[ours])
						if d := treetest.Diff(was[plain][actor], was[ours][actor], now(start)); d != "" {
							t.Errorf("%s afterwards (- overlayfs, + daxfs):\n%s", actor, d)
						}
					}
				})
			}
			t.Run("tools", func(t *testing.T) {
				settleTimes(t, start, ours, plain)
				compareTools(t, ours, plain)
			})
		})
	}
}

// same fails the test unless both scenes have the same results.
func same(t *testing.T, what string, plain, ours []string) {
	t.Helper()
	if slices.Equal(plain, ours) {
		return
	}
	var b strings.Builder
	for i := range max(len(plain), len(ours)) {
		var p, o string
		if i < len(plain) {
			p = plain[i]
		}
		if i < len(ours) {
			o = ours[i]
		}
		if p != o {
			fmt.Fprintf(&b, "- %s\n+ %s\n", p, o)
		}
	}
	t.Errorf("%s (- overlayfs, + daxfs):\n%s", what, b.String())
}
