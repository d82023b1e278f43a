package daxfs

// parts is a list for millions of items. Growing it copies nothing. A growing slice needs more than
// twice its memory; a preallocated one of maximum size would be in memory together with all its sources.
type parts[T any] struct {
	list [][]T
	n    int32
}

// partLen is the number of items per allocation.
const partLen = 1 << 10

// add appends an item and returns its address, which stays valid.
func (p *parts[T]) add(v T) *T {
	if p.n%partLen == 0 {
		p.list = append(p.list, make([]T, 0, partLen))
	}
	last := &p.list[len(p.list)-1]
	*last = append(*last, v)
	p.n++
	return &(*last)[len(*last)-1]
}

func (p *parts[T]) at(i int32) *T { return &p.list[uint32(i)/partLen][uint32(i)%partLen] }

func (p *parts[T]) len() int32 { return p.n }

// take returns the items as one slice and frees the parts on the way.
func (p *parts[T]) take() []T {
	flat := make([]T, 0, p.n)
	for i := range p.list {
		flat = append(flat, p.list[i]...)
		p.list[i] = nil
	}
	*p = parts[T]{}
	return flat
}
