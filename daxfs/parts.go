package daxfs

// parts is a list that may come to have millions of items. Growing it copies nothing: a slice that grows step by step needs
// twice its memory and more, and one that is made as large as it can get is there beside all that it is made from.
type parts[T any] struct {
	list [][]T
	n    int32
}

// partLen is how many items are allocated at once.
const partLen = 1 << 10

// add appends an item, and returns where it is. It stays there.
func (p *parts[T]) add(v T) *T {
	if p.n%partLen == 0 {
		p.list = append(p.list, make([]T, 0, partLen))
	}
	last := &p.list[len(p.list)-1]
	*last = append(*last, v)
	p.n++
	return &(*last)[len(*last)-1]
}

// at is where item i is.
func (p *parts[T]) at(i int32) *T { return &p.list[uint32(i)/partLen][uint32(i)%partLen] }

// len is the number of items.
func (p *parts[T]) len() int32 { return p.n }

// take returns the items as one slice, and forgets them part by part.
func (p *parts[T]) take() []T {
	flat := make([]T, 0, p.n)
	for i := range p.list {
		flat = append(flat, p.list[i]...)
		p.list[i] = nil
	}
	*p = parts[T]{}
	return flat
}
