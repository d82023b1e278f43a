// Package live puts pools that are mounted under load: packages pool and mount together, on the kernel that runs.
// Images are published, removed and published again in their place while other processes read, map and hold what
// there is.
//
// Counts bound the tests, not time. DAXFS_TEST_STRESS=20 makes them twenty times as long, DAXFS_TEST_SEED=n repeats
// the choices of an earlier run.
package live
