package main

import (
	"bytes"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/daxfs/daxfs-snapshotter/internal/slow"
)

// completions are texts typed before a TAB, and the arguments with which daxfs is then called.
var completions = []struct{ typed, args string }{
	{"daxfs insp", "<inspect>"},
	{"daxfs inspect im", "<inspect><image>"},
	{"daxfs inspect image --js", "<inspect><image><--json>"},
	{"daxfs convert --platf", "<convert><--platform>"},
	{"daxfs convert -o im", "<convert><-o><image>"},
	{"daxfs convert --output=im", "<convert><--output=image>"},
	{"daxfs convert -q rootfs:lay", "<convert><-q><rootfs:layout>"},
	{"daxfs pool ini", "<pool><init>"},
	{"daxfs pool init --si", "<pool><init><--size>"},
	{"daxfs mount --pool im", "<mount><--pool><image>"},
	{"daxfs umount -- lay", "<umount><--><layout>"},
	{"daxfs completion fi", "<completion><fish>"},
	{"daxfs version --", "<version><--help>"},
}

// TestCompletion presses TAB in real shells.
func TestCompletion(t *testing.T) {
	slow.Skip(t, "types into every shell that is installed")
	program, err := exec.LookPath("daxfs")
	if err != nil {
		t.Fatal(err)
	}
	for name, s := range map[string]struct {
		shell, file string
		start       []string
		setup       string // typed first
	}{
		"bash": {"bash", "script", []string{"--norc", "--noprofile", "-i"}, "source ../script"},
		"zsh, sourced": {
			"zsh", "script",
			[]string{"-f", "-i"},
			"autoload -Uz compinit; compinit -u -D; source ../script",
		},
		"zsh, in a file": {
			"zsh", "functions/_daxfs",
			[]string{"-f", "-i"},
			"fpath=($PWD/../functions $fpath); autoload -Uz compinit; compinit -u -D",
		},
		"fish": {"fish", "home/fish/completions/daxfs.fish", nil, ""},
	} {
		t.Run(name, func(t *testing.T) {
			if _, err := exec.LookPath(s.shell); err != nil {
				t.Skipf("%s is not installed", s.shell)
			}
			dir := t.TempDir()
			for _, d := range []string{"bin", "home", "work/layout", filepath.Dir(s.file)} {
				if err := os.MkdirAll(filepath.Join(dir, d), 0o755); err != nil {
					t.Fatal(err)
				}
			}
			script, err := exec.Command(program, "completion", s.shell).Output()
			if err != nil {
				t.Fatal(err)
			}
			// The script in place of daxfs prints its arguments, and lets daxfs answer the shell's questions.
			daxfs := fmt.Sprintf("#!/bin/sh\nfor last; do :; done\n[ \"$last\" != %s ] || exec %s \"$@\"\n"+
				"printf 'CALLED'; printf '<%%s>' \"$@\"; echo\n", completionFlag, program)
			for name, b := range map[string]string{s.file: string(script), "bin/daxfs": daxfs, "work/image": ""} {
				if err := os.WriteFile(filepath.Join(dir, name), []byte(b), 0o755); err != nil {
					t.Fatal(err)
				}
			}
			cmd := exec.Command(s.shell, s.start...)
			cmd.Dir = filepath.Join(dir, "work")
			cmd.Env = []string{
				"PATH=" + filepath.Join(dir, "bin") + ":" + os.Getenv("PATH"), "HOME=" + filepath.Join(dir, "home"),
				"XDG_CONFIG_HOME=" + filepath.Join(dir, "home"), "TERM=dumb", "LC_ALL=C", "HISTFILE=",
			}
			if s.shell == "fish" {
				askFish(t, cmd)
				return
			}
			keys := s.setup + "\r"
			for _, c := range completions {
				keys += c.typed + "\t\r"
			}
			seen := typeAt(t, cmd, keys+"exit\r")
			var got []string
			for line := range strings.Lines(seen) {
				if _, args, ok := strings.Cut(line, "CALLED"); ok {
					got = append(got, strings.TrimSpace(args))
				}
			}
			for i, c := range completions {
				if i >= len(got) || strings.ReplaceAll(got[i], "/>", ">") != c.args {
					t.Fatalf("%q and TAB: %q, expected %q; on the terminal:\n%q", c.typed,
						got[min(i, len(got)):], c.args, seen)
				}
			}
		})
	}
}

// askFish uses a command that prints a TAB's completions. For "--flag=" and for a source it prints the whole word.
func askFish(t *testing.T, shell *exec.Cmd) {
	for _, c := range completions {
		cmd := exec.Command(shell.Path, "-c", "complete -C "+"'"+c.typed+"'")
		cmd.Dir, cmd.Env = shell.Dir, shell.Env
		out, err := cmd.CombinedOutput()
		if err != nil {
			t.Fatalf("%v\n%s", err, out)
		}
		words := strings.Split(strings.Trim(c.args, "<>"), "><")
		word, _, _ := strings.Cut(strings.TrimSpace(string(out)), "\t")
		if want := words[len(words)-1]; strings.TrimSuffix(word, "/") != want {
			t.Errorf("%q: fish offers %q, expected %q", c.typed, out, want)
		}
	}
}

// typeAt starts a program on a terminal, types keys and returns the output until the program ended.
func typeAt(t *testing.T, cmd *exec.Cmd, keys string) string {
	t.Helper()
	master, tty := pseudoTerminal(t)
	cmd.Stdin, cmd.Stdout, cmd.Stderr = tty, tty, tty
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true, Setctty: true}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	tty.Close()
	stop := time.AfterFunc(time.Minute, func() { _ = cmd.Process.Kill() })
	defer stop.Stop()
	var seen bytes.Buffer
	done := make(chan struct{})
	go func() {
		defer close(done)
		_, _ = seen.ReadFrom(master) // ends with EIO when the last process with the terminal open ends
	}()
	if _, err := master.WriteString(keys); err != nil {
		t.Error(err)
	}
	err := cmd.Wait()
	<-done
	if err != nil {
		t.Logf("the shell: %v", err)
	}
	return seen.String()
}
