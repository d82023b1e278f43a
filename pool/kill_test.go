package pool

import (
	"bufio"
	"bytes"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/daxfs/daxfs-snapshotter/daxfs"
	"github.com/daxfs/daxfs-snapshotter/internal/testns"
	"github.com/daxfs/daxfs-snapshotter/pool/region"
)

// TestMain runs the child of TestKill instead of the tests on request. The tests may mount.
func TestMain(m *testing.M) {
	if dir := os.Getenv("POOL_TEST_CHILD"); dir != "" {
		seed, _ := strconv.ParseUint(os.Getenv("POOL_TEST_SEED"), 10, 64)
		err := killChild(dir, seed)
		fmt.Println("error:", err)
		os.Exit(1)
	}
	os.Exit(testns.Main(m))
}

// killBodies are the contents of layer and image n. Numbers share some contents.
func killBodies(n int) [][]byte {
	return [][]byte{random(uint64(n), 1000+n), random(uint64(n%3), 50_000), random(uint64(100+n%5), smallMax+5000)}
}

// killChild adds and removes for ever. It announces each step and reports its end.
func killChild(dir string, seed uint64) error {
	r, err := region.Open(region.Config{Kind: region.KindFile, Path: filepath.Join(dir, "pool")})
	if err != nil {
		return err
	}
	p, err := Open(r, filepath.Join(dir, "index"), Options{})
	if err != nil {
		return err
	}
	rng := rand.New(rand.NewPCG(seed, 1))
	for {
		n := rng.IntN(8)
		key := strconv.Itoa(n)
		_, lerr := p.Layer(key)
		_, ierr := p.Image(key)
		switch {
		case lerr != nil:
			fmt.Println("try layer+", key)
			err = childLayer(p, key, n)
			fmt.Println("did layer+", key)
		case ierr != nil && rng.IntN(2) == 0:
			fmt.Println("try image+", key)
			err = childImage(p, key, n)
			fmt.Println("did image+", key)
		case ierr == nil && rng.IntN(2) == 0:
			fmt.Println("try image-", key)
			err = p.RemoveImage(ctx, key)
			fmt.Println("did image-", key)
		default:
			fmt.Println("try layer-", key)
			err = p.RemoveLayer(ctx, key)
			fmt.Println("did layer-", key)
		}
		if err == nil && rng.IntN(3) == 0 {
			err = reap(p)
		}
		if err != nil {
			return err
		}
	}
}

func childLayer(p *Pool, key string, n int) error {
	b := p.Begin()
	defer b.Discard()
	for _, body := range killBodies(n) {
		if _, err := b.Put(ctx, int64(len(body)), bytes.NewReader(body)); err != nil {
			return err
		}
	}
	return b.CommitLayer(ctx, key, []byte(key))
}

func childImage(p *Pool, key string, n int) error {
	b := p.Begin()
	defer b.Discard()
	var files []daxfs.Data
	for _, body := range killBodies(n) {
		d, err := b.Put(ctx, int64(len(body)), bytes.NewReader(body))
		if err != nil {
			return err
		}
		files = append(files, d)
	}
	_, err := p.AddImage(ctx, key, tree(files...), daxfs.Options{})
	return err
}

// TestKill kills a process that adds and removes, at any moment, and examines the pool: reported steps
// must be complete, and the last announced step complete or absent.
func TestKill(t *testing.T) {
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	rounds := 12
	if testing.Short() {
		rounds = 3
	}
	dir := t.TempDir()
	r := openRegion(t, dir, 64<<20)
	index := filepath.Join(dir, "index")
	p, err := Create(r, index, Options{})
	if err != nil {
		t.Fatal(err)
	}
	if err := p.Close(); err != nil {
		t.Fatal(err)
	}
	m := newModel()
	rng := rand.New(rand.NewPCG(3, 3))
	steps := 0
	for round := range rounds {
		// The lock belongs to an open file: this process must not keep it.
		r.Close()
		next := killOnce(t, exe, dir, round, time.Duration(rng.IntN(400))*time.Millisecond, m, &steps)
		if r, err = region.Open(region.Config{Kind: region.KindFile, Path: filepath.Join(dir, "pool")}); err != nil {
			t.Fatal(err)
		}
		p, err := Open(r, index, Options{})
		if err != nil {
			t.Fatalf("round %d: %v", round, err)
		}
		mustCheck(t, p)
		before, after := m.matches(p), next.matches(p)
		if before != nil && after != nil {
			t.Fatalf("round %d: neither as before the last step (%v) nor as after it (%v)", round, before, after)
		}
		if after == nil {
			m = next
		}
		if err := p.Close(); err != nil {
			t.Fatal(err)
		}
	}
	r.Close()
	t.Logf("%d steps in %d lives", steps, rounds)
	if steps < rounds {
		t.Errorf("the children did %d steps in all: nothing was tested", steps)
	}
}

// killOnce runs a child for a while, updates m, and returns the model after the interrupted step.
func killOnce(t *testing.T, exe, dir string, round int, life time.Duration, m *model, steps *int) *model {
	cmd := exec.Command(exe)
	cmd.Env = append(os.Environ(), "POOL_TEST_CHILD="+dir, "POOL_TEST_SEED="+strconv.Itoa(round))
	cmd.Stderr = os.Stderr
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	next := m.clone()
	killer := time.AfterFunc(time.Minute, func() { cmd.Process.Kill() })
	started := false
	for s := bufio.NewScanner(out); s.Scan(); {
		line := s.Text()
		if line == "" || strings.HasPrefix(line, "error:") {
			t.Errorf("child: %q", line)
			break
		}
		if *steps++; !started {
			started = true // the clock runs from the first step on
			killer.Reset(life)
		}
		verb, key, _ := strings.Cut(strings.TrimPrefix(strings.TrimPrefix(line, "try "), "did "), " ")
		if strings.HasPrefix(line, "did") {
			m.layers, m.images = next.layers, next.images
			next = m.clone()
			continue
		}
		n, _ := strconv.Atoi(key)
		switch verb {
		case "layer+":
			next.layers[key] = killBodies(n)
		case "image+":
			next.images[key] = killBodies(n)
		case "layer-":
			delete(next.layers, key)
		case "image-":
			delete(next.images, key)
		}
	}
	killer.Stop()
	cmd.Process.Kill()
	_ = cmd.Wait() // it was killed
	return next
}
