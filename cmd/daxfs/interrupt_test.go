package main

import (
	"bytes"
	"context"
	"io"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"

	"github.com/opencontainers/go-digest"
	"github.com/rogpeppe/go-internal/testscript"
	"golang.org/x/sys/unix"

	"github.com/daxfs/daxfs-snapshotter/internal/ocitest"
	. "github.com/daxfs/daxfs-snapshotter/internal/treetest"
)

// endless serves an image from a registry that never completes its layer. It returns the image's name,
// and a channel that gets a value whenever a client waits for the rest.
func endless(tb testing.TB, dir string) (ref string, waiting <-chan struct{}, stop func()) {
	tb.Helper()
	l := ocitest.NewLayout(tb, filepath.Join(dir, "endless"))
	layer := ocitest.Layer{Tar: Tar(Reg("zeros", strings.Repeat("\x00", 2<<20))), Compression: ocitest.None}
	manifest := l.Manifest(ocitest.LinuxAMD64, layer)
	reached := make(chan struct{}, 16)
	srv := httptest.NewServer(l.Registry(manifest, digest.FromBytes(layer.Tar),
		func(w http.ResponseWriter, r *http.Request, b []byte) {
			w.Header().Set("Content-Length", strconv.Itoa(len(b)))
			_, _ = w.Write(b[:len(b)/2])
			w.(http.Flusher).Flush()
			reached <- struct{}{}
			<-r.Context().Done()
		}))
	return strings.TrimPrefix(srv.URL, "http://") + "/image", reached, srv.Close
}

// interrupt runs daxfs in this process, cancels its context while it reads a layer, as ^C does, and
// expects status 130: interrupt ARGS... The source replaces ENDLESS; the output is below the work directory.
func interrupt(ts *testscript.TestScript, neg bool, args []string) {
	source := slices.Index(args, "ENDLESS")
	if neg || source < 0 {
		ts.Fatalf("usage: interrupt ARGS... ENDLESS ARGS...")
	}
	ref, waiting, stop := endless(&testing.B{}, ts.MkAbs("."))
	defer stop()
	args[source] = "docker://" + ref
	if o := slices.Index(args, "-o"); o >= 0 {
		args[o+1] = ts.MkAbs(args[o+1])
	}
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	go func() {
		<-waiting
		cancel()
	}()
	var stderr bytes.Buffer
	got := run(ctx, append([]string{"daxfs"}, args...), nil, io.Discard, &stderr)
	if got != statusInterrupted || !strings.Contains(stderr.String(), "interrupted") {
		ts.Fatalf("status %d (%s), expected %d", got, stderr.String(), statusInterrupted)
	}
}

// TestSignals: a signal in the middle of a layer leaves existing files, and nothing else.
func TestSignals(t *testing.T) {
	ref, waiting, stop := endless(t, t.TempDir())
	defer stop()
	out := t.TempDir()
	if err := os.WriteFile(filepath.Join(out, "old"), []byte("what was there before"), 0o644); err != nil {
		t.Fatal(err)
	}
	for _, sig := range []unix.Signal{unix.SIGINT, unix.SIGTERM, unix.SIGHUP} {
		if signal.Ignored(sig) {
			t.Logf("%v is not tried: this process ignores it, as below nohup(1), and so do its children", sig)
			continue
		}
		for _, name := range []string{"old", "new"} {
			cmd := exec.Command("daxfs", "convert", "-q", "--plain-http", "-o", filepath.Join(out, name),
				"docker://"+ref)
			var stderr bytes.Buffer
			cmd.Stderr = &stderr
			if err := cmd.Start(); err != nil {
				t.Fatal(err)
			}
			ended := make(chan struct{})
			go func() {
				_ = cmd.Wait() // ProcessState has the status
				close(ended)
			}()
			select {
			case <-waiting:
			case <-ended:
				t.Fatalf("status %d: %s", cmd.ProcessState.ExitCode(), stderr.String())
			}
			if err := cmd.Process.Signal(sig); err != nil {
				t.Fatal(err)
			}
			<-ended
			if got := cmd.ProcessState.ExitCode(); got != statusInterrupted ||
				stderr.String() != "daxfs: interrupted\n" {
				t.Errorf("%v: status %d, %q, expected %d", sig, got, stderr.String(), statusInterrupted)
			}
			list, err := os.ReadDir(out)
			if err != nil {
				t.Fatal(err)
			}
			if len(list) != 1 || list[0].Name() != "old" {
				t.Errorf("%v: left behind: %v", sig, list)
			}
			if b, err := os.ReadFile(filepath.Join(out, "old")); err != nil || string(b) != "what was there before" {
				t.Errorf("%v: the output is %q (%v)", sig, b, err)
			}
		}
	}
}
