// Package pool keeps many images in one region of shared memory, and stores every distinct file once.
//
// A Batch puts contents into the pool as extents. A layer holds the extents of one layer's files and a
// payload that the pool does not interpret. An image holds the extents of its files and has its own
// metadata. An extent without a holder becomes free.
//
//	r, err := region.Open(region.Config{Kind: region.KindFile, Path: dir + "/pool", Size: 64 << 30, Create: true})
//	...
//	p, err := pool.Open(r, dir+"/pool.db", pool.Options{})
//	if errors.Is(err, pool.ErrWiped) { // new, or memory after a reboot
//		p, err = pool.Reset(r, dir+"/pool.db", pool.Options{})
//	}
//	...
//	b := p.Begin()
//	defer b.Discard()
//	data, err := b.Put(ctx, size, file) // data.Off is an offset in the pool
//	...
//	err = b.CommitLayer(ctx, "sha256:…", payload)
//	...
//	img, err := p.AddImage(ctx, chainID, root, daxfs.Options{}) // img.Name() is its directory in the mounted pool
//
// One process owns a pool. Others, in this kernel and in kernels that map the same memory, read its
// catalogue with ReadCatalogue and the images in it. Nothing that an image refers to changes until it
// is removed.
//
// # What survives
//
// When CommitLayer and AddImage return, what they added survives whatever the region survives. A crash
// at any moment leaves everything that was committed, and nothing else. The region holds bytes; the
// owner's index, a database file, says what they are. The index is written after the bytes are
// durable, and everything that it does not list is free. A region without a header was wiped
// (ErrWiped); nothing in it is trusted.
//
// docs/pool-format.md describes the bytes.
package pool
