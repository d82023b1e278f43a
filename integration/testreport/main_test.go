package main

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// The report is read from the real go tool: a module with one test of each outcome.
func TestRun(t *testing.T) {
	dir := t.TempDir()
	write := func(name, text string) {
		t.Helper()
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	write("go.mod", "module example.test/m\n\ngo 1.26\n")
	write("m_test.go", `package m
import "testing"
func TestGood(t *testing.T) { t.Log("noise of a good test") }
func TestAbsent(t *testing.T) { t.Skip("no such device") }
`)
	t.Chdir(dir)
	t.Setenv("GOFLAGS", "")

	skips := filepath.Join(t.TempDir(), "skips")
	var out, errs strings.Builder
	if code := run([]string{"./..."}, skips, &out, &errs); code != 0 {
		t.Fatalf("exit status %d of passing tests: %s%s", code, out.String(), errs.String())
	}
	for _, want := range []string{
		"ok  \texample.test/m", "skipped tests: 1",
		"TestAbsent: m_test.go:4: no such device",
	} {
		if !strings.Contains(out.String(), want) {
			t.Errorf("no %q in:\n%s", want, out.String())
		}
	}
	if strings.Contains(out.String(), "noise") {
		t.Errorf("the output of a good test is shown:\n%s", out.String())
	}

	list, err := os.ReadFile(skips)
	if err != nil || strings.Count(string(list), "\n") != 1 || !strings.Contains(string(list), "TestAbsent: ") {
		t.Errorf("list of skipped tests: %v %q", err, list)
	}

	write("bad_test.go", "package m\nimport \"testing\"\nfunc TestBad(t *testing.T) { t.Error(\"it broke\") }\n")
	out.Reset()
	if code := run([]string{"./..."}, skips, &out, &errs); code == 0 || !strings.Contains(out.String(), "it broke") {
		t.Errorf("failing test: exit status %d, output:\n%s", code, out.String())
	}

	write("bad_test.go", "package m\nfunc TestBad( {\n")
	out.Reset()
	errs.Reset()
	if code := run([]string{"./..."}, skips, &out, &errs); code == 0 ||
		!strings.Contains(out.String()+errs.String(), "bad_test.go:2") {
		t.Errorf("broken build: exit status %d, output:\n%s%s", code, out.String(), errs.String())
	}
}
