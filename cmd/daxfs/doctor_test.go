package main

import (
	"fmt"
	"net"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// TestDoctorSeesWhoServes: doctor reports a daemon that is not root's, and a socket that nobody answers.
func TestDoctorSeesWhoServes(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("takes another user's part, which needs root")
	}
	dir, err := os.MkdirTemp("", "daxfs") // a socket needs a short name
	if err != nil {
		t.Fatal(err)
	}
	defer os.RemoveAll(dir)
	if err := os.Chmod(dir, 0o777); err != nil {
		t.Fatal(err)
	}
	socket, file := filepath.Join(dir, "daxfs.sock"), filepath.Join(dir, "config.toml")
	text := "root = \"" + dir + "\"\naddress = \"" + socket + "\"\n"
	if err := os.WriteFile(file, []byte(text), 0o644); err != nil {
		t.Fatal(err)
	}
	check := func(name string) support {
		t.Helper()
		r := checkDaemon(t.Context(), containerdFiles{daemonConfig: file}, 0)
		i := slices.IndexFunc(r.Checks, func(s support) bool { return s.Name == name })
		if i < 0 {
			t.Fatalf("doctor does not look at %q: %+v", name, r.Checks)
		}
		return r.Checks[i]
	}
	if s := check("daxfs-snapshotter runs"); s.OK || !strings.Contains(s.Note, "start it") {
		t.Errorf("without a daemon: %+v", s)
	}
	listening := make(chan net.Listener)
	go func() {
		runtime.LockOSThread() // never unlocked: the thread, and with it the user, ends with the goroutine
		keep, nobody := ^uintptr(0), uintptr(65534)
		if _, _, errno := unix.RawSyscall(unix.SYS_SETRESUID, keep, nobody, keep); errno != 0 {
			t.Error(errno)
		}
		l, err := net.Listen("unix", socket)
		if err != nil {
			t.Error(err)
		}
		listening <- l
	}()
	l := <-listening
	if l == nil {
		t.FailNow()
	}
	defer l.Close()
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			c.Close()
		}
	}()
	if s := check("daxfs-snapshotter is root"); s.OK || !strings.Contains(s.Note, "user 65534") ||
		!strings.Contains(s.Note, "run it as root") {
		t.Errorf("a daemon of nobody: %+v", s)
	}
	if s := check("daxfs-snapshotter answers"); s.OK {
		t.Errorf("a daemon that hangs up: %+v", s)
	}
}

// TestDoctorSharedPools: doctor reports missing lease regions and unusable shared pools, also without a daemon.
func TestDoctorSharedPools(t *testing.T) {
	dir := t.TempDir()
	good, away, place := filepath.Join(dir, "good"), filepath.Join(dir, "away"), filepath.Join(dir, "guest.lease")
	mustPool(t, "init", "--size", "64m", good)
	file := filepath.Join(dir, "config.toml")
	text := fmt.Sprintf(`root = %q
address = %q
[pool]
readers = "leases"
leases = [%q, %q]
[shared]
pools = [%q, %q]
leases = { %q = %q }
`, dir, filepath.Join(dir, "s"), "flock:"+place, "0x300000000+8192", good, away, good, place)
	if err := os.WriteFile(file, []byte(text), 0o644); err != nil {
		t.Fatal(err)
	}
	wrong := func() (names []string) {
		for _, s := range checkDaemon(t.Context(), containerdFiles{daemonConfig: file}, 0).Checks {
			if strings.HasPrefix(s.Name, "shared pool") || strings.HasPrefix(s.Name, "lease") {
				if !s.OK && s.Note == "" {
					t.Errorf("%s: no word about what to do", s.Name)
				}
				if !s.OK {
					names = append(names, s.Name)
				}
			}
		}
		return names
	}
	want := []string{"lease region flock:" + place, "lease for shared pool " + good, "shared pool " + away}
	if got := wrong(); !slices.Equal(got, want) {
		t.Errorf("doctor finds %q, expected %q", got, want)
	}
	if err := os.WriteFile(place, make([]byte, 8192), 0o600); err != nil {
		t.Fatal(err)
	}
	if got, want := wrong(), []string{"shared pool " + away}; !slices.Equal(got, want) {
		t.Errorf("with the lease region doctor finds %q, expected %q", got, want)
	}
}

// doctor names a process that could change the pool of a running daemon, such as a careless monitor.
func TestDoctorFindsWriters(t *testing.T) {
	file := filepath.Join(t.TempDir(), "pool")
	if err := os.WriteFile(file, make([]byte, 8192), 0o600); err != nil {
		t.Fatal(err)
	}
	f, err := os.OpenFile(file, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	for _, tc := range []struct {
		name        string
		prot, flags int
		own         int
		want        bool
	}{
		{"writable", unix.PROT_READ | unix.PROT_WRITE, unix.MAP_SHARED, 0, true},
		{"read-only", unix.PROT_READ, unix.MAP_SHARED, 0, false},
		{"copy", unix.PROT_READ | unix.PROT_WRITE, unix.MAP_PRIVATE, 0, false},
		{"daemon", unix.PROT_READ | unix.PROT_WRITE, unix.MAP_SHARED, os.Getpid(), false},
	} {
		m, err := unix.Mmap(int(f.Fd()), 0, 4096, tc.prot, tc.flags)
		if err != nil {
			t.Fatal(err)
		}
		name, ok, note := "", true, ""
		checkWriters(file, tc.own, func(n string, good bool, format string, args ...any) bool {
			name, ok, note = n, good, fmt.Sprintf(format, args...)
			return good
		})
		if ok == tc.want || tc.want && !strings.Contains(note, fmt.Sprintf("process %d", os.Getpid())) {
			t.Errorf("%s mapping: %q is %v: %s", tc.name, name, ok, note)
		}
		unix.Munmap(m)
	}
}
