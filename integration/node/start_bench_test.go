package node

import (
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"

	v1 "github.com/google/go-containerregistry/pkg/v1"

	"github.com/daxfs/daxfs-snapshotter/integration/stack"
	"github.com/daxfs/daxfs-snapshotter/integration/testimage"
	"github.com/daxfs/daxfs-snapshotter/internal/vmm"
)

// starts is a script that prints a line for each measured time: its name and the seconds. It brings an
// image to the node in both ways, and starts containers of it, each with a process that prints one
// line. $1 is the archive, $2 the image's name in the pool, and the rest the command.
const starts = `cat >/tmp/starts <<'END'
archive=$1; name=$2; shift 2
now() { read -r up idle </proc/uptime; echo $up; }
took() { awk -v name=$1 -v from=$2 -v to=$(now) 'BEGIN {printf "%s %.2f\n", name, to - from}'; }
run() { # SNAPSHOTTER IMAGE WHAT...
	snapshotter=$1; image=$2; from=$3; what=$4; shift 4
	[ "$(ctr run --rm --snapshotter $snapshotter $image c "$@")" = ran ]
	took $snapshotter-$what $from
}
from=$(now)
ctr image import --snapshotter overlayfs --index-name test/image:1 $archive >/dev/null
took overlayfs-ready $from
run overlayfs test/image:1 $from first "$@"
for i in 1 2 3 4 5; do run overlayfs test/image:1 $(now) second "$@"; done
ctr image rm --sync test/image:1 >/dev/null
from=$(now)
daxfs attach $name >/dev/null
took daxfs-ready $from
run daxfs $name $from first "$@"
for i in 1 2 3 4 5; do run daxfs $name $(now) second "$@"; done
daxfs detach $name >/dev/null
ctr content prune references >/dev/null
END
chmod +x /tmp/starts`

// BenchmarkStart compares the times to the first output of an image and to that of a second container
// on one node: for an attached image of the host's pool, and for the same image imported into
// overlayfs from memory. An iteration includes everything; it reports medians, in seconds of the emulated machine.
func BenchmarkStart(b *testing.B) {
	tiny, err := testimage.Tiny()
	if err != nil {
		b.Skip(err)
	}
	python, err := testimage.Python("bench")
	if err != nil {
		b.Skip(err)
	}
	kernel := kernels(b)[0]
	s := stack.New(b, stack.Options{Mode: stack.Streaming, Config: hostConfig})
	images := []struct {
		name    string
		img     v1.Image
		command string
	}{{"tiny", tiny, "/bin/echo ran"}, {"python", python, `/usr/bin/python3 -c 'import json; print("ran")'`}}
	refs := map[string]string{}
	for _, i := range images {
		refs[i.name] = s.Push(i.name, i.img)
		s.Pull(refs[i.name], "daxfs")
	}
	bed := newBed(b)
	lease := filepath.Join(bed.dir, "lease")
	s.Must(os.WriteFile(lease, make([]byte, leaseSize), 0o600))
	n := bed.start(Options{
		Kernel: kernel, Config: readerConfig, RAM: 2048, Devices: []vmm.Device{
			{ID: "pool", Path: filepath.Join(s.Stack.Run, "pool"), Size: poolSize, ReadOnly: true},
			{ID: "lease", Path: lease, Size: leaseSize},
		},
	})
	n.sh("%s", starts)
	for _, i := range images {
		n.give(i.name, i.img)
		n.sh(`cp /host/%[1]s.tar /tmp; i=0
				until daxfs attach %[2]s; do i=$((i+1)); [ $i -lt 120 ]; sleep 0.5; done; daxfs detach %[2]s`,
			i.name, refs[i.name])
	}
	for _, i := range images {
		b.Run(i.name, func(b *testing.B) {
			n.sh("sh -eu /tmp/starts /tmp/%s.tar %s %s", i.name, refs[i.name], i.command) // warm up
			times := map[string][]float64{}
			for range b.N {
				for _, line := range strings.Split(strings.TrimSpace(
					n.sh("sh -eu /tmp/starts /tmp/%s.tar %s %s", i.name, refs[i.name], i.command)), "\n") {
					name, value, _ := strings.Cut(line, " ")
					seconds, err := strconv.ParseFloat(value, 64)
					if err != nil {
						b.Fatalf("the node printed %q: %v", line, err)
					}
					times[name] = append(times[name], seconds)
				}
			}
			median := map[string]float64{}
			for name, list := range times {
				slices.Sort(list)
				median[name] = list[len(list)/2]
				b.ReportMetric(median[name], name+"-s")
			}
			for _, what := range []string{"first", "second"} {
				b.ReportMetric(median["daxfs-"+what]/median["overlayfs-"+what], what+"-ratio")
			}
			b.ReportMetric(0, "ns/op") // the host's clock is meaningless
			b.Logf("%v", times)
		})
	}
}
