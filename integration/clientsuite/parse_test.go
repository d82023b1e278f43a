package clientsuite

import (
	"fmt"
	"regexp"
	"strings"
	"testing"
)

type result struct {
	status string // PASS, FAIL or SKIP; empty when the test did not end
	output string // of the test and its parts
	parts  map[string]string
}

// results maps names to the results of tests. Output of no test is under the empty name.
type results map[string]*result

var ended = regexp.MustCompile(`^ *--- (PASS|FAIL|SKIP): (\S+) \(`)

// parseTest2JSON reads the output of a test binary with -test.v=test2json: a ^V marks each line of the
// framework, which names the test of the following lines.
func parseTest2JSON(out []byte) results {
	all := results{"": {}}
	for _, chunk := range strings.Split(string(out), "\x16") {
		name := ""
		status := ""
		if m := ended.FindStringSubmatch(chunk); m != nil {
			status, name = m[1], m[2]
		} else if strings.HasPrefix(chunk, "=== ") {
			line, _, _ := strings.Cut(chunk, "\n")
			if f := strings.Fields(line); len(f) == 3 {
				name = f[2]
			}
		}
		test, _, isPart := strings.Cut(name, "/")
		r := all[test]
		if r == nil {
			r = &result{parts: make(map[string]string)}
			all[test] = r
		}
		r.output += chunk
		switch {
		case status == "":
		case isPart:
			r.parts[name] = status
		default:
			r.status = status
		}
	}
	return all
}

// check returns an error unless a test completed, with all its parts, and passed.
func (rs results) check(name string) error {
	r := rs[name]
	switch {
	case r == nil:
		return fmt.Errorf("it did not run. What belongs to no test:\n%s", rs[""].output)
	case r.status == "":
		return fmt.Errorf("it did not end:\n%s", r.output)
	case r.status != "PASS":
		return fmt.Errorf("its status is %s, expected PASS:\n%s", r.status, r.output)
	}
	for part, status := range r.parts {
		if status != "PASS" {
			return fmt.Errorf("the status of %q is %s, expected PASS; if it has to skip itself, %s has to say why:\n%s",
				part, status, listFile, r.output)
		}
	}
	return nil
}

// Only a test whose PASS was seen has passed.
func TestParse(t *testing.T) {
	all := parseTest2JSON([]byte("level=info msg=starting\n" +
		"\x16=== RUN   TestGood\n    log of good\n\x16=== RUN   TestGood/part\n\x16=== NAME  TestGood\nno newline" +
		"\x16    --- PASS: TestGood/part (0.00s)\n\x16--- PASS: TestGood (0.01s)\n" +
		"\x16=== RUN   TestBad\n\x16=== PAUSE TestBad\n" +
		"\x16=== RUN   TestSkipped\n\x16--- SKIP: TestSkipped (0.00s)\n    no CRIU\n" +
		"\x16=== RUN   TestPart\n\x16=== RUN   TestPart/a_b\n" +
		"\x16    --- SKIP: TestPart/a_b (0.00s)\n\x16--- PASS: TestPart (0.00s)\n" +
		"\x16=== CONT  TestBad\nwrong digest\n\x16--- FAIL: TestBad (0.00s)\n" +
		"\x16=== RUN   TestHangs\npanic: test timed out\n"))
	for name, want := range map[string]string{
		"TestGood": "", "TestBad": "wrong digest", "TestSkipped": "no CRIU", "TestPart": `"TestPart/a_b" is SKIP`,
		"TestHangs": "test timed out", "TestAbsent": "msg=starting",
	} {
		err := all.check(name)
		if want == "" && err != nil || want != "" && (err == nil || !strings.Contains(err.Error(), want)) {
			t.Errorf("%s: %v, expected %q", name, err, want)
		}
	}
}
