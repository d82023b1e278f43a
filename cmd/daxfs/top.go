package main

import (
	"cmp"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"text/tabwriter"
	"time"

	"github.com/urfave/cli/v2"
	"golang.org/x/sys/unix"

	"github.com/daxfs/daxfs-snapshotter/daemon/api"
)

func init() { register(56, topCommand) }

func topCommand(e *env) *cli.Command {
	return &cli.Command{
		Name:  "top",
		Usage: "show how much of each mounted image is in memory, and which processes map it",
		Description: `
RESIDENT is the part of the image's files in the page cache, SHARED the part of it that other
mounted images have as well. Both count page frames, so memory that a hundred containers use counts
once. On a terminal the list is refreshed until it is interrupted; elsewhere, and with --once, it is
written once. Images mounted with DAX have no cache: their pages are the pool's.

PROCESSES counts the processes that map a file of the image, such as a program that runs from it,
and gives their most frequent names. A file that a container has changed is its own and does not
count. --json lists all processes.

Examples:
   daxfs top
   daxfs top --once --json | jq '.[0]'`,
		Flags: append([]cli.Flag{
			&cli.DurationFlag{Name: "interval", Value: 2 * time.Second, Usage: "look again after `TIME`"},
			&cli.BoolFlag{Name: "once", Usage: "look once"},
			&cli.BoolFlag{Name: "json", Usage: "write JSON, once; sizes are bytes"},
		}, keeperFlags()...),
		Action: e.top,
	}
}

// residentImage is an element of the output of top --json.
type residentImage struct {
	Image      string   `json:"image"`
	Names      []string `json:"names"`
	Driver     string   `json:"driver"`
	Bytes      int64    `json:"bytes"` // of contents
	Resident   int64    `json:"resident"`
	Shared     int64    `json:"shared"` // the part of Resident that other mounted images have too
	Containers int      `json:"containers"`
	// Processes have files of the image mapped.
	Processes []mappingProcess `json:"processes"`
}

func (e *env) top(c *cli.Context) error {
	if err := needArgs(c); err != nil {
		return err
	}
	if c.Duration("interval") < 100*time.Millisecond {
		return wrongUse(c, "--interval %v, expected 100ms or more", c.Duration("interval"))
	}
	again := isTerminal(e.stdout) && !c.Bool("once") && !c.Bool("json")
	for {
		images, err := dialControl(c.String("control")).images(c.Context)
		if err != nil {
			return err
		}
		list, err := residentOf(images)
		if err != nil {
			return err
		}
		if c.Bool("json") {
			return writeJSON(e.stdout, list)
		}
		if again {
			fmt.Fprint(e.stdout, "\x1b[H\x1b[2J")
		}
		if err := showTop(e.stdout, list); err != nil || !again {
			return err
		}
		select {
		case <-c.Context.Done():
			return nil
		case <-time.After(c.Duration("interval")):
		}
	}
}

func showTop(out io.Writer, list []residentImage) error {
	w := tabwriter.NewWriter(out, 0, 8, 2, ' ', 0)
	fmt.Fprintln(w, "IMAGE\tRESIDENT\tSHARED\tSIZE\tCONTAINERS\tPROCESSES\tDRIVER\tNAMES")
	for _, m := range list {
		name := "-"
		if len(m.Names) > 0 {
			name = printable(m.Names[0])
		}
		fmt.Fprintf(w, "%s\t%s\t%s\t%s\t%d\t%s\t%s\t%s\n", shortKey(m.Image), human(m.Resident),
			human(m.Shared), human(m.Bytes),
			m.Containers, processText(m.Processes), m.Driver, name)
	}
	return w.Flush()
}

// processText returns the number of processes and their most frequent names.
func processText(list []mappingProcess) string {
	const most = 3
	count := map[string]int{}
	for _, p := range list {
		count[p.Name]++
	}
	names := slices.Sorted(maps.Keys(count))
	slices.SortStableFunc(names, func(a, b string) int { return cmp.Compare(count[b], count[a]) })
	text := fmt.Sprint(len(list))
	for i, n := range names[:min(len(names), most)] {
		text += []string{": ", ", "}[min(i, 1)] + printable(n)
		if count[n] > 1 {
			text += fmt.Sprintf(" ×%d", count[n])
		}
	}
	if len(names) > most {
		text += ", …"
	}
	return text
}

// inode identifies a file, whatever image it is seen through.
type inode struct{ dev, ino uint64 }

// residentOf reads the files of mounted images. The image with most in memory comes first.
func residentOf(images []api.Image) ([]residentImage, error) {
	cached, users := map[inode]int64{}, map[inode]int{}
	files := make([]map[inode]bool, len(images))
	for i, m := range images {
		if m.Dir == "" {
			continue
		}
		files[i] = map[inode]bool{}
		if err := eachFile(m.Dir, func(id inode, path string) error {
			if files[i][id] {
				return nil
			}
			files[i][id] = true
			users[id]++
			if _, known := cached[id]; known {
				return nil
			}
			n, err := cachedBytes(path)
			cached[id] = n
			return err
		}); err != nil {
			return nil, fmt.Errorf("image %s: %w", shortKey(m.Key), err)
		}
	}
	dirs := make([]string, len(images))
	for i, m := range images {
		dirs[i] = m.Dir
	}
	processes, err := findMappers("/proc", dirs, files)
	if err != nil {
		return nil, err
	}
	list := []residentImage{}
	for i, m := range images {
		if m.Dir == "" {
			continue
		}
		r := residentImage{
			Image: m.Key, Names: append([]string{}, m.Names...), Driver: m.Driver, Bytes: m.Usage.Extents,
			Containers: len(m.Containers),
			Processes:  append([]mappingProcess{}, processes[i]...),
		}
		for id := range files[i] {
			r.Resident += cached[id]
			if users[id] > 1 {
				r.Shared += cached[id]
			}
		}
		list = append(list, r)
	}
	slices.SortStableFunc(list, func(a, b residentImage) int { return cmp.Compare(b.Resident, a.Resident) })
	return list, nil
}

// eachFile calls fn for the regular files below a directory. An image unmounted meanwhile has none.
func eachFile(dir string, fn func(id inode, path string) error) error {
	err := filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil || !d.Type().IsRegular() {
			return err
		}
		var st unix.Stat_t
		if err := unix.Lstat(path, &st); err != nil || st.Size == 0 {
			return err
		}
		return fn(inode{st.Dev, st.Ino}, path)
	})
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	return err
}

// cachedBytes returns how much of a file is in the page cache.
func cachedBytes(path string) (int64, error) {
	f, err := os.OpenFile(path, os.O_RDONLY|unix.O_NOFOLLOW|unix.O_NONBLOCK, 0)
	if err != nil {
		return 0, err
	}
	defer f.Close()
	var st unix.Cachestat_t
	err = unix.Cachestat(uint(f.Fd()), &unix.CachestatRange{}, &st, 0)
	if errors.Is(err, unix.EOPNOTSUPP) {
		return 0, nil // DAX: there is no cache
	}
	if err != nil {
		return 0, fmt.Errorf("cachestat %q (Linux 6.5 or later is needed): %w", path, err)
	}
	return int64(st.Cache) * int64(os.Getpagesize()), nil
}
