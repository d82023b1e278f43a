package main

import (
	"fmt"
	"io"
	"net/http"
	"os"
	"path/filepath"

	"github.com/daxfs/daxfs-snapshotter/integration/stack"
)

// metricsAddress is the daemon's address for profiles, in the network namespace of the run.
const metricsAddress = "127.0.0.1:9760"

// profileConfig makes the daemon serve profiles.
const profileConfig = "[metrics]\naddress = \"" + metricsAddress + "\"\npprof = true\n"

// profile records the daemon's next five seconds. The caller calls wait, which also saves the metrics.
func (t *turn) profile() (wait func()) {
	if t.profiles == "" || t.v.options.Mode == stack.None {
		return func() {}
	}
	name := filepath.Join(t.profiles, fmt.Sprintf("%s-%s-%d", t.w.name, t.v.name, t.round))
	done := make(chan error, 1)
	go func() { done <- save(name+".pprof", "/debug/pprof/profile?seconds=5") }()
	return func() {
		if err := save(name+".metrics", "/metrics"); err != nil {
			fmt.Println("metrics:", err)
		}
		if err := <-done; err != nil {
			fmt.Println("profile:", err)
		}
	}
}

func save(path, from string) error {
	resp, err := http.Get("http://" + metricsAddress + from)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	raw, err := io.ReadAll(resp.Body)
	if err != nil {
		return err
	}
	return os.WriteFile(path, raw, 0o644)
}
