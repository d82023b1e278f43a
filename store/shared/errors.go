package shared

import "errors"

var (
	// ErrNotFound says that no pool has an image of the chain.
	ErrNotFound = errors.New("in no shared pool")
	// ErrReset says that a pool was replaced, or began a new epoch, while its images are in use here.
	ErrReset = errors.New("shared pool was made anew")
	// ErrOwn says that this process owns the pool.
	ErrOwn = errors.New("own pool")
	// ErrInPool says that a lease region is part of the pool itself.
	ErrInPool = errors.New("the lease region lies in the pool, expected memory beside it")
	// ErrTwice says that a pool is already read under another name.
	ErrTwice = errors.New("one pool has two names")
	// ErrSize says that the memory is smaller than the pool in it.
	ErrSize = errors.New("pool does not fit its memory")
)
