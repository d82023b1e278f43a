// Package lease keeps the owner of a pool from freeing memory that a reader uses. Each reader has a
// small region of memory, its lease region. Only the reader writes it, and the owner reads it.
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
// Reader and owner each write, then fence, then read what the other wrote. So if a claim and a removal
// happen at the same time, at least one side sees the other: docs/pool-format.md has the proof. No
// clock ends a claim. It ends when the reader releases it; when the owner gets the lock that the
// reader's launcher holds while the reader lives ("flock:"); or when somebody declares the reader
// gone, with Void.
//
// The owner trusts nothing in a region. A reader that lies only keeps memory from being freed.
package lease
