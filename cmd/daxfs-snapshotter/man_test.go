package main

import (
	"io"
	"testing"

	"github.com/daxfs/daxfs-snapshotter/internal/manpage"
)

var manPage = manpage.Page{
	Section: 8,
	Intro: `daxfs-snapshotter serves containerd as a proxy snapshotter and differ. It keeps the layers of
OCI images in one pool of shared memory, every distinct file once; each image is mounted once, and
each container gets an OverlayFS over that mount.

Flags override the configuration file. The file may be missing; then the pool is a file below the state directory.

Stopping the daemon in any way, SIGKILL included, leaves containers and mounts alone. While it does
not run, no container can be started and no image pulled with it. SIGTERM and SIGINT end it after it
has answered pending requests.`,
	Sections: []manpage.Section{
		{Title: "FILES", Text: `/etc/daxfs-snapshotter/config.toml	the configuration; "daxfs-snapshotter
config default" prints one with all keys explained

/var/lib/daxfs-snapshotter	the state, and the pool unless the configuration says otherwise

/run/daxfs-snapshotter/daxfs.sock	the socket, for root only`},
		{Title: "EXIT STATUS", Text: `0	ended by a signal

1	an error

2	wrong use`},
		{Title: "EXAMPLES", Text: `Check a configuration before restarting the daemon:
   daxfs-snapshotter --config /etc/daxfs-snapshotter/config.toml config check

Use it:
   nerdctl --snapshotter daxfs run --rm debian:12 true`},
		{Title: "SEE ALSO", Text: "daxfs(1), containerd(8)\n\nhttps://github.com/daxfs/daxfs-snapshotter"},
	},
}

// The page in docs/man is the output of the flags and commands.
func TestManPage(t *testing.T) {
	manpage.Check(t, "../../docs/man/daxfs-snapshotter.8", manPage.Render(app(io.Discard, io.Discard)))
}
