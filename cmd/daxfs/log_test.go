package main

import (
	"bytes"
	"errors"
	"os"
	"testing"

	"github.com/containerd/log"
)

func TestLog(t *testing.T) {
	var out bytes.Buffer
	(&env{stderr: &out}).useLog()
	t.Cleanup(func() { log.L.Logger.SetOutput(os.Stderr) })
	log.L.Info("all is well")
	log.L.WithField("image", "a\x1b[2J").WithError(errors.New("busy")).Warn("it stays")
	want := `daxfs: warning: it stays (image a\x1b[2J): busy` + "\n"
	if out.String() != want {
		t.Errorf("log is %q, expected %q", out.String(), want)
	}
}
