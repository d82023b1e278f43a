// Package lease keeps the owner of a pool from freeing what a reader uses. Each reader has a small region of memory that it
// alone writes, its lease region, and that the owner reads.
//
// A reader:
//
//	l, err := lease.Open("/dev/pmem1", lease.Reader{Name: "guest1", Machine: id})
//	...
//	held, err := l.Claim(poolID, img) // then read the catalogue again: the claim holds if img is still listed
//	...
//	err = l.Release(poolID, img) // when nothing reads the image any more
//
// An owner gives a *Regions to its pool:
//
//	regions, err := lease.NewRegions([]string{"/dev/pmem1", "flock:/run/guest1.lease"})
//	...
//	p.SetLeases(regions)
//
// Reader and owner each write, then fence, then read what the other one writes. So of a claim and a removal at the same
// time at least one sees the other: docs/pool-format.md has the proof. No clock ends a claim. It ends when the reader
// releases it; when the owner gets the lock of a region whose launcher holds that while the reader lives ("flock:"); or
// when somebody says that the reader is gone, with Void.
//
// The owner believes nothing that a region says. A reader that lies keeps memory from being freed.
package lease
