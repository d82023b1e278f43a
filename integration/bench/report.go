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

// spread is the median and the extremes of some rounds.
type spread struct {
	median, min, max float64
	n                int
}

func median(values []float64) float64 { return spreadOf(values).median }

// spreadOf returns the spread of values. Precondition: there is at least one.
func spreadOf(values []float64) spread {
	v := slices.Sorted(slices.Values(values))
	mid := v[len(v)/2]
	if len(v)%2 == 0 {
		mid = (mid + v[len(v)/2-1]) / 2
	}
	return spread{mid, v[0], v[len(v)-1], len(v)}
}

// of returns the spread of a metric; its n is 0 if nothing was measured.
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

// ratio returns the ratio of two medians, or 0 if one is missing.
func (b *bench) ratio(workload, variant, base, metric string) float64 {
	x, y := b.of(workload, variant, metric), b.of(workload, base, metric)
	if x.n == 0 || y.n == 0 || y.median == 0 {
		return 0
	}
	return x.median / y.median
}

// goal is an upper limit of a ratio.
type goal struct {
	metric, variant, base string
	limit                 float64
}

var goals = []goal{
	{mReady, file, overlay, 0.2},
	{mReady, file, erofs, 0.8},
	{mReady, tmpfs, overlay, 0.2},
	{mReady, tmpfs, erofs, 0.8},
	{mNth, file, overlay, 1.05},
	{mNth, tmpfs, overlay, 1.05},
	{mCache, file, overlay, 1.1},
	{mReady, walking, overlay, 1.05},
	{mDisk, walking, overlay, 1.05},
	{mFirst, file, overlay, 1.2},
	{mFirst, tmpfs, overlay, 1.2},
	{mFirst, walking, overlay, 1.2},
	{mNth, walking, overlay, 1.2},
}

// report writes all results to a directory. where is the result of describe.
func (b *bench) report(dir, where string) error {
	var text strings.Builder
	b.markdown(&text, where)
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
		rows = append(rows, []string{
			x.Workload, x.Variant, x.Metric, strconv.Itoa(x.Round + 1),
			strconv.FormatFloat(x.Value, 'g', 6, 64),
		})
	}
	return c.WriteAll(rows)
}

// markdown writes failures, goals, ratios and values.
func (b *bench) markdown(w io.Writer, where string) {
	fmt.Fprintf(w, "%s\n%d rounds; the run took %.0f minutes.\n\n", where, b.rounds, b.took.Minutes())
	b.missing(w)
	b.goalTable(w)
	for _, load := range b.loads {
		variants := b.measured(load.name)
		if len(variants) == 0 {
			continue
		}
		fmt.Fprintf(w, "\n### %s, %.0f MiB in %d compressed layers\n\n", load.name, float64(load.gzip.size)/(1<<20),
			len(load.trees))
		metrics := b.metrics(load.name)
		b.ratios(w, load.name, overlay, variants, metrics)
		b.values(w, load.name, variants, metrics)
		if slices.Contains(variants, stargz) {
			fmt.Fprintln(w, "\n"+stargzNote)
		}
	}
	b.imageTable(w)
	for _, load := range b.loads {
		b.conversions(w, load)
	}
	if views := b.measured(reading); len(views) > 0 {
		fmt.Fprintf(w, "\n### Reading a file of %d MiB and listing %d files\n\n", bigSize>>20, smallFiles)
		metrics := b.metrics(reading)
		for _, base := range views[:min(2, len(views))] {
			b.ratios(w, reading, base, views, metrics)
		}
		b.values(w, reading, views, metrics)
	}
}

// stargzNote warns readers about the comparison with stargz.
const stargzNote = "stargz (stargz-snapshotter) pulls the same layers as eStargz and loads their contents on demand: " +
	"it is \"ready\" when it has read their tables of contents, fetches what a container reads while it runs and the " +
	"rest behind it. Compare \"ready + first\"; its disk and memory are those of the moment, and its own memory " +
	"counts in \"used\" only."

// missing lists each failure once.
func (b *bench) missing(w io.Writer) {
	if len(b.failures) == 0 {
		return
	}
	var order []string
	times, first := map[string]int{}, map[string]error{}
	for _, f := range b.failures {
		if times[f.what]++; times[f.what] == 1 {
			order, first[f.what] = append(order, f.what), f.err
		}
	}
	fmt.Fprint(w, "**NOT MEASURED, in whole or in part:**\n\n")
	for _, what := range order {
		text := strings.Join(strings.Fields(first[what].Error()), " ")
		fmt.Fprintf(w, "* %s, %d time(s): %.500s\n", what, times[what], text)
	}
	fmt.Fprintln(w)
}

// metrics lists the measured metrics of a workload, in the order of the measurements.
func (b *bench) metrics(workload string) []string {
	var list []string
	for _, x := range b.samples {
		if x.Workload == workload && !slices.Contains(list, x.Metric) {
			list = append(list, x.Metric)
		}
	}
	return list
}

// measured lists the variants with samples of a workload, in the order of the measurements.
func (b *bench) measured(workload string) []string {
	var list []string
	for _, x := range b.samples {
		if x.Workload == workload && !slices.Contains(list, x.Variant) {
			list = append(list, x.Variant)
		}
	}
	return list
}

// unit splits a metric into its name and its unit, and returns the format of its values.
func unit(metric string) (name, unit, format string) {
	if name, ok := strings.CutSuffix(metric, " MiB"); ok {
		return name, "MiB", "%.0f"
	}
	if name, ok := strings.CutSuffix(metric, " ms"); ok {
		return name, "ms", "%.1f"
	}
	return metric, "s", "%.2f"
}

// text formats a spread in the unit of its metric.
func (s spread) text(metric string) string {
	if s.n == 0 {
		return ""
	}
	_, _, f := unit(metric)
	return fmt.Sprintf(f+" ["+f+".."+f+"]", s.median, s.min, s.max)
}

func (b *bench) ratioText(workload, variant, base, metric string) string {
	if r := b.ratio(workload, variant, base, metric); r > 0 {
		return fmt.Sprintf("%.2f", r)
	}
	return ""
}

func (b *bench) ratios(w io.Writer, workload, base string, variants, metrics []string) {
	if !slices.Contains(variants, base) {
		return
	}
	table(w, "against "+base, variants, metrics, func(variant, metric string) string {
		return b.ratioText(workload, variant, base, metric)
	})
	fmt.Fprintln(w)
}

func (b *bench) values(w io.Writer, workload string, variants, metrics []string) {
	table(w, "median [min..max]", variants, metrics, func(variant, metric string) string {
		return b.of(workload, variant, metric).text(metric)
	})
}

func table(w io.Writer, head string, variants, metrics []string, cell func(variant, metric string) string) {
	fmt.Fprintf(w, "| %s | %s |\n|%s\n", head, strings.Join(metrics, " | "), strings.Repeat(" --- |", len(metrics)+1))
	for _, v := range variants {
		cells := []string{v}
		for _, m := range metrics {
			cells = append(cells, cell(v, m))
		}
		fmt.Fprintf(w, "| %s |\n", strings.Join(cells, " | "))
	}
}

// conversions writes the table of all tools.
func (b *bench) conversions(w io.Writer, load *workload) {
	key := converting(load)
	tools := b.measured(key)
	if len(tools) == 0 {
		return
	}
	fmt.Fprintf(w, "\n### Conversion, %s\n\n"+
		"| program | against %s | against %s | s, median [min..max] | MiB |\n| --- | --- | --- | --- | --- |\n",
		load.name, untar, mkfsTar)
	for _, t := range tools {
		size := ""
		if s := b.of(key, t, mConverted); s.n > 0 {
			size = fmt.Sprintf("%.0f", s.median)
		}
		fmt.Fprintf(w, "| %s | %s | %s | %s | %s |\n", t, b.ratioText(key, t, untar, mConvert),
			b.ratioText(key, t, mkfsTar, mConvert),
			b.of(key, t, mConvert).text(mConvert), size)
	}
}

func (b *bench) goalTable(w io.Writer) {
	var rows []string
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
			rows = append(rows, fmt.Sprintf("| %s: %s / %s | %.2f | %s |", g.metric, g.variant, g.base, g.limit,
				strings.Join(cells, " | ")))
		}
	}
	if len(rows) > 0 {
		fmt.Fprintf(w, "| goal | limit | %s |\n| --- | --- |%s\n%s\n", strings.Join(names(b.loads), " | "),
			strings.Repeat(" --- |", len(b.loads)), strings.Join(rows, "\n"))
	}
}

// imageGoals are goals for images with contents in common: the workload is a scenario.
var imageGoals = []struct {
	scenario string
	goal
}{
	{scenarioA, goal{mRead, file, overlay, 1.1}},
	{scenarioA, goal{mRead, file, distinctContents, 1.15}},
	{scenarioB, goal{mRead, file, overlay, 0.35}},
}

// furtherGoal is the limit in milliseconds for an image of known layers.
const furtherGoal = 50

// imageTable writes the results of images with contents in common.
func (b *bench) imageTable(w io.Writer) {
	var rows, goals []string
	for _, sc := range scenarios() {
		for _, v := range b.measured(sc.name) {
			cell := func(metric string) string {
				if s := b.of(sc.name, v, metric); s.n > 0 {
					return fmt.Sprintf("%.1f", s.median)
				}
				return ""
			}
			rows = append(rows,
				fmt.Sprintf("| %s: %s | %s | %s | %s | %s | %s | %s | %s |", sc.name, sc.title, v, cell(mRead),
					b.ratioText(sc.name, v, distinctContents, mRead), b.ratioText(sc.name, v, overlay, mRead),
					cell(mSecond), cell(mFurther), cell(mSame)))
		}
	}
	if len(rows) == 0 {
		return
	}
	for _, g := range imageGoals {
		if r := b.ratio(g.scenario, g.variant, g.base, g.metric); r > 0 {
			name := fmt.Sprintf("%s, %s: %s / %s", g.scenario, g.metric, g.variant, g.base)
			goals = append(goals, goalRow(name, r, g.limit))
		}
	}
	if s := b.of(scenarioA, file, mFurther); s.n > 0 {
		goals = append(goals, goalRow(fmt.Sprintf("%s, %s: %s", scenarioA, mFurther, file), s.median, furtherGoal))
	}
	fmt.Fprintf(w, "\n### Images that have contents in common\n\n")
	if len(goals) > 0 {
		fmt.Fprintf(w, "| goal | limit | result |\n| --- | --- | --- |\n%s\n\n", strings.Join(goals, "\n"))
	}
	fmt.Fprintf(w, "| images | snapshotter | page cache, MiB | / %s | / %s | the 2nd image adds, MiB | "+
		"image on known layers ready, ms | new configuration only, ms |\n"+
		"|%s\n%s\n", distinctContents, overlay, strings.Repeat(" --- |", 8), strings.Join(rows, "\n"))
}

func goalRow(name string, value, limit float64) string {
	mark := ""
	if value > limit {
		mark = "**"
	}
	return fmt.Sprintf("| %s | %.2f | %s%.2f%s |", name, limit, mark, value, mark)
}

func names(loads []*workload) []string {
	var list []string
	for _, l := range loads {
		list = append(list, l.name)
	}
	return list
}

// describe describes the time, the machine and the programs. cache is filled by
// integration/bench/prepare.
func describe(cache string) string {
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
	return fmt.Sprintf("%s; Linux %s; %d × %s; %d GiB; disk with %s; load %s.\n"+
		"%s; %s; stargz-snapshotter %s; %s; %s; %s; %s.",
		time.Now().UTC().Format("2006-01-02 15:04 UTC"), kernel, runtime.NumCPU(), model, memory,
		filesystem(cache), load,
		stack.Versions(), version("runc", "--version"), stargzVersion(cache),
		version(filepath.Join(cache, "erofs", "mkfs.erofs"), "--version"), version("tar2sqfs", "--version"),
		version("tar", "--version"),
		runtime.Version())
}

// version returns the first line of a program's version output.
func version(argv ...string) string {
	out, _ := exec.Command(argv[0], argv[1:]...).CombinedOutput() // some print it and fail
	line, _, _ := strings.Cut(strings.TrimSpace(string(out)), "\n")
	return cmp.Or(line, "no "+filepath.Base(argv[0]))
}
