// Package version tells which build a program is.
package version

import "runtime/debug"

// linked is set by release builds with -ldflags "-X …/internal/version.linked=v1.2.3".
var linked string

// String returns what was linked in, else the version of the module, else the commit that was built.
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
