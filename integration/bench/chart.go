package main

import (
	"errors"
	"fmt"
	"html"
	"io"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
)

// panel is one group of bars with its own scale.
type panel struct {
	title string
	rows  []bar
}

type bar struct {
	name string
	s    spread
	base float64 // the reference for the ratio in brackets; 0: none
}

// charts draws the tables: a chart per metric of the snapshotters with a panel for each workload, one
// of the conversions, and two of the read paths, cold and warm, with a panel for each way to read.
func (b *bench) charts(dir string) error {
	var errs []error
	draw := func(name, title, metric string, panels []panel) {
		if !slices.ContainsFunc(panels, func(p panel) bool { return len(p.rows) > 0 }) {
			return
		}
		name = strings.Trim(regexp.MustCompile("[^a-zA-Z0-9]+").ReplaceAllString(name, "-"), "-")
		errs = append(errs, writeFile(filepath.Join(dir, name+".svg"),
			func(w io.Writer) error { return chart(w, title, metric, panels) }))
	}
	var metrics []string
	for _, l := range b.loads {
		if list := b.metrics(l.name); len(list) > len(metrics) {
			metrics = list
		}
	}
	for _, m := range metrics {
		var panels []panel
		for _, l := range b.loads {
			panels = append(panels, b.panel(l.name, l.name, overlay, m))
		}
		name, _, _ := unit(m)
		draw(name, name, m, panels)
	}
	var sets []panel
	for _, sc := range scenarios() {
		sets = append(sets, b.panel(sc.name+": "+sc.title, sc.name, overlay, mRead))
	}
	draw("images", "page cache of images with common contents", mRead, sets)
	var conversions []panel
	for _, l := range b.loads {
		conversions = append(conversions, b.panel(l.name, converting(l), untar, mConvert))
	}
	draw("convert", "conversion", mConvert, conversions)
	for _, when := range []string{"cold", "warm"} {
		var panels []panel
		for _, op := range readOps() {
			panels = append(panels, b.panel(op.name, reading, readTmpfs, op.name+" "+when+" ms"))
		}
		draw("read-"+when, "reading, "+when, "read ms", panels)
	}
	return errors.Join(errs...)
}

// panel collects the bars of one metric. The first bar is the base.
func (b *bench) panel(title, workload, base, metric string) panel {
	p := panel{title: title}
	against := b.of(workload, base, metric).median
	for _, v := range b.measured(workload) {
		if s := b.of(workload, v, metric); s.n > 0 {
			p.rows = append(p.rows, bar{v, s, against})
		}
	}
	if against > 0 {
		p.title += ", 1.00 is " + base
	}
	return p
}

// chart draws medians as bars, each with a line from the least to the greatest value and the ratio to the base.
func chart(w io.Writer, title, metric string, panels []panel) error {
	const left, width, right, thick, gap, top = 250, 400, 150, 18, 7, 58
	_, unit, format := unit(metric)
	var t strings.Builder
	y, n := top, 0
	for _, p := range panels {
		if len(p.rows) == 0 {
			continue
		}
		most := 0.0
		for _, r := range p.rows {
			most, n = max(most, r.s.max), max(n, r.s.n)
		}
		scale := func(x float64) float64 { return max(0, x) / max(most, 1e-9) * width }
		fmt.Fprintf(&t, `<text x="12" y="%d" font-size="14" font-weight="bold">%s</text>`+"\n", y+14,
			html.EscapeString(p.title))
		y += 26
		for _, r := range p.rows {
			fill, weight := "#a3adb8", "normal"
			if strings.HasPrefix(r.name, "daxfs") {
				fill, weight = "#2f7ed8", "bold"
			}
			mid := float64(y) + thick/2
			fmt.Fprintf(&t, `<text x="%d" y="%.1f" text-anchor="end" font-weight="%s">%s</text>`, left-8, mid+4, weight,
				html.EscapeString(r.name))
			fmt.Fprintf(&t, `<rect x="%d" y="%d" width="%.1f" height="%d" fill="%s" rx="2"/>`, left, y,
				max(1, scale(r.s.median)), thick, fill)
			low, high := left+scale(r.s.min), left+scale(r.s.max)
			if r.s.max > r.s.min {
				fmt.Fprintf(&t, `<path d="M%.1f %.1fH%.1fM%.1f %.1fv8M%.1f %.1fv8" stroke="#222" fill="none"/>`, low,
					mid, high, low, mid-4, high, mid-4)
			}
			label := fmt.Sprintf(format, r.s.median)
			if r.base > 0 {
				label += fmt.Sprintf(" (%.2f)", r.s.median/r.base)
			}
			fmt.Fprintf(&t, `<text x="%.1f" y="%.1f">%s</text>`+"\n", max(high, left+scale(r.s.median))+8, mid+4, label)
			y += thick + gap
		}
		y += 14
	}
	_, err := fmt.Fprintf(w, `<svg xmlns="http://www.w3.org/2000/svg" width="%d" height="%d"
 font-family="sans-serif" font-size="12" fill="#222">
<rect width="100%%" height="100%%" fill="white"/>
<text x="12" y="24" font-size="17" font-weight="bold">%s, %s</text>
<text x="12" y="42" fill="#666">median of %d, line from least to greatest; in brackets the ratio;
 shorter is better</text>
%s</svg>
`, left+width+right, y, html.EscapeString(title), unit, n, t.String())
	return err
}
