package store

import (
	"encoding/binary"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/daxfs/daxfs-snapshotter/pool/region"
)

// Errors of opening a pool say how to fix them.
func TestPoolAdvice(t *testing.T) {
	for name, tc := range map[string]struct {
		change func(k *kit)
		back   func(path string) error // undoes what change did to the file
		want   []string
		not    string // not in the error
	}{
		"another size": {
			func(k *kit) { k.cfg.Pool.Size = 64 << 20 }, nil,
			[]string{
				"has 33554432 bytes, configured are 67108864", "set pool.size to the size that the pool has",
				"daxfs pool grow",
			},
			"",
		},
		"made larger by hand": {
			func(k *kit) {
				k.cfg.Pool.Size = 0
				k.must(os.Truncate(filepath.Join(k.cfg.Root, "pool/live"), 64<<20))
			},
			func(path string) error { return os.Truncate(path, 32<<20) },
			[]string{"has 33554432 bytes, the region has 67108864", "daxfs pool grow"},
			"corrupt",
		},
		"link": {
			func(k *kit) {
				path := filepath.Join(k.cfg.Root, "pool/live")
				k.must(os.Rename(path, path+"2"))
				k.must(os.Symlink(path+"2", path))
			},
			func(path string) error { return os.Rename(path+"2", path) },
			[]string{"name the file that it leads to"},
			"pool init",
		},
		"no index": {
			func(k *kit) {
				all, err := filepath.Glob(filepath.Join(k.cfg.Root, "pool/*.db"))
				if err != nil || len(all) != 1 {
					k.t.Fatalf("indexes %q, %v", all, err)
				}
				k.must(os.Remove(all[0]))
			},
			os.Remove,
			[]string{"the region holds pool", "daxfs pool init --force"},
			"",
		},
	} {
		t.Run(name, func(t *testing.T) {
			k := newKit(t, func(c *Config) { c.Pool.Size = 32 << 20 })
			_, err := Open(t.Context(), k.cfg)
			if err == nil || !strings.Contains(err.Error(), "in use by process") ||
				!strings.Contains(err.Error(), "end what uses it") {
				t.Errorf("a second owner: %v", err)
			}
			before := k.cfg
			path := filepath.Join(k.cfg.Root, "pool/live")
			k.must(k.Close())
			tc.change(k)
			_, err = Open(t.Context(), k.cfg)
			for _, want := range tc.want {
				if err == nil || !strings.Contains(err.Error(), want) {
					t.Errorf("error %v, expected %q in it", err, want)
				}
			}
			if tc.not != "" && err != nil && strings.Contains(err.Error(), tc.not) {
				t.Errorf("error %v, expected no %q in it", err, tc.not)
			}
			if tc.back != nil {
				k.must(tc.back(path))
			}
			k.cfg = before
			k.open()
		})
	}
}

// putLayer stores a layer for a later lookup.
func (k *kit) putLayer() (key string) {
	k.t.Helper()
	return k.stream(file{"a", random(1, 5000)}).Key
}

func (k *kit) has(key string) bool {
	_, err := k.pool.Layer(key)
	return err == nil
}

// A pool missing at one start, because its disk is mounted late, is still good at the next one.
func TestLatePool(t *testing.T) {
	disk := filepath.Join(t.TempDir(), "disk")
	k := newKit(t, func(c *Config) { c.Pool.Path = filepath.Join(disk, "pool") })
	key := k.putLayer()
	k.restart(func() { k.must(os.Rename(disk, disk+".away")) })
	if k.has(key) {
		t.Error("without its pool the store knows the layer")
	}
	other := k.stream(file{"b", random(2, 5000)}).Key
	for range 2 { // twice: either pool is found
		k.restart(func() { k.must(errors.Join(os.Rename(disk, disk+".root"), os.Rename(disk+".away", disk))) })
		if !k.has(key) || k.has(other) {
			t.Error("with its pool back the store does not know the layer, or another pool's")
		}
		k.restart(func() { k.must(errors.Join(os.Rename(disk, disk+".away"), os.Rename(disk+".root", disk))) })
		if k.has(key) || !k.has(other) {
			t.Error("the pool that was made meanwhile is lost")
		}
	}
}

// The kind and the path of the pool can be changed, and changed back.
func TestThereAndBack(t *testing.T) {
	shm := filepath.Join("/dev/shm", filepath.Base(filepath.Dir(t.TempDir()))+".pool")
	defer os.Remove(shm)
	k := newKit(t, nil)
	first := k.cfg.Pool
	key := k.putLayer()
	for name, p := range map[string]Pool{
		"kind": {Kind: region.KindTmpfs, Path: shm, Size: 64 << 20},
		"path": {Kind: region.KindFile, Path: filepath.Join(t.TempDir(), "pool"), Size: 64 << 20},
	} {
		for range 2 {
			k.restart(func() { k.cfg.Pool = p })
			if k.has(key) {
				t.Errorf("%s: the new pool holds the layer", name)
			}
			k.restart(func() { k.cfg.Pool = first })
			if !k.has(key) {
				t.Errorf("%s: the layer is gone", name)
			}
		}
	}
}

// A stranger's file, link or directory in the place of the pool is refused and stays unchanged.
func TestStrangersFile(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("makes files of another user, which needs root")
	}
	own := filepath.Join(t.TempDir(), "own")
	for name, make := range map[string]func(path string) error{
		"file of another user": func(path string) error {
			return errors.Join(os.WriteFile(path, nil, 0o600), os.Chown(path, 65534, 65534))
		},
		"file that others can write": func(path string) error {
			return errors.Join(os.WriteFile(path, nil, 0o600), os.Chmod(path, 0o666))
		},
		"symbolic link": func(path string) error {
			return errors.Join(os.WriteFile(own, nil, 0o600), os.Symlink(own, path))
		},
		"hard link": func(path string) error {
			return errors.Join(os.WriteFile(path+".2", nil, 0o600), os.Link(path+".2", path))
		},
		"directory": func(path string) error { return os.Mkdir(path, 0o700) },
	} {
		t.Run(name, func(t *testing.T) {
			path := filepath.Join(t.TempDir(), "pool")
			if err := make(path); err != nil {
				t.Fatal(err)
			}
			s, err := Open(t.Context(),
				Config{Root: t.TempDir(), Pool: Pool{Kind: region.KindFile, Path: path, Size: 32 << 20}})
			if err == nil {
				s.Close()
				t.Fatal("it became the pool")
			}
			if !strings.Contains(err.Error(), path) {
				t.Errorf("error %v does not name %q", err, path)
			}
			if st, err := os.Stat(path); err != nil || st.Mode().IsRegular() && st.Size() != 0 {
				t.Errorf("it was changed: %v, %v", st, err)
			}
		})
	}
}

// The directory of the default pool in memory must be ours alone.
func TestStrangersDirectory(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("makes files of another user, which needs root")
	}
	for name, change := range map[string]func(dir string) error{
		"of another user":       func(dir string) error { return os.Chown(dir, 65534, 65534) },
		"that others can write": func(dir string) error { return os.Chmod(dir, 0o777) },
	} {
		dir := filepath.Join(t.TempDir(), "shm")
		if err := errors.Join(os.Mkdir(dir, 0o700), change(dir)); err != nil {
			t.Fatal(err)
		}
		if err := checkOwnDir(dir); !errors.Is(err, region.ErrForeign) || !strings.Contains(err.Error(), dir) {
			t.Errorf("a directory %s: %v", name, err)
		}
	}
	if err := checkOwnDir(t.TempDir()); err != nil {
		t.Error(err)
	}
}

// oldPoolFile makes the beginning of a pool of version 1.
func oldPoolFile(t *testing.T, path string) {
	t.Helper()
	b := make([]byte, 64<<20)
	copy(b, "DAXFSPL\x01")
	binary.LittleEndian.PutUint32(b[8:], 1)
	if err := errors.Join(os.MkdirAll(filepath.Dir(path), 0o700), os.WriteFile(path, b, 0o600)); err != nil {
		t.Fatal(err)
	}
}

// nameInMountTable makes the mount table name a path whose mounted file was moved away.
func nameInMountTable(t *testing.T, path string) {
	t.Helper()
	needRoot(t)
	dir := t.TempDir()
	if err := unix.Mount(path, dir, "tmpfs", 0, "size=4096"); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(dir, 0); err != nil {
			t.Error(err)
		}
	})
}

// A pool of version 1 stays unchanged while it is used, then disappears. Images go into a new pool.
func TestVersionOnePool(t *testing.T) {
	for _, explicit := range []bool{false, true} {
		root := t.TempDir()
		path := filepath.Join(root, "pool/region")
		kept := path
		if explicit {
			path = filepath.Join(t.TempDir(), "pool")
			kept = path + ".v1"
		}
		oldPoolFile(t, path)
		index := filepath.Join(root, "pool/index.db")
		if err := errors.Join(os.MkdirAll(filepath.Dir(index), 0o700),
			os.WriteFile(index, []byte("old"), 0o600)); err != nil {
			t.Fatal(err)
		}
		before, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		user, err := os.Open(path) // like a mount or a loop device
		if err != nil {
			t.Fatal(err)
		}
		defer user.Close()
		nameInMountTable(t, path)
		k := newKit(t, func(c *Config) {
			c.Root = root
			if explicit {
				c.Pool.Path = path
			}
		})
		key := k.putLayer()
		k.restart(nil)
		k.sweep()
		if after, err := os.ReadFile(kept); err != nil || string(after) != string(before) || !k.has(key) {
			t.Errorf("explicit=%v: the old pool changed: %v", explicit, err)
		}
		k.must(user.Close())
		k.sweep()
		for _, gone := range []string{kept, index} {
			if _, err := os.Stat(gone); !errors.Is(err, os.ErrNotExist) {
				t.Errorf("explicit=%v: %q is still there: %v", explicit, gone, err)
			}
		}
		k.restart(nil)
		if !k.has(key) {
			t.Error("the layer is gone")
		}
	}
}

// A pool is made again if the process was killed while making it.
func TestHalfMadePool(t *testing.T) {
	k := newKit(t, nil)
	k.restart(func() {
		// The index gets its name only when the pool is complete.
		all, err := filepath.Glob(filepath.Join(k.cfg.Root, "pool/*.db"))
		if err != nil || len(all) != 1 {
			t.Fatalf("indexes %q, %v", all, err)
		}
		k.must(os.Rename(all[0], strings.TrimSuffix(all[0], ".db")+".new"))
	})
	key := k.putLayer()
	k.restart(func() {
		path := filepath.Join(k.cfg.Root, "pool/live")
		k.must(errors.Join(os.Truncate(path, 0), os.Truncate(path, k.cfg.Pool.Size)))
		k.must(os.WriteFile(filepath.Join(k.cfg.Root, "pool/"+indexName(k.regionConfig())+"-12.new"), nil, 0o600))
	})
	if k.has(key) {
		t.Error("a wiped pool holds a layer")
	}
	left, err := filepath.Glob(filepath.Join(k.cfg.Root, "pool/*.new"))
	if err != nil || len(left) != 0 {
		t.Errorf("left over: %q, %v", left, err)
	}
}

func (k *kit) regionConfig() region.Config {
	rc, err := k.cfg.Pool.region(k.cfg.Root)
	k.must(err)
	return rc
}
