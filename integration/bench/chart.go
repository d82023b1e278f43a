package main

import (
	"errors"
	"fmt"
	"html"
	"io"
	"path/filepath"
	"strings"
)

// charts draws one bar chart for each metric and workload.
func (b *bench) charts(dir string) error {
	var errs []error
	for _, l := range b.loads {
		for _, m := range b.metrics(l.name) {
			name := l.name + "-" + strings.ReplaceAll(m, " ", "-") + ".svg"
			errs = append(errs, writeFile(filepath.Join(dir, name), func(w io.Writer) error { return b.chart(w, l.name, m) }))
		}
	}
	return errors.Join(errs...)
}

// chart draws the medians of a metric as bars, with a line from the least to the greatest value.
func (b *bench) chart(w io.Writer, workload, metric string) error {
	const left, width, bar, gap, top = 130, 420, 18, 8, 34
	type row struct {
		name string
		s    spread
	}
	var rows []row
	most := 0.0
	for _, v := range b.variants {
		if s := b.of(workload, v.name, metric); s.n > 0 {
			rows = append(rows, row{v.name, s})
			most = max(most, s.max)
		}
	}
	if most <= 0 {
		most = 1
	}
	unit, format := "s", "%.2f"
	if name, ok := strings.CutSuffix(metric, " MiB"); ok {
		metric, unit, format = name, "MiB", "%.0f"
	}
	scale := func(x float64) float64 { return max(0, x) / most * width }
	height := top + len(rows)*(bar+gap) + 4
	var t strings.Builder
	fmt.Fprintf(&t, `<svg xmlns="http://www.w3.org/2000/svg" width="%d" height="%d" font-family="sans-serif" font-size="12">`+"\n",
		left+width+70, height)
	fmt.Fprintf(&t, `<rect width="100%%" height="100%%" fill="white"/><text x="8" y="20" font-size="14">%s: %s (%s), median and range</text>`+"\n",
		html.EscapeString(workload), html.EscapeString(metric), unit)
	for i, r := range rows {
		y := top + i*(bar+gap)
		color := "#9aa5b1"
		if strings.HasPrefix(r.name, "daxfs") {
			color = "#2f7ed8"
		}
		middle := float64(y) + bar/2
		fmt.Fprintf(&t, `<text x="%d" y="%.0f" text-anchor="end">%s</text>`, left-8, middle+4, html.EscapeString(r.name))
		fmt.Fprintf(&t, `<rect x="%d" y="%d" width="%.1f" height="%d" fill="%s"/>`, left, y, scale(r.s.median), bar, color)
		fmt.Fprintf(&t, `<line x1="%.1f" x2="%.1f" y1="%.1f" y2="%.1f" stroke="black"/>`, left+scale(r.s.min), left+scale(r.s.max), middle, middle)
		fmt.Fprintf(&t, `<text x="%.1f" y="%.0f">`+format+"</text>\n", left+scale(r.s.max)+6, middle+4, r.s.median)
	}
	t.WriteString("</svg>\n")
	_, err := io.WriteString(w, t.String())
	return err
}
