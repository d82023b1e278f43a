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

// progress shows a conversion: on a terminal a bar for each layer that is read and one for each that
// is sent; elsewhere a line for each finished layer, or nothing.
type progress struct {
	w      io.Writer
	quiet  bool
	layers []source.Layer
	done   atomic.Int32

	mu   sync.Mutex // guards the lines and sent; bars have their own lock
	bars *mpb.Progress
	bar  []*mpb.Bar
	sent map[int]*mpb.Bar // by layer
}

func newProgress(w io.Writer, quiet bool) *progress {
	p := &progress{w: w, quiet: quiet}
	if f, ok := w.(*os.File); ok && !quiet && hasSize(f) {
		p.bars = mpb.New(mpb.WithOutput(w), mpb.WithWidth(40))
	}
	return p
}

// hasSize reports whether f is a terminal with room for bars. A terminal of size zero, such as a
// serial line or script(1) without a terminal of its own, shows none of them.
func hasSize(f *os.File) bool {
	width, height, err := term.GetSize(int(f.Fd()))
	return err == nil && width > 0 && height > 0
}

// short returns a digest short enough for a line.
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
	for i, l := range layers {
		p.bar = append(p.bar, p.add(short(l), l.Desc.Size, 2*i))
	}
}

// add adds a bar. Bars of lower priority are above it.
func (p *progress) add(name string, total int64, priority int) *mpb.Bar {
	return p.bars.AddBar(total, mpb.BarPriority(priority),
		mpb.PrependDecorators(decor.Name(name, decor.WCSyncSpaceR)),
		mpb.AppendDecorators(
			decor.CountersKibiByte("% .1f / % .1f", decor.WCSyncSpace),
			decor.OnComplete(decor.AverageETA(decor.ET_STYLE_GO, decor.WCSyncSpace), "done"),
		))
}

// Send implements recompress.Progress.
func (p *progress) Send(layer int, size int64) {
	if p.bars == nil {
		return
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	bar := p.sent[layer]
	if bar == nil {
		// The bar has no total yet, so it does not end when all is sent: the registry may ask for the layer again.
		bar = p.add(short(p.layers[layer])+" push", 0, 2*layer+1)
		if p.sent == nil {
			p.sent = map[int]*mpb.Bar{}
		}
		p.sent[layer] = bar
	}
	bar.SetCurrent(0)
	bar.SetTotal(size, false)
}

// Sent implements recompress.Progress.
func (p *progress) Sent(layer, n int) {
	if bar := p.push(layer); bar != nil {
		bar.IncrBy(n)
	}
}

// push returns the bar of a layer that is sent, or nil.
func (p *progress) push(layer int) *mpb.Bar {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.sent[layer]
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
		if bar := p.push(layer); bar != nil {
			bar.SetTotal(-1, true)
		}
		return
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	l := p.layers[layer]
	fmt.Fprintf(p.w, "%s %s (%d of %d layers)\n", short(l), human(l.Desc.Size), n, len(p.layers))
}

// notify shows a line about a delay of the conversion, above the bars if there are any.
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

// end restores the terminal. Bars of unfinished layers stay where they stopped.
func (p *progress) end(ok bool) {
	if p.bars == nil {
		return
	}
	if !ok {
		for i, b := range p.bar {
			b.Abort(false)
			if sent := p.push(i); sent != nil {
				sent.Abort(false)
			}
		}
	}
	p.bars.Wait()
}
