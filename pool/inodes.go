package pool

import (
	"iter"

	"github.com/daxfs/daxfs-snapshotter/daxfs"
	"github.com/daxfs/daxfs-snapshotter/pool/internal/alloc"
)

// sharedInode is the inode of a regular file in the live tree.
type sharedInode struct {
	key daxfs.InodeKey
	nid uint64
	run int64 // offset of the run that contains it
}

// inodes holds the inodes of an extent after the first: usually few, but many for empty files.
type inodes struct {
	list  []sharedInode
	byKey map[daxfs.InodeKey][]placedInode // used instead of list once there are many
	n     int
}

// placedInode is a sharedInode without its key.
type placedInode struct {
	nid uint64
	run int64
}

// fewInodes is the longest list that is searched linearly.
const fewInodes = 16

// addInode records an inode that points to the extent. Preconditions: mu is held.
func (e *extent) addInode(in sharedInode) {
	if !e.hasInodes() {
		e.firstKey, e.firstNid, e.firstRun = in.key, in.nid, uint32(in.run/alloc.Unit)
		return
	}
	if e.others == nil {
		e.others = &inodes{}
	}
	e.others.add(in)
}

func (l *inodes) add(in sharedInode) {
	l.n++
	if l.byKey == nil && len(l.list) < fewInodes {
		l.list = append(l.list, in)
		return
	}
	if l.byKey == nil {
		l.byKey = map[daxfs.InodeKey][]placedInode{}
	}
	for _, in := range append(l.list, in) {
		l.byKey[in.key] = append(l.byKey[in.key], placedInode{in.nid, in.run})
	}
	l.list = nil
}

// hasInodes tells whether inodes point to the extent. Preconditions: mu is held.
func (e *extent) hasInodes() bool { return e.firstNid != 0 }

// inodeCount is the number of inodes. Preconditions: mu is held.
func (e *extent) inodeCount() int {
	switch {
	case !e.hasInodes():
		return 0
	case e.others == nil:
		return 1
	}
	return 1 + e.others.n
}

// dropInodes removes all inodes. Preconditions: mu is held.
func (e *extent) dropInodes() {
	e.firstKey, e.firstNid, e.firstRun, e.others = daxfs.InodeKey{}, 0, 0, nil
}

// inodes yields all inodes, those of one key in the order of their arrival. Preconditions: mu is held.
func (e *extent) inodes() iter.Seq[sharedInode] {
	return func(yield func(sharedInode) bool) {
		if !e.hasInodes() || !yield(sharedInode{e.firstKey, e.firstNid, int64(e.firstRun) * alloc.Unit}) ||
			e.others == nil {
			return
		}
		for _, in := range e.others.list {
			if !yield(in) {
				return
			}
		}
		for key, ins := range e.others.byKey {
			for _, in := range ins {
				if !yield(sharedInode{key, in.nid, in.run}) {
					return
				}
			}
		}
	}
}

// nth returns the inode of the seq-th file with a key, or 0. Preconditions: mu is held.
func (e *extent) nth(key daxfs.InodeKey, seq int) uint64 {
	if e.firstNid != 0 && e.firstKey == key {
		if seq == 0 {
			return e.firstNid
		}
		seq--
	}
	if e.others == nil {
		return 0
	}
	if ins := e.others.byKey[key]; seq < len(ins) {
		return ins[seq].nid
	}
	for _, in := range e.others.list {
		if in.key != key {
			continue
		}
		if seq == 0 {
			return in.nid
		}
		seq--
	}
	return 0
}
