package daxfs

import (
	"cmp"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"runtime"
	"slices"
	"strings"
	"sync"

	"github.com/daxfs/daxfs-snapshotter/daxfs/internal/disk"
)

// ProveOptions are the options of Prove.
type ProveOptions struct {
	// Root is the expected root hash; nil accepts the root hash stored in the image.
	Root *RootHash
}

// Prove compares every byte of an image of size bytes with the image's digest table: contents and
// metadata must match their digests, and all other bytes must be zero. With a root hash from a trusted
// source this authenticates the image; without one it detects accidental changes. Only Check detects
// metadata that is wrong by itself.
//
// Prove calls report, which may be nil, for each finding until report returns false. Findings about
// contents name the first path of the file. The error is the first finding as a *FormatError;
// ErrNoDigests if there is no table and no root hash is expected; or an error of r or ctx, which ends
// the proof. Several goroutines read r, so r must be safe for concurrent use; only the caller's
// goroutine calls report. Memory is 1 MiB for each processor plus at most 65,536 findings.
func Prove(ctx context.Context, r io.ReaderAt, size int64, o ProveOptions, report func(Finding) bool) error {
	c := checker{report: report}
	s, err := newSource(r, size)
	if err != nil {
		c.broken(err, "")
		return c.result()
	}
	d, err := readDigests(&s)
	switch {
	case errors.Is(err, ErrNoDigests) && o.Root != nil:
		c.finding(RuleDigestRoot, -1, 0, "", "%v, expected one with root hash %v", err, *o.Root)
	case errors.Is(err, ErrNoDigests):
		return err
	case err != nil:
		c.broken(err, "")
	default:
		if o.Root != nil && d.root != *o.Root {
			c.finding(RuleDigestRoot, d.foot+disk.DigestRootOff, 0, "", "root hash is %v, expected %v", d.root, *o.Root)
		}
		p := prover{checker: &c, s: s, d: d}
		p.run(ctx)
	}
	return c.result()
}

// maxBad bounds the findings about contents and gaps.
const maxBad = 1 << 16

type prover struct {
	*checker
	s source
	d *digests

	mu  sync.Mutex
	bad []badData
}

// badData is a range of contents with a wrong digest, or a gap between contents that is not zero.
type badData struct {
	off, size int64
	want, got [sha256.Size]byte // equal for a gap
}

// proofJob is a part of the image below the metadata. With several contents it is at most proofChunk long.
type proofJob struct {
	off, end int64
	entries  []disk.DigestEntry
}

func (p *prover) run(ctx context.Context) {
	buf := p.s.buffer()
	if !p.table(buf) {
		return
	}
	h := sha256.New()
	for _, r := range p.d.metaRanges(&p.s) {
		if err := hashRange(h, &p.s, r[0], r[1], buf); err != nil {
			p.fail(err)
			return
		}
	}
	if sum := [sha256.Size]byte(h.Sum(nil)); sum != p.d.metSum {
		p.finding(RuleDigestMeta, p.d.meta, 0, "", "metadata has SHA-256 %x, expected %x", sum, p.d.metSum)
	}
	p.contents(ctx, buf)
}

// table verifies the table itself. A table that does not match its footer proves nothing.
func (p *prover) table(buf []byte) bool {
	h := sha256.New()
	end := p.d.off + p.d.count*disk.DigestEntrySize
	if err := hashRange(h, &p.s, p.d.off, end, buf); err != nil {
		p.fail(err)
		return false
	}
	if sum := [sha256.Size]byte(h.Sum(nil)); sum != p.d.sum {
		p.finding(RuleDigestTable, p.d.off, 0, "", "the table has SHA-256 %x, expected %x: contents are not proven",
			sum, p.d.sum)
		return false
	}
	pad, err := p.s.view(end, int(p.d.foot-end)) // less than a block
	if err != nil {
		p.fail(err)
		return false
	}
	if !isZero(pad) {
		p.finding(RuleDigestTable, end, 0, "", "something lies behind the table, expected zeros")
	}
	return true
}

// contents verifies everything between block 0 and the metadata.
func (p *prover) contents(ctx context.Context, buf []byte) {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	jobs := make(chan proofJob)
	var workers sync.WaitGroup
	for range runtime.GOMAXPROCS(0) {
		workers.Go(func() {
			buf := p.s.buffer()
			for j := range jobs {
				if ctx.Err() != nil {
					continue
				}
				if err := p.prove(ctx, j, buf); err != nil {
					cancel(err)
				}
			}
		})
	}
	lie := p.cut(ctx, jobs, buf)
	close(jobs)
	workers.Wait()
	if err := context.Cause(ctx); err != nil && !errors.Is(err, errStop) {
		p.fail(err)
		return
	}
	p.reportBad()
	if lie != nil {
		p.broken(lie, "")
	}
}

// cut divides the space below the metadata into jobs. The error reports an invalid entry or a failed read.
func (p *prover) cut(ctx context.Context, jobs chan<- proofJob, buf []byte) error {
	send := func(j proofJob) {
		if j.off == j.end {
			return
		}
		select {
		case jobs <- j:
		case <-ctx.Done():
		}
	}
	job := proofJob{off: BlockSize, end: BlockSize}
	const per = proofChunk / disk.DigestEntrySize
	for n := int64(0); n < p.d.count && ctx.Err() == nil; {
		k := min(int64(per), p.d.count-n)
		b, err := p.s.part(p.d.off+n*disk.DigestEntrySize, k*disk.DigestEntrySize, buf)
		if err != nil {
			return err
		}
		for i := range k {
			var e disk.DigestEntry
			e.Unmarshal(b[i*disk.DigestEntrySize:])
			end, ok := p.entryEnd(&e)
			if !ok || int64(e.Off) < job.end {
				return corrupt(RuleDigestTable, p.d.off+(n+i)*disk.DigestEntrySize, 0,
					"entry %d is of %d bytes at %d, expected whole pages between %d and %d", n+i, e.Size, e.Off,
					job.end, p.d.meta)
			}
			if end-job.off > proofChunk {
				send(job)
				job = proofJob{off: job.end}
			}
			job.end = end
			job.entries = append(job.entries, e)
		}
		n += k
	}
	send(job)
	send(proofJob{off: job.end, end: p.d.meta})
	return nil
}

// entryEnd returns the end of the entry's last page; ok is false if the entry cannot describe contents.
func (p *prover) entryEnd(e *disk.DigestEntry) (end int64, ok bool) {
	if e.Off%BlockSize != 0 || e.Off > uint64(p.d.meta) || e.Size == 0 || e.Size > uint64(p.d.meta)-e.Off {
		return 0, false
	}
	return roundUp(int64(e.Off+e.Size), BlockSize), true
}

// prove compares the bytes of a job with its entries.
func (p *prover) prove(ctx context.Context, j proofJob, buf []byte) error {
	at := j.off
	if j.end-j.off <= proofChunk { // in one read
		b, err := p.s.part(j.off, j.end-j.off, buf)
		if err != nil {
			return err
		}
		for _, e := range j.entries {
			off, size := int64(e.Off), int64(e.Size)
			p.gap(at, b[at-j.off:off-j.off])
			p.sum(&e, sha256.Sum256(b[off-j.off:off+size-j.off]))
			at = off + size
		}
		p.gap(at, b[at-j.off:])
		return p.full()
	}
	for _, e := range j.entries {
		if err := p.zeros(ctx, at, int64(e.Off), buf); err != nil {
			return err
		}
		h := sha256.New()
		at = int64(e.Off)
		for end := at + int64(e.Size); at < end; {
			next := min(end, at+proofChunk)
			if err := cmp.Or(ctx.Err(), hashRange(h, &p.s, at, next, buf)); err != nil {
				return err
			}
			at = next
		}
		p.sum(&e, [sha256.Size]byte(h.Sum(nil)))
	}
	return cmp.Or(p.zeros(ctx, at, j.end, buf), p.full())
}

// zeros checks a gap of any length.
func (p *prover) zeros(ctx context.Context, at, end int64, buf []byte) error {
	for at < end {
		b, err := p.s.part(at, min(end-at, proofChunk), buf)
		if err = cmp.Or(err, ctx.Err()); err != nil {
			return err
		}
		p.gap(at, b)
		at += int64(len(b))
	}
	return nil
}

// gap records nonzero bytes between contents.
func (p *prover) gap(off int64, b []byte) {
	if isZero(b) {
		return
	}
	i := int64(slices.IndexFunc(b, func(x byte) bool { return x != 0 }))
	p.note(badData{off: off + i, size: int64(len(b)) - i})
}

// sum records contents whose digest differs from their entry's.
func (p *prover) sum(e *disk.DigestEntry, got [sha256.Size]byte) {
	if got != e.Sum {
		p.note(badData{off: int64(e.Off), size: int64(e.Size), want: e.Sum, got: got})
	}
}

func (p *prover) note(b badData) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.bad = append(p.bad, b)
}

// full ends the proof when there are too many findings.
func (p *prover) full() error {
	p.mu.Lock()
	defer p.mu.Unlock()
	if len(p.bad) >= maxBad {
		return errStop
	}
	return nil
}

// reportBad reports the findings in order of offset.
func (p *prover) reportBad() {
	slices.SortFunc(p.bad, func(a, b badData) int { return cmp.Compare(a.off, b.off) })
	files := p.files()
	for _, b := range p.bad {
		if p.err != nil {
			return
		}
		if b.want == b.got {
			p.finding(RuleDigestGap, b.off, 0, "", "something lies between contents, expected zeros")
			continue
		}
		f := files[b.off] // files has an entry for each
		p.finding(RuleDigestData, b.off, f.nid, f.path, "%d bytes have SHA-256 %x, expected %x%s",
			b.size, b.got, b.want, f.others())
	}
}

// badFile names the files with one piece of changed contents.
type badFile struct {
	path string // the first
	nid  uint64
	more []string // up to maxNamed others
	n    int      // how many there are
}

const maxNamed = 8

func (f *badFile) others() string {
	if f.n == 0 {
		return ""
	}
	names := make([]string, len(f.more))
	for i, m := range f.more {
		names[i] = fmt.Sprintf("%q", m)
	}
	if rest := f.n - len(f.more); rest > 0 {
		names = append(names, fmt.Sprintf("%d more names", rest))
	}
	return "; they are those of " + strings.Join(names, ", ") + ", too"
}

// files finds the names of changed contents in one walk of the tree. If the walk fails, it returns the
// names found so far; Check reports the fault.
func (p *prover) files() map[int64]*badFile {
	files := map[int64]*badFile{}
	for _, b := range p.bad {
		if b.want != b.got {
			files[b.off] = &badFile{}
		}
	}
	if len(files) == 0 {
		return files
	}
	s := p.s
	if s.b == nil {
		s.r = NewReadCache(s.r, s.size)
	}
	f, err := openErofs(s)
	if err != nil {
		return files
	}
	_ = f.Walk(func(path string, in Inode) error {
		off, size, ok := in.Data()
		bad := files[off]
		switch {
		case !ok || size == 0 || !in.IsRegular() || bad == nil:
		case bad.path == "":
			bad.path, bad.nid = "/"+path, in.Nid
		default:
			if bad.n++; len(bad.more) < maxNamed {
				bad.more = append(bad.more, "/"+path)
			}
		}
		return nil
	})
	return files
}
