package main

import (
	"archive/tar"
	"bufio"
	"bytes"
	"crypto/sha256"
	"flag"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"
)

var walkEntries = flag.Int("walks.entries", 50_000, "entries of the tree that BenchmarkWalks goes through")

// BenchmarkWalks compares commands that go through all entries of a large tree with GNU tar and find on the same tree:
//
//	go test ./cmd/daxfs -run '^$' -bench Walks -benchtime 1x -walks.entries 1000000
//
// x-wall and x-cpu are the ratios of elapsed and of processor time; the latter is better on a busy
// machine. B/entry is the peak memory of the process, less that of the same command for an almost
// empty tree; anon-B/entry does not count the pages of mapped files. Each reference command is
// measured once, in the same run and on the same disk (TMPDIR).
func BenchmarkWalks(b *testing.B) {
	w := newWalks(b)
	for _, op := range []struct {
		name, args, other string
	}{
		{"export", "daxfs export image | cat", tarRead},
		{"ls-lR", "daxfs ls -lR image", findAll},
		{"inspect", "daxfs inspect image", findAll},
		{"verify", "daxfs verify image", tarRead},
		{"convert-layers", "daxfs convert -q -o new oci:layout", tarWrite},
		{"convert-rootfs", "daxfs convert -q -o new rootfs:tree", tarRead},
		{"pool-put", "daxfs pool put --control '' --name again pool oci:layout", tarWrite},
		{"pool-check", "daxfs pool check full", tarRead},
		{"fuse-find", fuse + "find mnt -ls", findAll},
		{"fuse-tar", fuse + "tar --xattrs -cf - mnt | cat", tarRead},
	} {
		b.Run(op.name, func(b *testing.B) {
			if strings.HasPrefix(op.args, fuse) && os.Getuid() != 0 {
				b.Skip("needs root: mounts")
			}
			other := w.once(b, op.other)
			base := w.small(b, op.args)
			var sum cost
			n := 0.0
			for b.Loop() {
				c := w.large(b, op.args)
				sum.wall, sum.cpu = sum.wall+c.wall, sum.cpu+c.cpu
				sum.peak, sum.anon = max(sum.peak, c.peak), max(sum.anon, c.anon)
				n++
			}
			b.ReportMetric(sum.cpu/n, "cpu-s")
			b.ReportMetric(sum.wall/n/other.wall, "x-wall")
			b.ReportMetric(sum.cpu/n/other.cpu, "x-cpu")
			b.ReportMetric(float64(sum.peak-base.peak)/float64(w.entries), "B/entry")
			b.ReportMetric(float64(sum.anon-base.anon)/float64(w.entries), "anon-B/entry")
		})
	}
}

// The reference commands: read the tree, write it, and list it with all attributes.
const (
	tarRead  = "tar --xattrs -cf - tree | cat"
	tarWrite = "mkdir -p out && tar --xattrs --xattrs-include='*' -xf flat.tar -C out"
	findAll  = "find tree -ls"
)

// fuse mounts the image with a server that ends with the shell, which waits for it and so counts its time.
const fuse = "daxfs mount -d fuse --foreground image mnt & trap 'kill $!; wait $!' EXIT; " +
	"until mountpoint -q mnt; do kill -0 $!; sleep 0.1; done; "

// walks has a large tree and a small one, each in a directory with flat.tar, layout, image and full pool.
type walks struct {
	entries int
	dirs    [2]string // small, large
	others  map[string]cost
}

func newWalks(b *testing.B) *walks {
	w := &walks{entries: *walkEntries, others: map[string]cost{}}
	self, err := os.Executable()
	if err != nil {
		b.Fatal(err)
	}
	for i, n := range []int{1, w.entries} {
		dir := b.TempDir()
		w.dirs[i] = dir
		if err := os.Symlink(self, filepath.Join(dir, "daxfs")); err != nil { // see TestMain
			b.Fatal(err)
		}
		if err := writeWalks(dir, n); err != nil {
			b.Fatal(err)
		}
		written := w.measure(b, dir, tarWrite)
		for _, line := range []string{
			"mkdir mnt", "mv out tree", "daxfs convert -q -o image oci:layout",
			"daxfs pool init --size 16g full && daxfs pool put --control '' --name first full oci:layout",
		} {
			w.measure(b, dir, line)
		}
		w.others[tarWrite] = written
	}
	return w
}

func (w *walks) small(b *testing.B, line string) cost { return w.run(b, w.dirs[0], line) }
func (w *walks) large(b *testing.B, line string) cost { return w.run(b, w.dirs[1], line) }

// run measures a command after removing its earlier output, with an empty pool.
func (w *walks) run(b *testing.B, dir, line string) cost {
	b.Helper()
	if strings.Contains(line, "pool put") {
		w.measure(b, dir, "rm -f pool pool.index && daxfs pool init --size 16g pool")
	}
	c := w.measure(b, dir, line)
	w.measure(b, dir, "rm -f new pool pool.index")
	return c
}

// once measures a reference command at its first use.
func (w *walks) once(b *testing.B, line string) cost {
	b.Helper()
	if _, ok := w.others[line]; !ok {
		w.others[line] = w.large(b, line)
	}
	return w.others[line]
}

// cost is the cost of a command: seconds, and bytes of memory.
type cost struct {
	wall, cpu float64
	peaks
}

// peaks are the peak memory of the largest process, in bytes: all of it, and without the pages of files,
// which is the largest of samples.
type peaks struct{ peak, anon int64 }

// measure runs a line of shell in a directory. Its output goes nowhere.
func (w *walks) measure(b *testing.B, dir, line string) cost {
	b.Helper()
	cmd := exec.Command("bash", "-ec", line+" >/dev/null")
	cmd.Dir, cmd.Env = dir, append(os.Environ(), "PATH="+dir+":"+os.Getenv("PATH"))
	if os.Getuid() == 0 {
		cmd.SysProcAttr = &syscall.SysProcAttr{Unshareflags: syscall.CLONE_NEWNS} // no mount outlives the line
	}
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	began := time.Now()
	if err := cmd.Start(); err != nil {
		b.Fatal(err)
	}
	done, peak := make(chan struct{}), make(chan peaks)
	go func() { peak <- watchPeak(cmd.Process.Pid, done) }()
	err := cmd.Wait()
	wall := time.Since(began).Seconds()
	close(done)
	if err != nil {
		b.Fatalf("%s: %v: %s", line, err, stderr.String())
	}
	cpu := cmd.ProcessState.UserTime() + cmd.ProcessState.SystemTime()
	return cost{wall, cpu.Seconds(), <-peak}
}

// watchPeak returns the largest peaks of a process and its children until done is closed. rusage is no
// substitute: it counts the memory before exec, which is that of this program.
func watchPeak(pid int, done chan struct{}) (m peaks) {
	children := fmt.Sprintf("/proc/%d/task/%d/children", pid, pid)
	tick := time.NewTicker(5 * time.Millisecond)
	defer tick.Stop()
	for {
		raw, _ := os.ReadFile(children) // none once the process has ended
		for _, p := range append(strings.Fields(string(raw)), fmt.Sprint(pid)) {
			status, _ := os.ReadFile("/proc/" + p + "/status")
			m.peak = max(m.peak, statusBytes(status, "VmHWM:"))
			m.anon = max(m.anon, statusBytes(status, "RssAnon:"))
		}
		select {
		case <-done:
			return m
		case <-tick.C:
		}
	}
}

// statusBytes returns a size in /proc/PID/status, or 0: a process that ends has none.
func statusBytes(status []byte, field string) int64 {
	_, rest, _ := bytes.Cut(status, []byte(field))
	var kib int64
	if _, err := fmt.Sscan(string(rest), &kib); err != nil {
		return 0
	}
	return kib << 10
}

// writeWalks writes flat.tar with at least n entries, and an OCI layout with it as its only layer.
func writeWalks(dir string, n int) error {
	blobs := filepath.Join(dir, "layout", "blobs", "sha256")
	if err := os.MkdirAll(blobs, 0o755); err != nil {
		return err
	}
	flat := filepath.Join(dir, "flat.tar")
	f, err := os.Create(flat)
	if err != nil {
		return err
	}
	defer f.Close()
	h := sha256.New()
	if err := walkTar(io.MultiWriter(f, h), n); err != nil {
		return err
	}
	layer, err := f.Stat()
	if err != nil {
		return err
	}
	diffID := fmt.Sprintf("%x", h.Sum(nil))
	if err := os.Link(flat, filepath.Join(blobs, diffID)); err != nil {
		return err
	}
	blob := func(text string) (string, error) {
		sum := fmt.Sprintf("%x", sha256.Sum256([]byte(text)))
		return sum, os.WriteFile(filepath.Join(blobs, sum), []byte(text), 0o644)
	}
	const media = "application/vnd.oci.image."
	config := fmt.Sprintf(`{"architecture":"amd64","os":"linux","rootfs":{"type":"layers","diff_ids":["sha256:%s"]}}`,
		diffID)
	configSum, err := blob(config)
	if err != nil {
		return err
	}
	manifest := fmt.Sprintf(`{"schemaVersion":2,"mediaType":"%smanifest.v1+json",`+
		`"config":{"mediaType":"%sconfig.v1+json","digest":"sha256:%s","size":%d},`+
		`"layers":[{"mediaType":"%slayer.v1.tar","digest":"sha256:%s","size":%d}]}`,
		media, media, configSum, len(config), media, diffID, layer.Size())
	manifestSum, err := blob(manifest)
	if err != nil {
		return err
	}
	index := fmt.Sprintf(
		`{"schemaVersion":2,"manifests":[{"mediaType":"%smanifest.v1+json","digest":"sha256:%s","size":%d}]}`,
		media, manifestSum, len(manifest))
	if err := os.WriteFile(filepath.Join(dir, "layout", "index.json"), []byte(index), 0o644); err != nil {
		return err
	}
	return os.WriteFile(filepath.Join(dir, "layout", "oci-layout"), []byte(`{"imageLayoutVersion":"1.0.0"}`), 0o644)
}

// walkKinds are the entries of each directory: e(mpty) and s(mall) files, with x(attr), s(y)m- and h(ard) links.
const walkKinds = "eeessessessysehsexsesees"

// walkTar writes a tar with n entries, rounded up to a full directory. Small files have distinct contents.
func walkTar(w io.Writer, n int) error {
	b := bufio.NewWriterSize(w, 1<<20)
	t := walkTarWriter{tar: tar.NewWriter(b)}
	for leaf := 0; t.n < n; leaf++ {
		if leaf%200 == 0 {
			t.add(tar.Header{Typeflag: tar.TypeDir, Name: fmt.Sprintf("part-%03d/", leaf/200)}, nil)
		}
		dir := fmt.Sprintf("part-%03d/module-%05d/", leaf/200, leaf)
		t.add(tar.Header{Typeflag: tar.TypeDir, Name: dir}, nil)
		small := ""
		for i := range len(walkKinds) {
			name := fmt.Sprintf("%sfile-with-a-usual-name-%02d.py", dir, i)
			h := tar.Header{Typeflag: tar.TypeReg, Name: name}
			var contents []byte
			switch walkKinds[i] {
			case 'x':
				h.Format = tar.FormatPAX
				h.PAXRecords = map[string]string{"SCHILY.xattr.user.origin": fmt.Sprintf("package-%d", leaf%100)}
				fallthrough
			case 's':
				contents = fmt.Appendf(nil, "# %s\n%*s\n", name, (leaf*24+i)*7919%2000, "pass")
				small = name
			case 'y':
				h.Typeflag, h.Linkname = tar.TypeSymlink, "../module-00000/file-with-a-usual-name-03.py"
			case 'h':
				h.Typeflag, h.Linkname = tar.TypeLink, small
			}
			t.add(h, contents)
		}
	}
	if t.err == nil {
		t.err = t.tar.Close()
	}
	if t.err == nil {
		t.err = b.Flush()
	}
	return t.err
}

// walkTarWriter adds entries up to the first error.
type walkTarWriter struct {
	tar *tar.Writer
	n   int
	err error
}

func (t *walkTarWriter) add(h tar.Header, contents []byte) {
	t.n++
	h.Mode, h.Size, h.ModTime = 0o755, int64(len(contents)), time.Unix(1_700_000_000+int64(t.n%1000), 0)
	if t.err == nil {
		t.err = t.tar.WriteHeader(&h)
	}
	if t.err == nil {
		_, t.err = t.tar.Write(contents)
	}
}
