package main

import (
	"errors"
	"fmt"
	"path"
	"slices"
	"strings"
	"text/tabwriter"
)

// maxShown is the number of libraries and of containers per image that are printed; all are compared.
const maxShown = 3

// prove inspects the running containers of daxfs and prints what they share.
func (d *demo) prove(f *facts, ps []*process) error {
	mounts, err := d.imageMounts("daxfs")
	if err != nil {
		return err
	}
	d.say("1. The pool is mounted once, and each image is a directory in it, for %d containers:", len(ps))
	for _, m := range mounts {
		d.say("     %s %d:%d, directory %s, on %s (%s)", m.FSType, m.Major, m.Minor, m.Root,
			strings.Replace(m.Mountpoint, d.DaemonRoot(), "<root>", 1), m.VFSOptions)
		f.devices = append(f.devices, [2]int{m.Major, m.Minor})
	}

	f.libraries = libraries(ps)
	if len(f.libraries) == 0 {
		return errors.New("no program text is mapped by all containers: " +
			"the kernel does not show pages, or they have none in common")
	}
	d.say("\n2. The same program text in all containers is the same physical pages" +
		" (page frame numbers, from /proc/PID/pagemap):")
	d.printFrames(f, ps)
	var pages, same, across, acrossSame int
	for _, l := range f.libraries {
		pages, same = pages+l.common[0]+l.common[1], same+l.same[0]+l.same[1]
		across, acrossSame = across+l.acrossCommon, acrossSame+l.acrossSame
	}
	d.say("     %d of %d pages of program text, in %d files, "+
		"are one physical page in all %d containers of their image;",
		same, pages, len(f.libraries), d.containers)
	d.say("     %d of %d are one physical page in both images, "+
		"which have the same file, at the same place in the pool:",
		acrossSame, across)
	var files []string // of the printed libraries
	for _, l := range f.libraries[:min(maxShown, len(f.libraries))] {
		files = append(files, strings.TrimPrefix(l.file, "/"))
	}
	if f.pool, err = d.readPool(files...); err != nil {
		return err
	}
	for _, name := range sortedNames(f.pool.files) {
		var at []string
		for _, off := range f.pool.files[name] {
			at = append(at, fmt.Sprintf("%#x", off))
		}
		d.say("       /%s at pool offset %s", name, strings.Join(at, " and "))
	}

	p := f.pool
	d.say("\n3. Files with the same contents are in the pool once: "+
		"the contents of both images would take %s apart, and take %s: %s saved (%d %%).\n",
		mib(p.apart), mib(p.together), mib(p.apart-p.together), percent(p.apart-p.together, p.apart))
	return nil
}

// printFrames prints one page of each library in the containers.
func (d *demo) printFrames(f *facts, ps []*process) {
	shown := f.libraries[:min(maxShown, len(f.libraries))]
	w := tabwriter.NewWriter(d.out, 0, 8, 2, ' ', 0)
	fmt.Fprint(w, "     CONTAINER\tPID")
	for _, l := range shown {
		fmt.Fprintf(w, "\t%s+%#x", path.Base(l.file), l.sample)
	}
	fmt.Fprintln(w)
	for i, p := range ps {
		if i%d.containers >= maxShown {
			continue
		}
		fmt.Fprintf(w, "     %s\t%d", p.container, p.PID)
		for _, l := range shown {
			fmt.Fprintf(w, "\t%#x", l.frames[i])
		}
		fmt.Fprintln(w)
	}
	w.Flush()
	if d.containers > maxShown {
		d.say("     (and %d more of each image)", d.containers-maxShown)
	}
}

// compare prints the needs of the snapshotters.
func (d *demo) compare(f *facts) {
	d.say("\n4. Memory and disk for the two images and %d containers of each:\n", d.containers)
	w := tabwriter.NewWriter(d.out, 0, 8, 2, ' ', tabwriter.AlignRight)
	fmt.Fprintln(w,
		"snapshotter\tfile pages mapped, summed up\tphysical pages behind them\tpage cache of the images\tdisk\t")
	rows := []figures{f.overlay}
	if f.erofs != nil {
		rows = append(rows, *f.erofs)
	}
	for _, r := range append(rows, f.daxfs) {
		cached := "?"
		if r.cached >= 0 {
			cached = mib(r.cached)
		}
		fmt.Fprintf(w, "%s\t%s\t%s\t%s\t%s\t\n", r.name, mib(r.mapped), mib(r.distinct), cached, mib(r.disk))
	}
	w.Flush()
	d.say("")
	if f.daxfs.cached < 0 {
		d.say("The kernel cannot tell how much of a file is cached (cachestat is there since Linux 6.5).")
	}
	if f.daxfs.pool > 0 {
		why := "left from writing it; the kernel takes them back when it needs memory"
		if d.pool == "tmpfs" {
			why = "which stays in memory; the rest is the page cache of its mounts, through a loop device"
		}
		d.say("Of what daxfs has cached, %s are the pool itself, %s.", mib(f.daxfs.pool), why)
	}
	d.say(`How to read this: with overlayfs, containers share the page cache of the layers that their images
have in common. These two images have none in common, so overlayfs caches their equal files twice.
With daxfs an equal file is one file in all images. With DAX memory the pool's pages are mapped
without any page cache: by every image, container and virtual machine.
See README.md, "When it pays".`)
}

func mib(n int64) string { return fmt.Sprintf("%.1f MiB", float64(n)/(1<<20)) }

func percent(part, whole int64) int64 {
	if whole == 0 {
		return 0
	}
	return 100 * part / whole
}

func sortedNames(m map[string][]int64) []string {
	names := make([]string, 0, len(m))
	for n := range m {
		names = append(names, n)
	}
	slices.Sort(names)
	return names
}
