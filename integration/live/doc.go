// Package live puts mounted pools under load: it tests packages pool and mount together, on the
// running kernel. Images are published, removed and replaced while other processes read, map and hold them.
//
// Tests are bounded by counts, not by time. DAXFS_TEST_STRESS=20 makes them twenty times as long,
// DAXFS_TEST_SEED=n repeats the choices of an earlier run.
package live
