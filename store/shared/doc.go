// Package shared uses images of pools that others own: another process, or another kernel that has the same memory.
//
//	pools, err := shared.Open(ctx, shared.Config{Root: dir, Pools: []shared.Source{{Name: "/dev/pmem0"}}, ...})
//	err = pools.Claim(ctx, chain)       // the owner keeps the image from now on
//	dir, err := pools.Lower(ctx, chain) // where it is mounted
//	err = pools.Sweep(ctx, needed)      // ends the claims that nobody needs
//
// A pool is opened to be read, and its live tree is mounted once. What its owner wrote is parsed here before this kernel
// sees it: the superblock and the root directory before the mount, and all metadata of an image before it is used.
// Contents are not checked. Whoever configures a pool trusts its owner with what containers run.
//
// A pool that is not there, or that is damaged, costs its own images and no others: it is looked at again each time
// somebody asks for an image.
package shared
