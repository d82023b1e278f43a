package main

import (
	"cmp"
	"encoding/csv"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/daxfs/daxfs-snapshotter/integration/stack"
)

// spread is the median of some rounds with its extremes.
type spread struct {
	median, min, max float64
	n                int
}

func median(values []float64) float64 { return spreadOf(values).median }

// spreadOf. Preconditions: there is a value.
func spreadOf(values []float64) spread {
	v := slices.Sorted(slices.Values(values))
	mid := v[len(v)/2]
	if len(v)%2 == 0 {
		mid = (mid + v[len(v)/2-1]) / 2
	}
	return spread{mid, v[0], v[len(v)-1], len(v)}
}

// of returns the spread of a metric; n is 0 if it was not measured.
func (b *bench) of(workload, variant, metric string) spread {
	var values []float64
	for _, x := range b.samples {
		if x.Workload == workload && x.Variant == variant && x.Metric == metric {
			values = append(values, x.Value)
		}
	}
	if len(values) == 0 {
		return spread{}
	}
	return spreadOf(values)
}

// ratio is that of two medians, and 0 if one is missing.
func (b *bench) ratio(workload, variant, base, metric string) float64 {
	x, y := b.of(workload, variant, metric), b.of(workload, base, metric)
	if x.n == 0 || y.n == 0 || y.median == 0 {
		return 0
	}
	return x.median / y.median
}

// goal is what a ratio should not exceed.
type goal struct {
	metric, variant, base string
	limit                 float64
}

var goals = []goal{
	{mReady, file, overlay, 0.5},
	{mReady, file, erofs, 0.85},
	{mReady, tmpfs, overlay, 0.5},
	{mReady, tmpfs, erofs, 0.85},
	{mNth, file, overlay, 1.05},
	{mNth, tmpfs, overlay, 1.05},
	{mCache, file, overlay, 1.1},
	{mReady, walking, overlay, 1.2},
	{mFirst, file, overlay, 1.2},
	{mFirst, tmpfs, overlay, 1.2},
	{mFirst, walking, overlay, 1.2},
	{mNth, walking, overlay, 1.2},
}

// report writes all results to a directory.
func (b *bench) report(dir string) error {
	var text strings.Builder
	b.markdown(&text)
	fmt.Print("\n", text.String())
	return errors.Join(
		os.WriteFile(filepath.Join(dir, "results.md"), []byte(text.String()), 0o644),
		writeFile(filepath.Join(dir, "samples.csv"), b.csv),
		b.charts(dir),
	)
}

func writeFile(path string, write func(io.Writer) error) error {
	f, err := os.Create(path)
	if err != nil {
		return err
	}
	return errors.Join(write(f), f.Close())
}

func (b *bench) csv(w io.Writer) error {
	c := csv.NewWriter(w)
	rows := [][]string{{"workload", "variant", "metric", "round", "value"}}
	for _, x := range b.samples {
		rows = append(rows, []string{x.Workload, x.Variant, x.Metric, strconv.Itoa(x.Round + 1), strconv.FormatFloat(x.Value, 'g', 6, 64)})
	}
	return c.WriteAll(rows)
}

// markdown writes goals, ratios and values.
func (b *bench) markdown(w io.Writer) {
	fmt.Fprintf(w, "%s\n\n", describe())
	b.goalTable(w)
	for _, load := range b.loads {
		metrics := b.metrics(load.name)
		if len(metrics) == 0 {
			continue
		}
		fmt.Fprintf(w, "\n### %s, %.0f MiB in %d compressed layers\n\n", load.name, float64(load.packed)/(1<<20), len(load.trees))
		b.table(w, load.name, "against "+overlay, metrics, func(variant, metric string) string {
			if r := b.ratio(load.name, variant, overlay, metric); r > 0 {
				return fmt.Sprintf("%.2f", r)
			}
			return ""
		})
		fmt.Fprintln(w)
		b.table(w, load.name, "median [min..max]", metrics, func(variant, metric string) string {
			s := b.of(load.name, variant, metric)
			if s.n == 0 {
				return ""
			}
			if strings.HasSuffix(metric, "MiB") {
				return fmt.Sprintf("%.0f [%.0f..%.0f]", s.median, s.min, s.max)
			}
			return fmt.Sprintf("%.2f [%.2f..%.2f]", s.median, s.min, s.max)
		})
	}
	b.conversions(w)
}

// metrics lists what was measured of a workload, in the order of the measuring.
func (b *bench) metrics(workload string) []string {
	var list []string
	for _, x := range b.samples {
		if x.Workload == workload && x.Variant != "" && !strings.HasPrefix(x.Metric, "convert") && !slices.Contains(list, x.Metric) {
			list = append(list, x.Metric)
		}
	}
	return list
}

func (b *bench) table(w io.Writer, workload, head string, metrics []string, cell func(variant, metric string) string) {
	fmt.Fprintf(w, "| %s | %s |\n|%s\n", head, strings.Join(metrics, " | "), strings.Repeat(" --- |", len(metrics)+1))
	for _, v := range b.variants {
		cells := []string{v.name}
		for _, m := range metrics {
			cells = append(cells, cell(v.name, m))
		}
		fmt.Fprintf(w, "| %s |\n", strings.Join(cells, " | "))
	}
}

func (b *bench) goalTable(w io.Writer) {
	fmt.Fprintln(w, "| goal | limit |", strings.Join(names(b.loads), " | "), "|")
	fmt.Fprintln(w, "| --- | --- |"+strings.Repeat(" --- |", len(b.loads)))
	for _, g := range goals {
		var cells []string
		any := false
		for _, l := range b.loads {
			r := b.ratio(l.name, g.variant, g.base, g.metric)
			switch {
			case r == 0:
				cells = append(cells, "")
				continue
			case r <= g.limit:
				cells = append(cells, fmt.Sprintf("%.2f", r))
			default:
				cells = append(cells, fmt.Sprintf("**%.2f**", r))
			}
			any = true
		}
		if any {
			fmt.Fprintf(w, "| %s: %s / %s | %.2f | %s |\n", g.metric, g.variant, g.base, g.limit, strings.Join(cells, " | "))
		}
	}
}

func names(loads []*workload) []string {
	var list []string
	for _, l := range loads {
		list = append(list, l.name)
	}
	return list
}

// describe says when, where and with what it was measured.
func describe() string {
	var u unix.Utsname
	kernel := "unknown"
	if unix.Uname(&u) == nil {
		kernel = unix.ByteSliceToString(u.Release[:])
	}
	model := "unknown CPU"
	if raw, err := os.ReadFile("/proc/cpuinfo"); err == nil {
		for line := range strings.Lines(string(raw)) {
			if name, value, ok := strings.Cut(line, ":"); ok && strings.TrimSpace(name) == "model name" {
				model = strings.TrimSpace(value)
				break
			}
		}
	}
	memory := int64(0)
	if m, err := meminfo(); err == nil {
		memory = m["MemTotal"] >> 20
	}
	load := "unknown"
	if raw, err := os.ReadFile("/proc/loadavg"); err == nil {
		load = strings.Join(strings.Fields(string(raw))[:3], " ")
	}
	runc, err := exec.Command("runc", "--version").Output()
	version, _, _ := strings.Cut(string(runc), "\n")
	if err != nil {
		version = "runc unknown"
	}
	return fmt.Sprintf("%s; Linux %s; %d × %s; %d GiB; load at the end %s; %s; %s; %s.",
		time.Now().UTC().Format("2006-01-02"), kernel, runtime.NumCPU(), model, memory, load, stack.Versions(),
		cmp.Or(version, "runc"), runtime.Version())
}
