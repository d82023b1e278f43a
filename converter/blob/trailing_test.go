package blob

import (
	"bytes"
	"errors"
	"io"
	"os/exec"
	"testing"

	"github.com/containerd/containerd/v2/pkg/archive/compression"
)

// TestTrailing checks bytes behind compressed data. The exit status of gzip(1) is 0 if it accepts them
// silently, 2 if it warns, 1 if it fails. containerd accepts only whole members.
func TestTrailing(t *testing.T) {
	t.Setenv("CONTAINERD_DISABLE_PIGZ", "1")
	t.Setenv("CONTAINERD_DISABLE_IGZIP", "1")
	tar := text(100_000)
	gz, zs := pack(t, tar, gzipped), pack(t, tar, zstandard)
	empty := pack(t, nil, gzipped)
	frames := join(pack(t, tar[:70_001], zstandard), pack(t, tar[70_001:], zstandard))
	two := join(pack(t, tar[:70_001], gzipped), pack(t, tar[70_001:], gzipped))
	const none = -1 // gzip(1) does not know zstd
	for name, c := range map[string]struct {
		blob          []byte
		proven, alone bool // accepted with a diff ID, and without one
		gzip          int
		containerd    bool
	}{
		"nothing":                   {gz, true, true, 0, true},
		"two members":               {two, true, true, 0, true},
		"an empty member":           {join(gz, empty), true, true, 0, true},
		"many empty members":        {join(gz, bytes.Repeat(empty, 3000)), true, true, 0, true},
		"one zero":                  {join(gz, make([]byte, 1)), true, true, 0, false},
		"two zeros":                 {join(gz, make([]byte, 2)), true, true, 0, false},
		"17 zeros":                  {join(gz, make([]byte, 17)), true, true, 0, false},
		"a block of zeros":          {join(gz, make([]byte, 512)), true, true, 0, false},
		"zeros of more than a read": {join(two, make([]byte, 300_000)), true, true, 0, false},
		"garbage":                   {join(gz, []byte("garbage!")), true, false, 2, false},
		"a byte of garbage":         {join(gz, []byte("g")), true, false, 1, false},
		"garbage behind zeros":      {join(gz, make([]byte, 5000), []byte("g")), true, false, 2, false},
		"a member behind zeros":     {join(gz, make([]byte, 10), empty), true, false, 2, false},
		"much garbage":              {join(gz, text(1<<20)), true, false, 2, false},
		"a member that is cut":      {join(gz, gz[:len(gz)-9]), false, false, 1, false},
		"a header that is cut":      {join(gz, gz[:5]), false, false, 1, false},
		"a checksum that is wrong":  {join(gz[:len(gz)-8], []byte("1234"), gz[len(gz)-4:]), false, false, 1, false},
		"a checksum that is cut":    {gz[:len(gz)-8], false, false, 1, false},
		"zstd":                      {zs, true, true, none, true},
		"zstd, two frames":          {frames, true, true, none, true},
		"zstd with garbage":         {join(zs, []byte("garbage!")), true, false, none, false},
		"zstd with zeros":           {join(zs, make([]byte, 512)), true, false, none, false},
		"zstd that is cut":          {zs[:len(zs)-4], false, false, none, false},
		"zstd, a frame that is cut": {join(zs, zs[:len(zs)-4]), false, false, none, false},
	} {
		spec := specOf(c.blob, tar)
		for _, known := range []bool{true, false} {
			want := c.proven
			if !known {
				spec.DiffID, want = "", c.alone
			}
			got, _, err := read(t, c.blob, spec, 1<<30)
			if (err == nil) != want || err == nil && !bytes.Equal(got, tar) {
				t.Errorf("%s, with a diff ID %v: %d bytes and %v, expected it to be taken: %v", name, known,
					len(got), err, want)
			}
			if c.proven && !want && !errors.Is(err, errTrailing) {
				t.Errorf("%s: error %v, expected %v", name, err, errTrailing)
			}
		}
		if s, err := compression.DecompressStream(bytes.NewReader(c.blob)); err != nil {
			t.Errorf("%s: containerd: %v", name, err)
		} else if got, err := io.ReadAll(s); (err == nil && bytes.Equal(got, tar)) != c.containerd {
			t.Errorf("%s: containerd says %v to %d bytes, expected it to take them: %v", name, err,
				len(got), c.containerd)
		}
		if c.gzip == none {
			continue
		}
		cmd := exec.Command("gzip", "-dc")
		cmd.Stdin = bytes.NewReader(c.blob)
		var exit *exec.ExitError
		out, err := cmd.Output()
		status := 0
		if errors.As(err, &exit) {
			status = exit.ExitCode()
		} else if err != nil {
			t.Fatal(err)
		}
		if status != c.gzip || status != 1 && !bytes.Equal(out, tar) {
			t.Errorf("%s: gzip ends with %d after %d bytes, expected %d", name, status, len(out), c.gzip)
		}
	}
	// The trailing bytes are part of the explanation for a wrong diff ID.
	b := join(gz, []byte("garbage!"))
	_, _, err := read(t, b, specOf(b, tar[1:]), 1<<30)
	if !errors.Is(err, ErrMismatch) || !errors.Is(err, errTrailing) {
		t.Errorf("error %v, expected %v and %v", err, ErrMismatch, errTrailing)
	}
}

func join(parts ...[]byte) []byte { return bytes.Join(parts, nil) }
