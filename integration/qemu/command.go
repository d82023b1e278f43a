package qemu

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"github.com/daxfs/daxfs-snapshotter/integration/qemu/task"
)

// Share returns the directory on the host that the guest has as /host.
func (r *Running) Share() string { return filepath.Join(r.dir, "share") }

// Command runs a script in the shell of a guest with the task "node", and returns its output. Scripts
// run one after the other; background programs continue. If a script fails, the error contains its output.
func (r *Running) Command(ctx context.Context, script string) (string, error) {
	r.commands.Lock()
	defer r.commands.Unlock()
	r.count++
	file := func(kind string) string { return filepath.Join(r.Share(), fmt.Sprint(kind, r.count)) }
	command := file(task.CommandFile)
	if err := errors.Join(os.WriteFile(command+".new", []byte(script), 0o644),
		os.Rename(command+".new", command)); err != nil {
		return "", err
	}
	for {
		status, err := os.ReadFile(file(task.StatusFile))
		if errors.Is(err, os.ErrNotExist) {
			select {
			case <-r.done:
				return "",
					r.explain(fmt.Errorf("the guest ended while it ran %q: %w", script,
						errors.Join(r.err, errors.New("no status"))))
			case <-ctx.Done():
				return "", r.explain(fmt.Errorf("while the guest ran %q: %w", script, ctx.Err()))
			case <-time.After(5 * time.Millisecond):
				continue
			}
		}
		if err != nil {
			return "", err
		}
		out, err := os.ReadFile(file(task.OutputFile))
		if err != nil {
			return "", err
		}
		if n, err := strconv.Atoi(string(status)); err != nil || n != 0 {
			return string(out),
				fmt.Errorf("the guest's shell ended with status %s:\n%s\n%s", status, script,
					strings.TrimSpace(string(out)))
		}
		return string(out), nil
	}
}
