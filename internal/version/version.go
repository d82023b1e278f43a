// Package version returns the version of a program.
package version

import "runtime/debug"

// linked is set by release builds with -ldflags "-X …/internal/version.linked=v1.2.3".
var linked string

// String returns the linked version, else the version of the module, else the commit.
func String() string {
	if linked != "" {
		return linked
	}
	info, ok := debug.ReadBuildInfo()
	if !ok {
		return "unknown"
	}
	if v := info.Main.Version; v != "" && v != "(devel)" {
		return v
	}
	for _, s := range info.Settings {
		if s.Key == "vcs.revision" && len(s.Value) >= 12 {
			return "devel-" + s.Value[:12]
		}
	}
	return "devel"
}
