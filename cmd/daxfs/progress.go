package main

import (
	"errors"
	"fmt"
	"io"
	"os"
	"sync"
	"sync/atomic"

	"github.com/vbauerster/mpb/v8"
	"github.com/vbauerster/mpb/v8/decor"
	"golang.org/x/term"

	"github.com/daxfs/daxfs-snapshotter/converter/source"
)

// progress shows a conversion: a bar for each layer on a terminal, a line for each elsewhere, or nothing.
type progress struct {
	w      io.Writer
	quiet  bool
	layers []source.Layer
	done   atomic.Int32

	mu   sync.Mutex // guards the lines; bars have their own lock
	bars *mpb.Progress
	bar  []*mpb.Bar
}

func newProgress(w io.Writer, quiet bool) *progress {
	p := &progress{w: w, quiet: quiet}
	if f, ok := w.(*os.File); ok && !quiet && hasSize(f) {
		p.bars = mpb.New(mpb.WithOutput(w), mpb.WithWidth(40))
	}
	return p
}

// hasSize tells whether f is a terminal with room for bars. One of no size, as a serial line or script(1) without a
// terminal of its own may be, shows none of them.
func hasSize(f *os.File) bool {
	width, height, err := term.GetSize(int(f.Fd()))
	return err == nil && width > 0 && height > 0
}

// short is a digest as it fits into a line.
func short(l source.Layer) string {
	const n = len("sha256:") + 12
	if name := l.Name(); len(name) > n {
		return name[:n]
	}
	return l.Name()
}

func (p *progress) Start(layers []source.Layer) {
	p.layers = layers
	if p.bars == nil {
		return
	}
	for _, l := range layers {
		p.bar = append(p.bar, p.bars.AddBar(l.Desc.Size,
			mpb.PrependDecorators(decor.Name(short(l), decor.WCSyncSpaceR)),
			mpb.AppendDecorators(
				decor.CountersKibiByte("% .1f / % .1f", decor.WCSyncSpace),
				decor.OnComplete(decor.EwmaETA(decor.ET_STYLE_GO, 30, decor.WCSyncSpace), "done"),
			)))
	}
}

func (p *progress) Read(layer, n int) {
	if p.bars != nil {
		p.bar[layer].IncrBy(n)
	}
}

func (p *progress) Done(layer int) {
	n := p.done.Add(1)
	if p.quiet {
		return
	}
	if p.bars != nil {
		p.bar[layer].SetTotal(-1, true)
		return
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	l := p.layers[layer]
	fmt.Fprintf(p.w, "%s %s (%d of %d layers)\n", short(l), human(l.Desc.Size), n, len(p.layers))
}

// notify shows a line about what holds the conversion up, above the bars if there are any.
func (p *progress) notify(line string) {
	if p.quiet {
		return
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	w := p.w
	if p.bars != nil {
		w = p.bars
	}
	fmt.Fprintln(w, message(errors.New(line)))
}

// end leaves the terminal as it should be. Bars of layers that were not finished stay where they stopped.
func (p *progress) end(ok bool) {
	if p.bars == nil {
		return
	}
	if !ok {
		for _, b := range p.bar {
			b.Abort(false)
		}
	}
	p.bars.Wait()
}
