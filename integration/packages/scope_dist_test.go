//go:build dist

package packages

// suites are the Debian releases to test on, and packageVersions those of the packages.
var (
	suites          = []string{"bookworm", "trixie"}
	packageVersions = []string{oldVersion, newVersion}
)
