package snapshotter_test

import (
	"os"
	"testing"

	"github.com/daxfs/daxfs-snapshotter/snapshotter"
)

// A layer that was prepared to be streamed, and had to be unpacked, keeps the attributes of the root.
func TestFallbackKeepsRoot(t *testing.T) {
	e := newEnv(t, snapshotter.Options{})
	p := newPull(e)
	ctx := t.Context()
	below, top := "default/1/"+chainA, "default/2/"+chainB
	p.stream(below, "", tarOf("x"))
	// Prepared to be streamed as well.
	m := e.prepare(extractKey(top), below, unpackLabels(top, p.put(tarOf("y")).Digest))
	if option(m, "lowerdir") != "" {
		t.Fatalf("mounts %v", m)
	}
	view, err := e.View(ctx, "default/4/view", below)
	e.must(err)
	want, err := os.Stat(option(view, "lowerdir"))
	e.must(err)
	if want.Mode().Perm() == 0o755 {
		t.Fatalf("the root below is %s, as it would be without one below", want.Mode())
	}
	e.fake.setFull(true)
	_, err = p.Apply(ctx, p.put(tarOf("y")), m)
	e.must(err)
	e.fake.setFull(false)
	e.must(e.Commit(ctx, top, extractKey(top)))
	c := e.prepare("default/5/c", top)
	e.expectFiles(c, "x y")
	st, err := os.Stat(option(c, "upperdir"))
	e.must(err)
	if st.Mode() != want.Mode() {
		t.Errorf("the container's root is %s, that of the layer below %s", st.Mode(), want.Mode())
	}
}
