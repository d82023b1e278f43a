package main

import (
	"bytes"
	"strings"
	"testing"

	"github.com/daxfs/daxfs-snapshotter/daemon/api"
	"github.com/daxfs/daxfs-snapshotter/store/shared"
)

// Names in another owner's pool can contain anything. No control sequence reaches the terminal.
func TestAttach(t *testing.T) {
	d := startDaemon(t, "")
	d.shared = api.SharedAnswer{
		Pools: []shared.Status{
			{
				Name: "/dev/pmem0", ID: "ab", Generation: 7, Images: 3, Claimed: 2, Mounted: 1,
				Driver: "erofs-dax", Leased: true,
			},
			{Name: "/dev/pmem1", Error: "no pool header"},
			{Name: "/dev/pmem2", Lost: "no container starts from 2 images"},
		},
		Images: []api.SharedImage{{Name: "web:\x1b[31m", Namespace: "k8s.io", Target: "sha256:aa", Pool: "/dev/pmem0"}},
	}
	d.attached = []api.Attached{{Name: "web:1", Target: "sha256:aa"}}
	for _, c := range []struct {
		args   string
		status int
		want   string // in the output
		asked  string
	}{
		{"attach", statusOK, "/dev/pmem0  7           3       2        1        erofs-dax  held", ""},
		{"attach", statusOK, "pool /dev/pmem1: no pool header", ""},
		{"attach", statusOK, "pool /dev/pmem2: no container starts from 2 images", ""},
		{"attach", statusOK, `"web:\x1b[31m"`, ""},
		{"attach --json", statusOK, `"error": "no pool header"`, ""},
		{"attach --all", statusOK, "attached web:1 sha256:aa", `POST /v1/attach {"namespace":"default","all":true}`},
		{"attach -n k8s.io a b", statusOK, "attached", `POST /v1/attach {"namespace":"k8s.io","names":["a","b"]}`},
		{"attach --all a", statusUsage, "expected either", ""},
		{"attach --all --json", statusOK, `"bytes": 0`, `POST /v1/attach {"namespace":"default","all":true}`},
		{"detach web:1", statusOK, "detached web:1", `DELETE /v1/attach {"namespace":"default","names":["web:1"]}`},
		{"detach", statusUsage, "expected either", ""},
	} {
		var out, errs bytes.Buffer
		args := append(append([]string{"daxfs"}, strings.Fields(c.args)...), "--control", d.socket)
		got := run(t.Context(), args, nil, &out, &errs)
		asked := d.take()
		if text := out.String() + errs.String(); got != c.status || !strings.Contains(text, c.want) ||
			strings.Contains(text, "\x1b") {
			t.Errorf("%s: status %d, %s; expected %d and %q", c.args, got, text, c.status, c.want)
		}
		if asked != c.asked {
			t.Errorf("%s asked %s; expected %s", c.args, asked, c.asked)
		}
	}
}
