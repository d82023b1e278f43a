package main

import (
	"io"
	"strings"
	"testing"

	"github.com/daxfs/daxfs-snapshotter/internal/manpage"
)

var manPage = manpage.Page{
	Section: 1,
	Intro: `daxfs makes images out of OCI images, inspects them, checks them, mounts them, and keeps many
of them in pools of shared memory. An image is a read-only file system that Linux mounts both as
EROFS and, with the module of that name, as DAXFS.

Flags may stand before or after arguments. Results go to standard output, messages to standard error.
A command that fails leaves no new output file behind, and an existing one unchanged.`,
	Sections: []manpage.Section{
		{Title: "EXIT STATUS", Text: `0	done

1	an error

2	wrong use

3	verify, pool check or doctor found something wrong

130	interrupted by SIGINT, SIGTERM or SIGHUP`},
		{Title: "JSON", Text: `With --json a command writes JSON to standard output; docs/json.md describes every
field. Errors are still text on standard error.`},
		{Title: "SEE ALSO", Text: "daxfs-snapshotter(8), mount(8), mkfs.erofs(1), ctr(8)\n\n" +
			"https://github.com/daxfs/daxfs-snapshotter"},
	},
}

// The page in docs/man is the output of the commands.
func TestManPage(t *testing.T) {
	app := newApp(&env{stdin: strings.NewReader(""), stdout: io.Discard, stderr: io.Discard})
	manpage.Check(t, "../../docs/man/daxfs.1", manPage.Render(app))
}
