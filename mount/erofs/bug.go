package erofs

import (
	"fmt"
	"os"
	"regexp"
	"strconv"

	"golang.org/x/sys/unix"
)

// CVE is the bug that Bug looks for.
const CVE = "CVE-2026-23224"

// Bug describes CVE-2026-23224 in a sentence for people if the running kernel has it, else it returns
// "". The bug is a use after free in file-backed EROFS with direct I/O: the one case where a working
// mount must not be used. It is fixed in 6.12.72, 6.18.11, 6.19.1 and 7.0; before 6.12 there is no
// such mount.
//
// The version is that of the stable kernel as the distribution reports it. A kernel that fixed the bug
// without a new version counts as affected; a loop device serves as well.
func Bug() string {
	var u unix.Utsname
	if err := unix.Uname(&u); err != nil {
		return ""
	}
	signature, _ := os.ReadFile("/proc/version_signature") // Ubuntu only: its release does not name the stable kernel
	return bug(unix.ByteSliceToString(u.Release[:]), unix.ByteSliceToString(u.Version[:]), string(signature))
}

var (
	releaseVersion   = regexp.MustCompile(`^(\d+)\.(\d+)(?:\.(\d+))?`)
	debianVersion    = regexp.MustCompile(`\bDebian (\d+)\.(\d+)\.(\d+)`)
	signatureVersion = regexp.MustCompile(`^Ubuntu \S+ (\d+)\.(\d+)\.(\d+)`)
)

func bug(release, version, signature string) string {
	m := debianVersion.FindStringSubmatch(version)
	if m == nil {
		m = signatureVersion.FindStringSubmatch(signature)
	}
	if m == nil {
		m = releaseVersion.FindStringSubmatch(release)
	}
	if m == nil {
		return ""
	}
	var v [3]int
	for i := range v {
		v[i], _ = strconv.Atoi(m[i+1]) // digits; none is 0
	}
	major, minor, patch := v[0], v[1], v[2]
	switch {
	case major != 6 || minor < 12 || minor > 19:
		return ""
	case minor == 12 && patch >= 72, minor == 18 && patch >= 11, minor == 19 && patch >= 1:
		return ""
	}
	return fmt.Sprintf("Linux %d.%d.%d has %s: file-backed EROFS with direct I/O uses memory after it was freed "+
		"(fixed in 6.12.72, 6.18.11 and 6.19.1)", major, minor, patch, CVE)
}
