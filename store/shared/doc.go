// Package shared uses pools of other owners: processes, or kernels that map the same memory.
//
//	pools, err := shared.Open(ctx, shared.Config{Root: dir, Pools: []shared.Source{{Name: "/dev/pmem0"}}, ...})
//	err = pools.Claim(ctx, chain)       // the owner keeps the image from now on
//	dir, err := pools.Lower(ctx, chain) // where it is mounted
//	err = pools.Sweep(ctx, needed)      // ends the claims that nobody needs
//
// A pool is opened for reading, and its live tree is mounted once. Metadata written by its owner is
// verified before this kernel sees it: the superblock and the root directory before the mount, and all
// metadata of an image before its use. Contents are not verified. By configuring a pool, an
// administrator trusts its owner with the contents of containers.
//
// A missing or damaged pool affects only its own images. Each request for an image looks at it again.
package shared
