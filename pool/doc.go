// Package pool keeps the contents and the metadata of many images in one region of shared memory, every distinct file
// once.
//
// Contents are put in batches, as extents. A layer holds the extents of one layer's files together with a payload that
// the pool does not look into; an image holds those of its files and has its metadata in a segment. An extent that
// nothing holds is free.
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
//	data, err := b.Put(ctx, size, file) // data.Off is an address in the pool
//	...
//	err = b.CommitLayer(ctx, "sha256:…", payload)
//	...
//	img, err := p.AddImage(ctx, chainID, root, daxfs.Options{}) // mount the window [img.Off, img.Off+img.Size)
//
// One process owns a pool. Others, in this kernel and in those that map the same memory, read its catalogue with
// ReadCatalogue and the images it lists; nothing that an image refers to changes until the image is removed.
//
// # What survives
//
// CommitLayer and AddImage return when what they added survives whatever the region survives. A crash at any moment
// leaves everything that was committed, and nothing of what was not. The region says where bytes are and the owner's
// index, a database file, says what they are: the index is written after the bytes are durable, and what it does not
// list is free. A region without a header was wiped (ErrWiped) and nothing is believed of it.
//
// docs/pool-format.md describes the bytes.
package pool
