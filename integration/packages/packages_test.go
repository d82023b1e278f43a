//go:build dist

package packages

import (
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/daxfs/daxfs-snapshotter/integration/stack"
)

// everything lists a system's files except the data of dpkg, rpm and the like.
const everything = `find / -xdev \( -path /proc -o -path /sys -o -path /dev -o -path /var/lib/dpkg \
	-o -path /var/lib/rpm -o -path /usr/lib/sysimage -o -path /var/log -o -path /var/cache -o -path /tmp \
	-o -path /run/systemd -o -path /root \) -prune -o -printf '%p %M %u:%g\n' | sort`

// The Debian package installs in clean systems, keeps the operator's configuration through an upgrade,
// and when purged leaves only the daemon's data.
func TestDebian(t *testing.T) {
	for _, suite := range suites {
		t.Run(suite, func(t *testing.T) {
			r := newRoot(t, suite)
			before := r.sh(everything)
			r.give(dist(t, oldVersion, "*.deb"), "/root/old.deb")
			r.give(dist(t, newVersion, "*.deb"), "/root/new.deb")
			r.sh("dpkg --install /root/old.deb")
			added := difference(r.sh(everything), before)
			t.Logf("installed:\n%s", strings.Join(added, "\n"))
			for _, want := range []string{
				"/usr/bin/daxfs -rwxr-xr-x root:root", "/usr/bin/daxfs-snapshotter -rwxr-xr-x root:root",
				"/etc/daxfs-snapshotter/config.toml -rw-r--r-- root:root",
				"/usr/lib/systemd/system/daxfs-snapshotter.service -rw-r--r-- root:root",
				"/usr/lib/systemd/system/daxfs-snapshotter.socket -rw-r--r-- root:root",
				"/usr/share/daxfs/containerd/v4.toml -rw-r--r-- root:root",
			} {
				if !slices.Contains(added, want) {
					t.Errorf("not installed: %s", want)
				}
			}
			out := r.sh("dpkg --verify daxfs-snapshotter; daxfs --version; daxfs-snapshotter config check")
			if !strings.Contains(out, oldVersion) {
				t.Errorf("installed is %q, expected %s", out, oldVersion)
			}
			if out := r.sh("systemd-analyze verify --man=no /usr/lib/systemd/system/daxfs-snapshotter.*"); out != "" {
				t.Errorf("systemd-analyze verify: %s", out)
			}
			r.sh("echo '# mine' >>/etc/daxfs-snapshotter/config.toml; dpkg --install /root/new.deb")
			if out := r.sh("daxfs --version; tail -n 1 /etc/daxfs-snapshotter/config.toml"); !strings.Contains(out,
				newVersion) ||
				!strings.HasSuffix(out, "\n# mine\n") {
				t.Errorf("after the upgrade there is %q", out)
			}
			r.sh("mkdir -p /var/lib/daxfs-snapshotter/pool; echo data >/var/lib/daxfs-snapshotter/pool/live; " +
				"dpkg --remove daxfs-snapshotter")
			if out := r.sh("tail -n 1 /etc/daxfs-snapshotter/config.toml"); out != "# mine\n" {
				t.Errorf("dpkg --remove has taken the configuration: %q", out)
			}
			r.sh("dpkg --purge daxfs-snapshotter")
			want := []string{
				"/var/lib/daxfs-snapshotter drwxr-xr-x root:root",
				"/var/lib/daxfs-snapshotter/pool drwxr-xr-x root:root",
				"/var/lib/daxfs-snapshotter/pool/live -rw-r--r-- root:root",
			}
			after := r.sh(everything)
			if left := difference(after, before); !slices.Equal(left, want) {
				t.Errorf("after the purge there is left:\n%s", strings.Join(left, "\n"))
			}
			if lost := difference(before, after); len(lost) > 0 {
				t.Errorf("with the package has gone:\n%s", strings.Join(lost, "\n"))
			}
		})
	}
}

// The RPM package has the same files, keeps the configuration, and leaves nothing. Debian's rpm stands
// in for those of other distributions.
func TestRPM(t *testing.T) {
	r := newRoot(t, "bookworm")
	old, upgrade := dist(t, oldVersion, "*.rpm"), dist(t, newVersion, "*.rpm")
	listed := strings.Fields(r.host("rpm", "--query", "--list", "--package", old))
	r.sh("mkdir /root/lists")
	r.give(dist(t, oldVersion, "*.deb"), "/root/old.deb")
	ofDebian := strings.Fields(r.sh(`dpkg-deb --fsys-tarfile /root/old.deb | tar -t | grep -v '/$' |
		sed 's|^\./|/|; s|^[^/]|/&|'`))
	for _, file := range ofDebian {
		// These two have another place in each.
		if strings.HasSuffix(file, "/_daxfs") || strings.HasSuffix(file, "/copyright") {
			continue
		}
		if !slices.Contains(listed, file) {
			t.Errorf("the Debian package has %s, the RPM has not", file)
		}
	}
	before := r.sh(everything)
	rpm := func(args ...string) string {
		t.Helper()
		return r.host("rpm", append([]string{"--root", r.dir, "--dbpath", "/var/lib/rpm", "--nodeps"}, args...)...)
	}
	rpm("--upgrade", old)
	if out := rpm("--verify", "daxfs-snapshotter"); out != "" {
		t.Errorf("rpm --verify: %s", out)
	}
	r.sh("echo '# mine' >>/etc/daxfs-snapshotter/config.toml")
	rpm("--upgrade", upgrade)
	if out := r.sh("daxfs --version; tail -n 1 /etc/daxfs-snapshotter/config.toml"); !strings.Contains(out,
		newVersion) || !strings.HasSuffix(out, "\n# mine\n") {
		t.Errorf("after the upgrade there is %q", out)
	}
	rpm("--erase", "daxfs-snapshotter")
	// rpm keeps changed files. On RPM systems, directories of zsh and the like belong to other packages.
	left := slices.DeleteFunc(difference(r.sh(everything), before),
		func(line string) bool { return !strings.Contains(line, "daxfs") })
	if want := []string{
		"/etc/daxfs-snapshotter drwxr-xr-x root:root",
		"/etc/daxfs-snapshotter/config.toml.rpmsave -rw-r--r-- root:root",
	}; !slices.Equal(left, want) {
		t.Errorf("after rpm --erase there is left:\n%s", strings.Join(left, "\n"))
	}
}

// A clean copy of the sources in another directory builds to the same bytes.
func TestReproducible(t *testing.T) {
	copied := t.TempDir()
	out, err := exec.Command("sh", "-c", `git -C ../.. ls-files -z --cached --others --exclude-standard |
		tar -C ../.. --null --files-from - --create | tar -x -C "$0"`,
		copied).CombinedOutput()
	if err != nil {
		t.Fatalf("copy the sources: %v\n%s", err, out)
	}
	again := filepath.Join(t.TempDir(), "dist")
	t.Setenv("GOCACHE", t.TempDir())
	if err := makeDist(copied, oldVersion, again); err != nil {
		t.Fatal(err)
	}
	cache, err := stack.CacheDir()
	if err != nil {
		t.Fatal(err)
	}
	first := distDir(cache, oldVersion)
	if out, err := exec.Command("diff", "-r", first, again).CombinedOutput(); err != nil {
		t.Errorf("two times \"make dist\": %v\n%s", err, out)
	}
	check := exec.Command("sha256sum", "--check", "--quiet", "SHA256SUMS")
	check.Dir = first
	if out, err := check.CombinedOutput(); err != nil {
		t.Errorf("sha256sum --check: %v\n%s", err, out)
	}
	entries, err := os.ReadDir(first)
	if err != nil {
		t.Fatal(err)
	}
	var names []string
	for _, e := range entries {
		names = append(names, e.Name())
	}
	if want := files("amd64"); !slices.Equal(names, want) {
		t.Errorf("make dist made %q, expected %q", names, want)
	}
}

// difference returns the lines of a that b lacks.
func difference(a, b string) (list []string) {
	known := map[string]bool{}
	for line := range strings.Lines(b) {
		known[line] = true
	}
	for line := range strings.Lines(a) {
		if !known[line] {
			list = append(list, strings.TrimSuffix(line, "\n"))
		}
	}
	return list
}
