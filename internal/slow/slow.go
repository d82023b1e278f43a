// Package slow keeps long tests out of "make test-short" and in "make test-race", which is short, too.
package slow

import "testing"

// Leave reports whether slow tests are left out: with -short, but without the race detector, from which no
// test of concurrent code may vanish.
func Leave() bool { return testing.Short() && !RaceDetector }

// Skip skips a slow test, with the reason, if slow tests are left out.
func Skip(t testing.TB, why string) {
	t.Helper()
	if Leave() {
		t.Skip("slow: " + why)
	}
}
