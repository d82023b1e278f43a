package main

import (
	"bytes"
	"encoding/json"
	"os"
	"path/filepath"
	"reflect"
	"regexp"
	"strings"
	"testing"

	"github.com/daxfs/daxfs-snapshotter/daemon/api"
)

// TestJSONIsDocumented: docs/json.md has every field in the section of its command.
func TestJSONIsDocumented(t *testing.T) {
	text, err := os.ReadFile("../../docs/json.md")
	if err != nil {
		t.Fatal(err)
	}
	sections := map[string]string{}
	for _, s := range strings.Split(string(text), "\n## ")[1:] {
		title, body, _ := strings.Cut(s, "\n")
		sections[title] = body
	}
	pools := sections["`pool ls`, `pool show`"]
	others := sections["`pool init`, `put`, `rm`, `gc`, `release`, `check`"]
	for _, c := range []struct {
		name string
		v    any
		text string
	}{
		{"convert", summary{}, sections["`convert`"]},
		{"inspect", inspection{}, sections["`inspect`"] + sections["`convert`"]},
		{"verify", finding{}, sections["`verify`"]},
		{"ls", entry{}, sections["`ls`"]},
		{"pool show", poolState{}, pools},
		{"pool init", poolMade{}, others + pools},
		{"pool rm", poolFreed{}, others + pools},
		{"pool check", poolChecked{}, others},
		{"pool move", poolMoved{}, others},
		{"status", api.Status{}, sections["`status`"] + others + pools + sections["`doctor`"]},
		{"images", api.Image{}, sections["`images`, `explain`"] + pools},
		{"explain", api.Container{}, sections["`images`, `explain`"]},
		{"top", residentImage{}, sections["`top`"]},
		{"estimate", estimation{}, sections["`estimate`"]},
		{"du", imageSpace{}, sections["`du`, `diff`"]},
		{"diff", imageDiff{}, sections["`du`, `diff`"]},
		{"doctor", report{}, sections["`doctor`"] + others},
	} {
		fields := 0
		eachField(reflect.TypeOf(c.v), func(name string) {
			fields++
			if !strings.Contains(c.text, "`"+name+"`") {
				t.Errorf("docs/json.md lacks the field %q of %s --json", name, c.name)
			}
		})
		if fields < 2 {
			t.Errorf("%s: %d fields", c.name, fields)
		}
	}
}

func eachField(t reflect.Type, f func(string)) {
	for t.Kind() == reflect.Pointer || t.Kind() == reflect.Slice {
		t = t.Elem()
	}
	if t.Kind() != reflect.Struct {
		return
	}
	for i := range t.NumField() {
		field := t.Field(i)
		tag, _, _ := strings.Cut(field.Tag.Get("json"), ",")
		if tag == "-" || tag == "" && !field.Anonymous {
			continue
		}
		if tag != "" {
			f(tag)
		}
		eachField(field.Type, f)
	}
}

// odd are names that are hard to show: control sequences, invalid UTF-8, and text that looks quoted.
var odd = []string{
	"new\nline", "escape\x1b[31m", "tab\there", "delete\x7f", "csi\u009b31m", "right to left\u202e",
	"no break\u00a0space", "tag\U000e0041",
	"not\xffutf8", "not\xfeutf8", `"quoted"`, "plain", "日本",
}

// TestOddNames: no output controls the terminal, and programs get every name byte for byte.
func TestOddNames(t *testing.T) {
	dir := t.TempDir()
	root := filepath.Join(dir, "root")
	if err := os.Mkdir(root, 0o755); err != nil {
		t.Fatal(err)
	}
	for _, name := range odd {
		if err := os.Symlink("to "+name, filepath.Join(root, name)); err != nil {
			t.Fatal(err)
		}
	}
	image := filepath.Join(dir, "image")
	daxfs := func(want int, args ...string) string {
		t.Helper()
		var stdout, stderr bytes.Buffer
		if got := run(t.Context(), append([]string{"daxfs"}, args...), nil, &stdout, &stderr); got != want {
			t.Fatalf("%q: status %d: %s", args, got, stderr.String())
		}
		for _, s := range []string{stdout.String(), stderr.String()} {
			if bad := regexp.MustCompile(`[^\n\x20-\x7e日本]`).FindString(s); bad != "" {
				t.Errorf("%q writes %q: %q", args, bad, s)
			}
		}
		return stdout.String()
	}
	daxfs(statusOK, "convert", "-q", "-o", image, "rootfs:"+root)
	shown := map[string]bool{}
	for line := range strings.Lines(daxfs(statusOK, "ls", image)) {
		shown[line] = true
	}
	if len(shown) != len(odd) {
		t.Errorf("ls shows %d different names, expected %d: %v", len(shown), len(odd), shown)
	}
	daxfs(statusOK, "ls", "-l", image)
	daxfs(statusOK, "inspect", image)
	daxfs(statusFailed, "cat", image, "no\x1b[31m\u009b\xff")
	got := map[string]string{}
	for line := range strings.Lines(daxfs(statusOK, "ls", "--json", image)) {
		var e entry
		if err := json.Unmarshal([]byte(line), &e); err != nil {
			t.Fatalf("%q: %v", line, err)
		}
		name, target := e.Path, e.Target
		if e.Bytes != nil {
			name = string(e.Bytes)
		}
		if e.Raw != nil {
			target = string(e.Raw)
		}
		got[name] = target
	}
	for _, name := range odd {
		if got["/"+name] != "to "+name {
			t.Errorf("ls --json: %q leads to %q", name, got["/"+name])
		}
	}
}

// TestFullOutput: every command reports an error if the disk of standard output is full.
func TestFullOutput(t *testing.T) {
	dir := t.TempDir()
	setup(t, dir)
	t.Chdir(dir)
	full, err := os.OpenFile("/dev/full", os.O_WRONLY, 0)
	if err != nil {
		t.Skipf("needs /dev/full: %v", err)
	}
	defer full.Close()
	for _, args := range []string{
		"convert -o image oci:layout:v1", "convert -q --json -o image oci:layout:v1", "inspect image",
		"inspect --json image", "ls image", "ls -lR image",
		"cat image /link", "export image", "pool init --size 16m pool", "pool put --name k pool oci:layout:v1",
		"pool ls pool", "pool show pool",
		"pool show pool k", "pool check pool", "pool rm pool k", "pool gc pool", "pool put --name k pool oci:layout:v1",
		"images --pool pool", "du --pool pool k",
		"diff --pool pool k k", "status --pool pool", "doctor --containerd= .", "completion bash", "convert --help",
		"--help", "--version",
	} {
		var stderr bytes.Buffer
		status := run(t.Context(), append([]string{"daxfs"}, strings.Fields(args)...), nil, full, &stderr)
		if status != statusFailed || !strings.Contains(stderr.String(), "no space left on device") {
			t.Errorf("%s: status %d, %q", args, status, stderr.String())
		}
	}
}
