package store

import (
	"bytes"
	"errors"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// harm flips a bit in contents of the pool.
func (k *kit) harm(body []byte) {
	k.t.Helper()
	r := k.pool.Region()
	page := make([]byte, 4096)
	for off := int64(0); off < r.Size(); off += int64(len(page)) {
		_, err := r.ReadAt(page, off)
		k.must(err)
		if bytes.Equal(page, body[:len(page)]) {
			page[100] ^= 8
			_, err = r.WriteAt(page, off)
			k.must(err)
			return
		}
	}
	k.t.Fatal("the pool does not hold the contents")
}

func (k *kit) scrub(want int) {
	k.t.Helper()
	if done, err := k.Scrub(k.t.Context(), 0); err != nil || done.Damaged != want {
		k.t.Fatalf("scrub: %+v, %v; expected %d damaged", done, err, want)
	}
}

// A damaged image stays for its users, and nobody else gets it: no container, no mount by hand, and no
// one after a restart. It disappears once nothing uses it.
func TestDamagedImage(t *testing.T) {
	k := newKit(t, nil)
	ctx := t.Context()
	a, b := file{"a", random(1, 300_000)}, file{"b", random(2, 70_000)}
	base, top := k.stream(b), k.stream(a)
	img, other := image(base, top), image(base)
	need := wants{img.Key: InUse, other.Key: InUse, base.Key: InUse, top.Key: InUse}
	old, err := k.Lower(ctx, img)
	k.must(err)
	beside, err := k.Lower(ctx, other)
	k.must(err)
	user := t.TempDir() // somebody uses it
	k.must(unix.Mount(old, user, "", unix.MS_BIND, ""))
	used := true
	leave := func() {
		if used {
			used = false
			k.must(unix.Unmount(user, 0))
		}
	}
	defer leave()

	k.harm(a.body)
	k.scrub(1)
	refused := func() {
		t.Helper()
		if dir, err := k.Lower(ctx, img); !errors.Is(err, ErrLost) {
			t.Errorf("the damaged image is at %q, %v", dir, err)
		}
		if _, err := k.MountAt(ctx, img.Key, t.TempDir(), true); !errors.Is(err, ErrLost) {
			t.Errorf("the damaged image was mounted by hand: %v", err)
		}
		if err := k.Heal(ctx, nil); !errors.Is(err, ErrLost) || !strings.Contains(err.Error(), img.Key) {
			t.Errorf("healed: %v", err)
		}
		if err := k.Healthy(ctx); !errors.Is(err, ErrLost) {
			t.Errorf("health: %v", err)
		}
	}
	refused()
	k.restart(nil)
	refused()
	k.expect(beside, b)

	k.stream(a) // pulled again
	k.must(k.Heal(ctx, nil))
	k.must(k.Healthy(ctx))
	dir, err := k.Lower(ctx, img)
	k.must(err)
	if dir == old {
		t.Errorf("the image is still at %q", dir)
	}
	k.expect(dir, a, b)
	hand := t.TempDir()
	info, err := k.MountAt(ctx, img.Key, hand, true)
	k.must(err)
	k.expect(hand, a, b)
	k.must(k.UnmountAt(ctx, hand))
	if list := k.Images(); len(list) != 2 || list[1].Key != info.Key || info.Key == img.Key || len(info.Layers) != 2 {
		t.Errorf("images %+v; mounted was %+v", list, info)
	}

	count := func(want int, when string) {
		t.Helper()
		k.must(k.Sweep(ctx, need, false))
		if n := len(k.pool.Images()); n != want {
			t.Errorf("%s: %d images in the pool, expected %d", when, n, want)
		}
	}
	k.scrub(0)
	k.damaged = time.Time{}
	count(3, "in use")
	leave()
	k.damaged = time.Now().Add(time.Hour)
	count(3, "right after the damage was found")
	k.damaged = time.Time{}
	count(2, "not in use")
	if r := k.imageRecord(img.Key); len(r.Layers) != 2 {
		t.Errorf("the record of the rebuilt image is %+v", r)
	}
	if d := k.pool.Damaged(); len(d) != 0 {
		t.Errorf("still damaged: %+v", d)
	}
	k.restart(nil)
	if again, err := k.Lower(ctx, img); err != nil || again != dir {
		t.Errorf("after a restart the image is at %q, %v; it was at %q", again, err, dir)
	}
	k.expect(dir, a, b)
	need = wants{}
	count(0, "unneeded")
	if n := len(k.imageRecords()) + len(k.layerRecords()); n != 0 {
		t.Errorf("%d records are left over", n)
	}
}

// Memory that others can write to is checked before the mount: only changed images are not served.
func TestDamagedBeforeMount(t *testing.T) {
	k := newKit(t, nil)
	ctx := t.Context()
	a, b := file{"a", random(1, 300_000)}, file{"b", random(2, 70_000)}
	bad, good := image(k.stream(a)), image(k.stream(b))
	k.must(k.rebuildOne(ctx, bad))
	k.harm(a.body)
	k.private = false
	if dir, err := k.Lower(ctx, bad); !errors.Is(err, ErrLost) {
		t.Errorf("the damaged image is at %q, %v", dir, err)
	}
	dir, err := k.Lower(ctx, good)
	k.must(err)
	k.expect(dir, b)
	k.stream(a)
	dir, err = k.Lower(ctx, bad)
	k.must(err)
	k.expect(dir, a)
	k.private = true
	k.damaged = time.Time{}
	need := wants{bad.Key: InUse, good.Key: InUse, bad.Layers[0].Key: InUse, good.Layers[0].Key: InUse}
	k.must(k.Sweep(ctx, need, false))
}

// A damaged image that nothing needs goes at once: no overlay is about to use it.
func TestDamagedUnneeded(t *testing.T) {
	k := newKit(t, nil)
	a := file{"a", random(1, 300_000)}
	img := image(k.stream(a))
	k.must(k.rebuildOne(t.Context(), img))
	k.harm(a.body)
	k.scrub(1)
	if k.damaged.IsZero() {
		t.Error("the scrub does not delay the removal of needed images")
	}
	k.must(k.Sweep(t.Context(), wants{}, false))
	if n, d := len(k.pool.Images()), k.pool.Damaged(); n != 0 || len(d) != 0 {
		t.Errorf("%d images are left, and damaged: %+v", n, d)
	}
	k.must(k.Sweep(t.Context(), wants{}, false))
	if n := len(k.imageRecords()) + len(k.layerRecords()); n != 0 {
		t.Errorf("%d records are left over", n)
	}
}
