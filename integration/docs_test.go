package integration

import (
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"testing/fstest"

	v1 "github.com/google/go-containerregistry/pkg/v1"

	"github.com/daxfs/daxfs-snapshotter/integration/stack"
	"github.com/daxfs/daxfs-snapshotter/integration/testimage"
)

// notRun maps prefixes of commands in documents that TestDocs does not run to the reason.
var notRun = map[string]string{
	"dpkg":             "needs a system of its own; TestOperator in integration/packages runs it in one",
	"rpm":              "as dpkg; TestRPM runs it",
	"tar --extract":    "as dpkg",
	"ulimit":           "as dpkg, with what follows it",
	"setsid":           "as dpkg",
	"mkdir -p /run":    "as dpkg",
	"install -D":       "writes to this machine; TestOperator runs it in a system of its own",
	"make build":       "every target here is built by the stack",
	"make demo":        "has tests of its own in integration/demo",
	"go run ./integra": "makes the two images that are there; TestImages of integration/demo runs it",
	"daxfs doctor --f": "writes beside the configuration of this machine's containerd; " +
		"TestDoctorCases runs it elsewhere",
	"make test":        "is what runs this test",
	"make install":     "writes to this machine; TestInstall runs it with DESTDIR",
	"make uninstall":   "as make install",
	"systemctl":        "needs systemd, and a unit that was installed",
	"kubectl":          "needs a cluster; TestKubernetes checks the files",
	"docker":           "needs docker and a registry; TestDaemonSet runs what packaging/image makes of the same",
	"rm -r /var/lib":   "removes the state of this machine's daemon",
	"rm -r /etc/daxfs": "as rm -r /var/lib",
	"daxfs umount --f": "unmounts what this machine's daemon has mounted",
}

// docFiles lists the documents, relative to the root of the module.
func docFiles(t *testing.T) []string {
	t.Helper()
	files, err := filepath.Glob("../docs/*.md")
	if err != nil || len(files) < 5 {
		t.Fatalf("documents: %q, %v", files, err)
	}
	return append([]string{"../README.md", "../CONTRIBUTING.md"}, files...)
}

// consoleBlocks returns the blocks of a document marked as console, without a list's indentation.
func consoleBlocks(text string) (blocks [][]string) {
	var block []string
	inside, indent := false, ""
	for line := range strings.Lines(text) {
		line = strings.TrimRight(line, "\n")
		fence := strings.TrimLeft(line, " ")
		switch {
		case !inside && fence == "```console":
			inside, indent, block = true, line[:len(line)-len(fence)], nil
		case inside && fence == "```":
			inside = false
			blocks = append(blocks, block)
		case inside:
			block = append(block, strings.TrimPrefix(line, indent))
		}
	}
	return blocks
}

// commands returns the commands in a block: lines after "$ " or "# ", with their continuation lines.
func commands(block []string) (list []string) {
	more := false
	for _, line := range block {
		switch {
		case more:
			list[len(list)-1] += "\n" + line
		case strings.HasPrefix(line, "$ ") || strings.HasPrefix(line, "# "):
			list = append(list, line[2:])
		default:
			continue // output
		}
		more = strings.HasSuffix(line, `\`)
	}
	return list
}

// Commands in documents work as printed, except for the name of the registry and the commands in notRun.
func TestDocs(t *testing.T) {
	s := stack.New(t, stack.Options{Mode: stack.Streaming})
	web, jobs, err := testimage.Twins()
	if err != nil {
		t.Fatal(err)
	}
	registry, _, _ := strings.Cut(s.Push("web", web), "/")
	s.Push("jobs", jobs)
	bin := sandboxPrograms(t, s.Stack)
	used := map[string]bool{}
	for _, file := range docFiles(t) {
		text, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		blocks := consoleBlocks(string(text))
		if len(blocks) == 0 {
			continue
		}
		t.Run(filepath.Base(file), func(t *testing.T) {
			dir := sandbox(t, web, jobs)
			for _, block := range blocks {
				var script []string
				for _, c := range commands(block) {
					if why := reasonNotToRun(c, used); why != "" {
						t.Logf("not run: %s: %s", c, why)
						continue
					}
					script = append(script, strings.ReplaceAll(c, "registry.example.com", registry))
				}
				if len(script) == 0 {
					continue
				}
				cmd := exec.Command("bash", "-e", "-x", "-c", strings.Join(script, "\n"))
				cmd.Dir = dir
				cmd.Env = []string{
					"PATH=" + bin + ":/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
					"HOME=" + dir, "LANG=C.UTF-8",
				}
				out, err := cmd.CombinedOutput()
				t.Logf("%s", out)
				if err != nil {
					t.Errorf("%s:\n%s\nfails: %v", file, strings.Join(script, "\n"), err)
				}
			}
		})
	}
	for prefix := range notRun {
		if !used[prefix] {
			t.Errorf("no document has the command %q, which is listed as not run", prefix)
		}
	}
}

func reasonNotToRun(command string, used map[string]bool) string {
	for prefix, why := range notRun {
		if strings.HasPrefix(command, prefix) {
			used[prefix] = true
			return why
		}
	}
	return ""
}

// sandbox makes a directory that commands take for the root of the source, with two images beside.
func sandbox(t *testing.T, web, jobs v1.Image) string {
	t.Helper()
	// On disk, for pools: /tmp may be a tmpfs.
	cache, err := stack.CacheDir()
	if err != nil {
		t.Fatal(err)
	}
	dir, err := os.MkdirTemp(filepath.Join(cache, "run"), "docs-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := os.RemoveAll(dir); err != nil {
			t.Error(err)
		}
	})
	root, err := filepath.Abs("..")
	if err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"docs", "config"} {
		if err := os.Symlink(filepath.Join(root, name), filepath.Join(dir, name)); err != nil {
			t.Fatal(err)
		}
	}
	for name, img := range map[string]v1.Image{"web": web, "jobs": jobs} {
		if err := testimage.WriteArchive(filepath.Join(dir, name+".tar"), img); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.CopyFS(filepath.Join(dir, "llama"), fstest.MapFS{
		"config.json": {Data: []byte("{}\n")}, "weights.safetensors": {Data: testimage.Noise(1, 5<<20)},
	}); err != nil {
		t.Fatal(err)
	}
	return dir
}

// sandboxPrograms makes a directory with programs that use the stack in place of the machine.
func sandboxPrograms(t *testing.T, s *stack.Stack) string {
	t.Helper()
	cache, err := stack.CacheDir()
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	config := fmt.Sprintf("root = %q\naddress = %q\n[containerd]\naddress = %q\n", s.DaemonRoot(), s.Run+"/daxfs.sock",
		s.Run+"/containerd.sock")
	if err := os.WriteFile(filepath.Join(dir, "daxfs.toml"), []byte(config), 0o644); err != nil {
		t.Fatal(err)
	}
	own, bin, containerd := filepath.Join(cache, "own"), filepath.Join(cache, "bin"), s.Run+"/containerd.sock"
	for name, script := range map[string]string{
		"ctr": fmt.Sprintf("exec %s/ctr --address %s --namespace %s \"$@\"", bin, containerd, stack.Namespace),
		"nerdctl": fmt.Sprintf("exec %s/nerdctl --address %s --namespace %s --data-root %s/nerdctl "+
			"--cni-path %s --cni-netconfpath %s/cni "+
			"--insecure-registry --cgroup-manager cgroupfs \"$@\"", bin, containerd, stack.Namespace,
			s.Dir, bin, s.Dir),
		"daxfs": fmt.Sprintf("if [ \"$1\" = doctor ]; then shift\n"+
			"set -- doctor --containerd %s --containerd-config %s/containerd.toml --config %s/daxfs.toml \"$@\"; fi\n"+
			"exec %s/daxfs \"$@\"", containerd, s.Dir, dir, own),
		// doctor runs it to dump its configuration.
		"containerd":        fmt.Sprintf("exec %s/containerd \"$@\"", bin),
		"daxfs-snapshotter": fmt.Sprintf("exec %s/daxfs-snapshotter \"$@\"", own),
	} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte("#!/bin/sh\n"+script+"\n"), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	if path := kustomize(cache); path != "" {
		if err := os.Symlink(path, filepath.Join(dir, "kustomize")); err != nil {
			t.Fatal(err)
		}
	}
	return dir
}

// Every printed command is in a console block, where TestDocs finds it.
func TestDocsMarked(t *testing.T) {
	for _, file := range docFiles(t) {
		text, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		for n, line := range strings.Split(string(text), "\n") {
			if fence := strings.TrimSpace(line); strings.HasPrefix(fence, "```") && len(fence) > 3 &&
				fence != "```console" && fence != "```toml" && fence != "```go" {
				t.Errorf("%s:%d: a block of kind %q, expected console, toml or go", file, n+1, fence[3:])
			}
		}
	}
}

// mention matches daxfs and its arguments in a code span or an indented block.
var mention = regexp.MustCompile("(?m)(?:^(?:    )+[#$]? ?|^ *[#$] |`)(daxfs [a-z][^`\n]*)")

// Commands and flags in documents outside console blocks exist.
func TestDocsMentions(t *testing.T) {
	if unavailable := os.Getuid() != 0 || testing.Short(); unavailable {
		t.Skip("the programs are only built for root, and not with -short")
	}
	cache, err := stack.CacheDir()
	if err != nil {
		t.Fatal(err)
	}
	help := func(args ...string) string {
		out, err := exec.Command(filepath.Join(cache, "own/daxfs"), append(args, "--help")...).CombinedOutput()
		if err != nil {
			return ""
		}
		return string(out)
	}
	seen := 0
	for _, file := range docFiles(t) {
		text, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		for _, m := range mention.FindAllStringSubmatch(string(text), -1) {
			line, _, _ := strings.Cut(m[1], "    ") // an explanation follows
			words := strings.Fields(strings.TrimRight(line, ".…"))[1:]
			command := words[:1]
			if (command[0] == "pool" || command[0] == "vm") && len(words) > 1 {
				command = words[:2]
			}
			usage := help(command...)
			if !strings.Contains(usage, "daxfs "+strings.Join(command, " ")) {
				t.Errorf("%s: %q: there is no such command", file, line)
				continue
			}
			seen++
			for _, w := range words {
				if flag, _, _ := strings.Cut(w, "="); strings.HasPrefix(flag, "--") && !strings.Contains(usage, flag) {
					t.Errorf("%s: %q: the command has no flag %s", file, line, flag)
				}
			}
		}
	}
	if seen < 10 {
		t.Errorf("%d commands found in all documents", seen)
	}
}

var link = regexp.MustCompile(`\]\(([^)#]+)(#[^)]*)?\)`)

// Links in documents lead to existing files.
func TestDocsLinks(t *testing.T) {
	for _, file := range docFiles(t) {
		text, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		for _, m := range link.FindAllStringSubmatch(string(text), -1) {
			if strings.Contains(m[1], "://") {
				continue
			}
			if _, err := os.Stat(filepath.Join(filepath.Dir(file), m[1])); err != nil {
				t.Errorf("%s: %v", file, err)
			}
		}
	}
}

// The messages that operations.md explains exist in our code or in containerd's.
func TestDocsMessages(t *testing.T) {
	text, err := os.ReadFile("../docs/operations.md")
	if err != nil {
		t.Fatal(err)
	}
	_, messages, ok := strings.Cut(string(text), "\n## Messages\n")
	if !ok {
		t.Fatal("operations.md has no section Messages")
	}
	containerd, err := exec.Command("go", "list", "-m", "-f", "{{.Dir}}",
		"github.com/containerd/containerd/v2").Output()
	if err != nil {
		t.Fatal(err)
	}
	ours, theirs := sources(t, "..", "integration"), ""
	seen := 0
	for _, section := range strings.Split(messages, "\n### ")[1:] {
		corpus := ours
		if strings.HasPrefix(section, "containerd") {
			if theirs == "" {
				theirs = sources(t, strings.TrimSpace(string(containerd)), "integration")
			}
			corpus = theirs
		}
		for line := range strings.Lines(section) {
			if !strings.HasPrefix(line, "| `") {
				continue
			}
			message, _, _ := strings.Cut(line[3:], "`")
			seen++
			if strings.HasPrefix(message, "dial unix ") {
				continue // from a Go library
			}
			for _, part := range strings.Split(message, "…") {
				part = strings.TrimSuffix(strings.TrimSpace(part), ": daxfs") // a name that is filled in
				if !strings.Contains(corpus, strings.ReplaceAll(part, `"`, `\"`)) && !strings.Contains(corpus, part) {
					t.Errorf("no code has the message %q", part)
				}
			}
		}
	}
	if seen < 20 {
		t.Errorf("%d messages found in the tables", seen)
	}
}

// sources returns the text of all Go files below a directory, without tests and one directory.
func sources(t *testing.T, root, except string) string {
	t.Helper()
	var all strings.Builder
	err := filepath.WalkDir(root, func(path string, d fs.DirEntry, err error) error {
		switch {
		case err != nil:
			return err
		case d.IsDir() && (path == filepath.Join(root, except) || d.Name() == ".git"):
			return fs.SkipDir
		case d.IsDir() || !strings.HasSuffix(path, ".go") || strings.HasSuffix(path, "_test.go"):
			return nil
		}
		b, err := os.ReadFile(path)
		all.Write(b)
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return all.String()
}
