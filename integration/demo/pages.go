package main

import (
	"sort"

	"github.com/daxfs/daxfs-snapshotter/integration/pagemap"
)

const pageSize = pagemap.PageSize

// process is a container's program and the physical pages of its mapped files.
type process struct {
	*pagemap.Process
	container string
	image     int // index in imageNames
}

// library is program text that every container maps.
type library struct {
	file string // path in the container
	// For each image: the pages in memory in all its containers, and those of them that are one physical page.
	common, same [2]int
	// sample is the offset of a page that all processes have; frames are its frames in each of them.
	sample uint64
	frames []uint64
	// acrossCommon counts the pages in memory in both images, acrossSame those that are one physical page.
	acrossCommon, acrossSame int
}

// libraries compares the program text of processes, largest first.
func libraries(ps []*process) []library {
	var list []library
	for file := range ps[0].Text {
		l := library{file: file}
		all := true
		for _, p := range ps {
			all = all && len(p.Text[file]) > 0
		}
		if !all {
			continue
		}
		found := false
		for _, offset := range sortedKeys(ps[0].Text[file]) {
			var frames [2][]uint64
			for _, p := range ps {
				if frame, ok := p.Text[file][offset]; ok {
					frames[p.image] = append(frames[p.image], frame)
				}
			}
			complete := 0
			for i := range frames {
				if len(frames[i])*2 != len(ps) {
					continue
				}
				complete++
				l.common[i]++
				if allEqual(frames[i]) {
					l.same[i]++
				}
			}
			if complete < 2 {
				continue
			}
			l.acrossCommon++
			if frames[0][0] == frames[1][0] && frames[0][0] != 0 {
				l.acrossSame++
			}
			if !found {
				found = true
				l.sample, l.frames = offset, append(frames[0], frames[1]...)
			}
		}
		if found {
			list = append(list, l)
		}
	}
	sort.Slice(list, func(i, j int) bool { return list[i].common[0] > list[j].common[0] })
	return list
}

func allEqual(frames []uint64) bool {
	for _, f := range frames {
		if f != frames[0] || f == 0 { // 0: the kernel does not tell
			return false
		}
	}
	return true
}

func sortedKeys(m map[uint64]uint64) []uint64 {
	keys := make([]uint64, 0, len(m))
	for k := range m {
		keys = append(keys, k)
	}
	sort.Slice(keys, func(i, j int) bool { return keys[i] < keys[j] })
	return keys
}
