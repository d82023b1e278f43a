package daxfs_test

import (
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/daxfs/daxfs-snapshotter/daxfs"
)

// programs runs programs with capabilities and checks what the kernel grants. It is concurrency-safe.
type programs struct {
	bound, valid uint64 // capabilities that this process may pass on, and those known to the kernel

	mu   sync.Mutex
	sane map[string]bool // programs already run with the right result
	runs int
}

func newPrograms(t testing.TB) *programs {
	t.Helper()
	status, err := os.ReadFile("/proc/self/status")
	if err != nil {
		t.Fatal(err)
	}
	bound, err := statusSet(status, "CapBnd")
	if err != nil {
		t.Fatal(err)
	}
	last, err := os.ReadFile("/proc/sys/kernel/cap_last_cap")
	if err != nil {
		t.Fatal(err)
	}
	n, err := strconv.Atoi(strings.TrimSpace(string(last)))
	if err != nil {
		t.Fatal(err)
	}
	return &programs{bound: bound, valid: 1<<(n+1) - 1, sane: map[string]bool{}}
}

// program returns an executable that waits for a minute.
func program(t testing.TB) []byte {
	t.Helper()
	path, err := exec.LookPath("sleep")
	if err != nil {
		t.Fatal(err)
	}
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// compare runs a program executable by everybody and returns what is wrong with its capabilities.
func (p *programs) compare(host string, in *daxfs.Inode) string {
	if in.Mode&0o7111 != 0o111 {
		return ""
	}
	value, ok, err := in.Xattr("security.capability")
	if err != nil || !ok {
		return ""
	}
	if _, ok, err := in.Xattr("system.posix_acl_access"); ok || err != nil {
		return ""
	}
	key := fmt.Sprintf("%x %o %d:%d %d", value, in.Mode, in.UID, in.GID, in.Off)
	p.mu.Lock()
	sane := p.sane[key]
	p.mu.Unlock()
	if sane {
		return ""
	}
	const magic = "\x7fELF"
	if head, err := in.View(0, len(magic)); err != nil || string(head) != magic {
		return ""
	}
	want := p.expect(value)
	got := runAsNobody(host)
	if got != want {
		return fmt.Sprintf("%s, expected %s of %x", got, want, value)
	}
	p.mu.Lock()
	p.sane[key] = true
	p.runs++
	p.mu.Unlock()
	return ""
}

// expect returns what capabilities(7) guarantees to a user without capabilities who runs a program with these.
func (p *programs) expect(value []byte) string {
	le := binary.LittleEndian
	if len(value) == 24 { // for another user namespace
		return capSets(0, 0)
	}
	may := (uint64(le.Uint32(value[4:])) | uint64(le.Uint32(value[12:]))<<32) & p.valid
	permitted := may & p.bound
	if value[0]&1 == 0 {
		return capSets(permitted, 0)
	}
	if permitted != may {
		return unix.EPERM.Error()
	}
	return capSets(permitted, permitted)
}

func capSets(permitted, effective uint64) string {
	return fmt.Sprintf("permitted %x effective %x", permitted, effective)
}

// runAsNobody starts a program as a user without capabilities, inspects it and kills it.
func runAsNobody(host string) string {
	f, err := os.Open(host)
	if err != nil {
		return err.Error()
	}
	defer f.Close()
	cmd := &exec.Cmd{
		Path: "/proc/self/fd/3", Args: []string{"sleep", "60"}, // nobody may not search the directories of tests
		ExtraFiles:  []*os.File{f},
		SysProcAttr: &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: 65534, Gid: 65534}},
	}
	if err := cmd.Start(); err != nil {
		var errno syscall.Errno
		errors.As(err, &errno)
		return errno.Error()
	}
	defer func() {
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
	}()
	status, err := afterExec(cmd.Process.Pid)
	if err != nil {
		return err.Error()
	}
	permitted, perr := statusSet(status, "CapPrm")
	effective, eerr := statusSet(status, "CapEff")
	if err := errors.Join(perr, eerr); err != nil {
		return err.Error()
	}
	return capSets(permitted, effective)
}

// afterExec returns the status of a started process as soon as the kernel has given the program its
// capabilities. The kernel closes descriptors, for which Start waits, before it does so, and sets the
// arguments afterwards.
func afterExec(pid int) ([]byte, error) {
	dir := fmt.Sprintf("/proc/%d/", pid)
	for {
		arguments, err := os.ReadFile(dir + "cmdline")
		if err != nil {
			return nil, err
		}
		status, err := os.ReadFile(dir + "status")
		if err != nil || len(arguments) > 0 || strings.Contains(string(status), "\nState:\tZ") {
			return status, err
		}
		time.Sleep(time.Millisecond)
	}
}

// statusSet returns a set of capabilities in a status file of /proc.
func statusSet(status []byte, name string) (uint64, error) {
	for line := range strings.Lines(string(status)) {
		if text, ok := strings.CutPrefix(line, name+":"); ok {
			return strconv.ParseUint(strings.TrimSpace(text), 16, 64)
		}
	}
	return 0, fmt.Errorf("%q has no line %s", status, name)
}
