package main

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/google/renameio/v2"
	"github.com/urfave/cli/v2"
)

// dropInName is the name of the file that doctor --fix writes to containerd's conf.d.
const dropInName = "daxfs.toml"

// fix writes the missing part of containerd's configuration, after asking.
func (e *env) fix(c *cli.Context, r *containerdReport) error {
	if r.Snippet == "" {
		_, err := fmt.Fprintln(e.stdout, "\nNothing to fix in containerd's configuration.")
		return err
	}
	main := c.String("containerd-config")
	file, err := dropIn(c.Context, main)
	if err != nil {
		return err
	}
	what := "write"
	if fileExists(file) {
		what = "replace (and keep a copy of)"
	}
	fmt.Fprintf(e.stdout, "\nThe lines above can be put into a file of their own: %s %s? [y/N] ", what, printable(file))
	if !c.Bool("yes") {
		line, err := bufio.NewReader(e.stdin).ReadString('\n')
		if answer := strings.ToLower(strings.TrimSpace(line)); answer != "y" && answer != "yes" {
			fmt.Fprintln(e.stdout, "nothing was written")
			return ignoreEOF(err)
		}
	}
	backup, err := keepCopy(file)
	if err != nil {
		return err
	}
	if err := os.MkdirAll(filepath.Dir(file), 0o755); err != nil {
		return err
	}
	if err := renameio.WriteFile(file, []byte(r.Snippet), 0o644); err != nil {
		return err
	}
	// Take the file back if containerd does not accept the result.
	if _, err := dumpConfig(c.Context, main); err != nil {
		return errors.Join(fmt.Errorf("containerd rejects its configuration with that file: %w", err),
			takeBack(file, backup))
	}
	if backup != "" {
		fmt.Fprintf(e.stdout, "%s is kept as %s\n", printable(file), printable(backup))
	}
	_, err = fmt.Fprintf(e.stdout, "%s is written. Restart containerd: systemctl restart containerd\n", printable(file))
	return err
}

func ignoreEOF(err error) error {
	if errors.Is(err, io.EOF) { // nobody can answer
		return nil
	}
	return err
}

// dropIn returns the path of the drop-in, below the directory of containerd's main configuration,
// which imports it. Other directories may belong to another containerd, even the one that is always imported.
func dropIn(ctx context.Context, main string) (string, error) {
	d, err := dumpConfig(ctx, main)
	if err != nil {
		return "", err
	}
	root, err := filepath.Abs(filepath.Dir(main))
	if err != nil {
		return "", err
	}
	for _, pattern := range d.Imports {
		if !filepath.IsAbs(pattern) {
			pattern = filepath.Join(root, pattern)
		}
		file := filepath.Join(filepath.Dir(pattern), dropInName)
		if ok, err := filepath.Match(pattern, file); err == nil && ok && strings.HasPrefix(file, root+"/") {
			return file, nil
		}
	}
	return "", fmt.Errorf("containerd's configuration %q imports no directory for a file of our own: add the line\n"+
		"imports = [%q]\nabove its first table, then try again", main, filepath.Join(root, "conf.d/*.toml"))
}

// keepCopy copies a file beside itself and returns the name of the copy, or "" if there is no file.
func keepCopy(file string) (string, error) {
	raw, err := os.ReadFile(file)
	if errors.Is(err, fs.ErrNotExist) {
		return "", nil
	}
	if err != nil {
		return "", err
	}
	// containerd imports only names that end with .toml, so not this one.
	backup := file + "." + time.Now().UTC().Format("20060102T150405Z") + ".bak"
	return backup, renameio.WriteFile(backup, raw, 0o644)
}

func takeBack(file, backup string) error {
	if backup == "" {
		return os.Remove(file)
	}
	return os.Rename(backup, file)
}
