package main

import (
	"errors"
	"fmt"
	"strings"

	"github.com/daxfs/daxfs-snapshotter/daemon/api"
	"github.com/daxfs/daxfs-snapshotter/store/shared"
)

// rower writes a row of a table with two columns.
type rower func(name, format string, args ...any)

// readerRows shows the readers of the pool in other kernels.
func readerRows(row rower, r api.Readers) {
	switch r.Mode {
	case "", "none":
		return
	case "keep":
		row("Readers", "not known: all images are kept")
	default:
		row("Readers", "%d lease regions", len(r.List))
	}
	for _, u := range r.List {
		if u.Reader == "" && len(u.Images)+len(u.Earlier)+u.Torn == 0 {
			row("", "nobody (%s)", printable(u.Region))
			continue
		}
		var uses []string
		if len(u.Images) > 0 {
			uses = append(uses, "uses "+shortKeys(u.Images))
		}
		if len(u.Earlier) > 0 {
			uses = append(uses, "used before its last boot "+shortKeys(u.Earlier))
		}
		if u.Torn > 0 {
			uses = append(uses, fmt.Sprintf("keeps all images by %d entries that cannot be read", u.Torn))
		}
		if len(uses) == 0 {
			uses = []string{"uses no image"}
		}
		row("", "%s (%s) %s", printable(u.Reader), printable(u.Region), strings.Join(uses, ", "))
	}
	if r.Error != "" {
		row("", "nothing that a reader may use is freed: %s", message(errors.New(r.Error)))
	}
}

// shortKeys lists some keys of images, and their number.
func shortKeys(keys []string) string {
	const most = 3
	var short []string
	for _, k := range keys[:min(len(keys), most)] {
		short = append(short, shortKey(k))
	}
	if len(keys) > most {
		short = append(short, "…")
	}
	noun := "images"
	if len(keys) == 1 {
		noun = "image"
	}
	return fmt.Sprintf("%d %s (%s)", len(keys), noun, strings.Join(short, ", "))
}

// sharedRows shows the state of the pools of other owners.
func sharedRows(row rower, list []shared.Status) {
	name := "Shared"
	for _, p := range list {
		text := fmt.Sprintf("%s: generation %d, %d images, %d claimed, %d mounted", printable(p.Name),
			p.Generation, p.Images,
			p.Claimed, p.Mounted)
		if p.Driver != "" {
			text += " with " + p.Driver
		}
		switch {
		case p.Leased:
			text += ", lease in " + printable(p.Lease)
		case p.Lease == "":
			text += ", no lease: its owner has to keep all images"
		}
		if p.Error != "" {
			text = fmt.Sprintf("%s, %d images claimed, cannot be used: %s", printable(p.Name), p.Claimed,
				message(errors.New(p.Error)))
		}
		row(name, "%s", text)
		name = ""
		if p.Lost != "" {
			row("", "%s: %s", printable(p.Name), message(errors.New(p.Lost)))
		}
	}
}
