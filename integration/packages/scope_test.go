//go:build !dist

package packages

// suites are the Debian releases to test on, and packageVersions those of the packages. What needs another is
// tested with the build tag dist only.
var (
	suites          = []string{"bookworm"}
	packageVersions = []string{oldVersion}
)
