// Command testreport runs "go test -json" with the arguments after "--" and prints a readable report:
// one line per package when it ends, the whole output of failed tests, and at the end every skipped
// test with its reason. It exits with the status of go test.
//
//	testreport [-skips FILE] -- [go test arguments]
//
// -skips also appends the list of skipped tests to FILE, for runs of several go test commands.
package main

import (
	"bufio"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/exec"
	"sort"
	"strings"
)

func main() {
	skips := flag.String("skips", "", "append the list of skipped tests to this `file`")
	flag.Parse()
	os.Exit(run(flag.Args(), *skips, os.Stdout, os.Stderr))
}

// run runs go test and returns its exit status. It passes on output that is no event, such as build
// errors of older tools. skips is the file of -skips, or empty.
func run(args []string, skips string, stdout, stderr io.Writer) int {
	cmd := exec.Command("go", append([]string{"test", "-json"}, args...)...)
	cmd.Stderr = stderr
	out, err := cmd.StdoutPipe()
	if err != nil {
		fmt.Fprintln(stderr, "testreport:", err)
		return 1
	}
	if err := cmd.Start(); err != nil {
		fmt.Fprintln(stderr, "testreport:", err)
		return 1
	}
	r := newReport(stdout)
	readErr := r.read(out)
	waitErr := cmd.Wait()
	if err := r.finish(skips); err != nil {
		readErr = errors.Join(readErr, err)
	}
	var exit *exec.ExitError
	switch {
	case errors.As(waitErr, &exit):
		return max(exit.ExitCode(), 1) // -1 if a signal ended it
	case waitErr != nil || readErr != nil:
		fmt.Fprintln(stderr, "testreport:", errors.Join(waitErr, readErr))
		return 1
	case r.failed:
		return 1
	}
	return 0
}

// event is one line of go test -json (see "go doc test2json").
type event struct {
	Action, Package, Test, Output string
}

type testName struct{ pkg, test string }

// report collects the output of tests until it is known whether anyone needs it.
type report struct {
	w       io.Writer
	output  map[testName][]string
	skipped map[testName]string
	failed  bool
}

func newReport(w io.Writer) *report {
	return &report{w: w, output: map[testName][]string{}, skipped: map[testName]string{}}
}

func (r *report) read(in io.Reader) error {
	lines := bufio.NewReader(in)
	for {
		line, err := lines.ReadBytes('\n')
		if len(line) > 0 {
			var e event
			if json.Unmarshal(line, &e) == nil && e.Action != "" {
				r.add(e)
			} else {
				r.w.Write(line)
			}
		}
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return fmt.Errorf("read the output of go test: %w", err)
		}
	}
}

func (r *report) add(e event) {
	name := testName{e.Package, e.Test}
	switch e.Action {
	case "output":
		if e.Test == "" {
			// Package lines: "ok", "FAIL", "?", a panic outside tests. The bare PASS above each "ok" is noise.
			if e.Output != "PASS\n" {
				io.WriteString(r.w, e.Output)
			}
			return
		}
		r.output[name] = append(r.output[name], e.Output)
	case "build-output":
		io.WriteString(r.w, e.Output)
	case "pass":
		delete(r.output, name)
	case "skip":
		if e.Test != "" {
			r.skipped[name] = reason(r.output[name])
		}
		delete(r.output, name)
	case "fail", "build-fail":
		r.failed = true
		for _, s := range r.output[name] {
			io.WriteString(r.w, s)
		}
		delete(r.output, name)
	}
}

// reason extracts the text of t.Skip from a test's output.
func reason(output []string) string {
	var b strings.Builder
	for _, s := range output {
		if strings.HasPrefix(s, "=== ") || strings.HasPrefix(strings.TrimSpace(s), "--- ") {
			continue
		}
		if b.Len() > 0 {
			b.WriteByte(' ')
		}
		b.WriteString(strings.TrimSpace(s))
	}
	return b.String()
}

// finish prints the output of tests that never ended (a panic, a time limit), then the skipped tests.
func (r *report) finish(skips string) error {
	for _, n := range sortedNames(r.output) {
		for _, s := range r.output[n] {
			io.WriteString(r.w, s)
		}
	}
	if len(r.skipped) == 0 {
		fmt.Fprintln(r.w, "no test was skipped")
		return nil
	}
	var list strings.Builder
	for _, n := range sortedNames(r.skipped) {
		fmt.Fprintf(&list, "  %s %s: %s\n", n.pkg, n.test, r.skipped[n])
	}
	fmt.Fprintf(r.w, "skipped tests: %d\n%s", len(r.skipped), list.String())
	if skips == "" {
		return nil
	}
	f, err := os.OpenFile(skips, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o644)
	if err != nil {
		return err
	}
	_, err = f.WriteString(list.String())
	return errors.Join(err, f.Close())
}

func sortedNames[V any](m map[testName]V) []testName {
	names := make([]testName, 0, len(m))
	for n := range m {
		names = append(names, n)
	}
	sort.Slice(names, func(i, j int) bool {
		if names[i].pkg != names[j].pkg {
			return names[i].pkg < names[j].pkg
		}
		return names[i].test < names[j].test
	})
	return names
}
