package main

import (
	"fmt"
	"strings"
	"text/tabwriter"
	"time"
)

// prove prints what the machines copied and cached, and which memory of the host they share.
func (d *demo) prove(f *facts, _ []string) error {
	d.say("\n1. What each machine has of the images, with a container of each running:")
	w := tabwriter.NewWriter(d.out, 0, 8, 2, ' ', 0)
	fmt.Fprintln(w, "     MACHINE\tPULLED\tMANIFESTS COPIED\tUNPACKED OR CONVERTED\tPAGE CACHE")
	for _, m := range d.nodes {
		now, err := m.memory()
		if err != nil {
			return err
		}
		f.before, f.after = append(f.before, m.before), append(f.after, now)
		fmt.Fprintf(w, "     %s\t%d B\t%d B\t%s\t%s, %s before\n", m.name, now.pulled, now.content-m.before.content,
			kib(now.snapshots-m.before.snapshots), mib(now.cached), mib(m.before.cached))
	}
	if err := w.Flush(); err != nil {
		return err
	}

	d.say("\n2. The pool's memory on the host, by the kernel's account of each emulator (/proc/PID/smaps):")
	w = tabwriter.NewWriter(d.out, 0, 8, 2, ' ', 0)
	fmt.Fprintln(w, "     MACHINE\tHAS MAPPED (Rss)\tITS SHARE OF THAT (Pss)")
	var sum int64
	for _, m := range d.nodes {
		rss, pss, err := m.Mapped(d.PoolFile())
		if err != nil {
			return err
		}
		fmt.Fprintf(w, "     %s\t%s\t%s\n", m.name, mib(rss<<10), mib(pss<<10))
		f.mapped, f.together, sum = append(f.mapped, rss), f.together+pss, sum+rss
	}
	if err := w.Flush(); err != nil {
		return err
	}
	d.say("     Together they have mapped %s, and that is %s of memory.\n", mib(sum<<10), mib(f.together<<10))
	return nil
}

func mib(n int64) string { return fmt.Sprintf("%.1f MiB", float64(n)/(1<<20)) }
func kib(n int64) string { return fmt.Sprintf("%d KiB", n>>10) }

// addLate adds an image on the host while the machines run, and runs it in them.
func (d *demo) addLate(f *facts, refs []string) error {
	d.say("3. An image that the host adds now:")
	late := refs[2]
	if err := d.pull(late); err != nil {
		return err
	}
	return d.each(func(m *machine) error {
		if err := m.attach(late); err != nil {
			return err
		}
		out, err := m.Sh(`ctr run --rm --snapshotter daxfs %s late /bin/echo hello from the late image`, late)
		if err != nil {
			return err
		}
		f.late = append(f.late, strings.TrimSpace(out))
		d.say("%s$ daxfs attach %s && ctr run --snapshotter daxfs ... /bin/echo ...    # %s", m.name, shortName(late),
			strings.TrimSpace(out))
		return nil
	})
}

// remove removes an image on the host while one machine still uses it.
func (d *demo) remove(f *facts, refs []string) error {
	web, user, other := refs[0], d.nodes[0], d.nodes[1]
	d.say("\n4. The host removes %s, which both machines use:", shortName(web))
	if _, err := d.Try("ctr", "image", "rm", "--sync", web); err != nil {
		return err
	}
	done := `ctr task rm --force %[2]s; ctr container rm %[2]s; ctr image rm --sync %[1]s`
	if _, err := other.Sh(done, web, shortName(web)); err != nil {
		return fmt.Errorf("machine %q: %w", other.name, err)
	}
	used, err := d.CollectPool(d.PoolFile())
	if err != nil {
		return err
	}
	out, err := user.Sh(`ctr task exec --exec-id late %s /usr/bin/python3 -c 'print("still here")'`, shortName(web))
	if err != nil {
		return fmt.Errorf("machine %q: %w", user.name, err)
	}
	f.kept = strings.TrimSpace(out) == "still here"
	d.say("     %q is done with it, %q starts another process in its container: %s; the pool has %s of contents",
		other.name, user.name,
		strings.TrimSpace(out), mib(used))
	if _, err := user.Sh(done, web, shortName(web)); err != nil {
		return fmt.Errorf("machine %q: %w", user.name, err)
	}
	for range 60 {
		now, err := d.CollectPool(d.PoolFile())
		if err != nil {
			return err
		}
		if now < used {
			f.freed = true
			d.say("     %q is done with it, too: the pool has %s of contents", user.name, mib(now))
			return nil
		}
		select {
		case <-d.ctx.Done():
			return d.ctx.Err()
		case <-time.After(time.Second):
		}
	}
	return fmt.Errorf("the space of %s has not come back", shortName(web))
}
