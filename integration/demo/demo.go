package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	v1 "github.com/google/go-containerregistry/pkg/v1"

	"github.com/daxfs/daxfs-snapshotter/integration/pagemap"
	"github.com/daxfs/daxfs-snapshotter/integration/stack"
	"github.com/daxfs/daxfs-snapshotter/integration/testimage"
)

// imageNames are the repositories of the two images.
var imageNames = [2]string{"web", "jobs"}

type demo struct {
	*stack.Stack
	options
	ctx  context.Context
	refs [2]string
}

// facts are the findings of a run, for the test.
type facts struct {
	daxfs, overlay figures
	erofs          *figures // nil if it is not available here
	devices        [][2]int // device numbers of the mounts of daxfs's images
	pool           poolFacts
	libraries      []library
}

func (d *demo) say(format string, args ...any) { fmt.Fprintf(d.out, format+"\n", args...) }

func (d *demo) run() (*facts, error) {
	images, err := d.makeImages()
	if err != nil {
		return nil, err
	}
	for i, img := range images {
		if err := d.ctx.Err(); err != nil {
			return nil, err
		}
		if d.refs[i], err = d.Push(imageNames[i], img); err != nil {
			return nil, err
		}
	}
	d.say("Two images with the same Python, which have no layer in common: "+
		"%q has it in a layer of its own, %q in its only base layer.\n",
		imageNames[0], imageNames[1])

	f := &facts{}
	if f.daxfs, err = d.measure("daxfs", func(ps []*process) error { return d.prove(f, ps) }); err != nil {
		return nil, err
	}
	d.say("The same containers on containerd's own snapshotters ...")
	if f.overlay, err = d.measure("overlayfs", nil); err != nil {
		return nil, err
	}
	f.erofs = d.measureErofs()
	if d.ctx.Err() != nil {
		return nil, d.ctx.Err()
	}
	d.compare(f)
	return f, nil
}

// makeImages makes the two images. If interrupted, it returns at once; the process's end stops the work.
func (d *demo) makeImages() ([]v1.Image, error) {
	var web, jobs v1.Image
	made := make(chan error, 1)
	go func() {
		var err error
		web, jobs, err = testimage.Twins()
		made <- err
	}()
	select {
	case <-d.ctx.Done():
		return nil, d.ctx.Err()
	case err := <-made:
		return []v1.Image{web, jobs}, err
	}
}

// measureErofs measures containerd's erofs snapshotter if it works; its errors do not fail the demo.
func (d *demo) measureErofs() *figures {
	if _, err := exec.LookPath("mkfs.erofs"); err != nil {
		d.say("  erofs: left out, there is no mkfs.erofs (Debian: erofs-utils)")
		return nil
	}
	f, err := d.measure("erofs", nil)
	if err != nil {
		if d.ctx.Err() == nil {
			first, _, _ := strings.Cut(err.Error(), "\n")
			d.say("  erofs: left out: %s", first)
		}
		return nil
	}
	return &f
}

// measure pulls both images with one snapshotter, starts the containers, calls look, and removes the containers.
func (d *demo) measure(snapshotter string, look func([]*process) error) (f figures, err error) {
	f.name = snapshotter
	for i, ref := range d.refs {
		began := time.Now()
		if err := d.pull(snapshotter, ref); err != nil {
			return f, err
		}
		if look != nil {
			d.say("$ ctr image pull --snapshotter %s %s    # %.1f s", snapshotter, imageNames[i],
				time.Since(began).Seconds())
		}
	}
	var ids []string
	defer func() {
		for _, id := range ids { // including containers without a task
			_, e := d.Try("ctr", "task", "rm", "--force", id)
			if e != nil && !strings.Contains(e.Error(), "not found") {
				err = errors.Join(err, e)
			}
			_, e = d.Try("ctr", "container", "rm", id)
			if e != nil && !strings.Contains(e.Error(), "not found") {
				err = errors.Join(err, e)
			}
		}
	}()
	// Pages that the pull left in the page cache would hide those of the containers.
	if err := d.dropCache(snapshotter); err != nil {
		return f, err
	}
	for i, ref := range d.refs {
		for n := range d.containers {
			if err := d.ctx.Err(); err != nil {
				return f, err
			}
			id := fmt.Sprintf("%s-%s-%d", snapshotter, imageNames[i], n+1)
			ids = append(ids, id)
			if _, err := d.Try("ctr", "run", "--detach", "--snapshotter", snapshotter, ref, id, "/usr/bin/python3",
				"-B", "/app/main.py"); err != nil {
				return f, err
			}
		}
	}
	if look != nil {
		d.say("$ ctr run --detach --snapshotter %s ... python3 /app/main.py    # %d times from each image\n",
			snapshotter, d.containers)
	}
	processes, err := d.processes(ids)
	if err != nil {
		return f, err
	}
	if err := f.add(d, processes); err != nil {
		return f, err
	}
	if look != nil {
		return f, look(processes)
	}
	return f, nil
}

// pull pulls an image. The transfer service knows daxfs and overlayfs; for others the client unpacks.
func (d *demo) pull(snapshotter, ref string) error {
	args := []string{"image", "pull", "--plain-http", "--snapshotter", snapshotter}
	if snapshotter == "erofs" {
		args = append(args, "--local")
	}
	_, err := d.Try("ctr", append(args, ref)...)
	return errors.Join(d.ctx.Err(), err)
}

// processes waits until the programs in the containers are ready and reads their pages.
func (d *demo) processes(ids []string) ([]*process, error) {
	for _, id := range ids {
		if err := d.awaitFile(filepath.Join(d.Rootfs(id), testimage.TwinReady), id); err != nil {
			return nil, err
		}
	}
	out, err := d.Try("ctr", "task", "ls")
	if err != nil {
		return nil, err
	}
	pids := map[string]int{}
	for line := range strings.Lines(out) {
		if f := strings.Fields(line); len(f) == 3 && f[2] == "RUNNING" {
			if pids[f[0]], err = strconv.Atoi(f[1]); err != nil {
				return nil, fmt.Errorf("ctr task ls printed %q: %w", line, err)
			}
		}
	}
	var list []*process
	for i, id := range ids {
		pid, ok := pids[id]
		if !ok {
			return nil, fmt.Errorf("container %q does not run; ctr task ls printed:\n%s", id, out)
		}
		p, err := pagemap.Read(pid)
		if err != nil {
			return nil, fmt.Errorf("container %q: %w", id, err)
		}
		list = append(list, &process{Process: p, container: id, image: i / d.containers})
	}
	return list, nil
}

// awaitFile waits until a file exists. The limit is only a safeguard.
func (d *demo) awaitFile(path, id string) error {
	limit := time.After(2 * time.Minute)
	for {
		if _, err := os.Stat(path); err == nil {
			return nil
		}
		select {
		case <-d.ctx.Done():
			return d.ctx.Err()
		case <-limit:
			return fmt.Errorf("the program in container %q is not ready after two minutes", id)
		case <-time.After(50 * time.Millisecond):
		}
	}
}
