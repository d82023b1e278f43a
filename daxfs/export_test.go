package daxfs

import "io"

// CheckWith is Check with another limit of inodes, and with or without the rule data-tail.
func CheckWith(r io.ReaderAt, size int64, maxInodes uint64, tails bool, report func(Finding) bool) error {
	c := checker{report: report, tails: tails, max: maxInodes}
	c.run(r, size)
	return c.result()
}

// Contents calls f for every regular file with contents, hard links once.
func (p *Plan) Contents(f func(Data)) {
	for i := range p.inodes.len() {
		if in := p.inodes.at(i); in.hasData() {
			f(p.data(in))
		}
	}
}
