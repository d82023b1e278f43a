package converter

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"math"
	"runtime"
	"sync/atomic"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/sync/errgroup"

	"github.com/daxfs/daxfs-snapshotter/converter/blob"
	"github.com/daxfs/daxfs-snapshotter/converter/internal/sink"
	"github.com/daxfs/daxfs-snapshotter/converter/layer"
	"github.com/daxfs/daxfs-snapshotter/converter/source"
	"github.com/daxfs/daxfs-snapshotter/converter/tree"
	"github.com/daxfs/daxfs-snapshotter/daxfs"
)

const (
	// DefaultMemory is the default of Options.Memory.
	DefaultMemory = 256 << 20
	// DefaultMaxSize is the default of Options.MaxSize.
	DefaultMaxSize = source.DefaultMaxSize
	// DefaultMaxEntries is the default of Options.MaxEntries.
	DefaultMaxEntries = 4 << 20

	// maxNames bounds the bytes of names, link targets and xattrs of all layers, which stay in memory.
	maxNames = 1 << 30
)

// ErrTooLarge is wrapped when an image exceeds Options.MaxSize or what an image file can address.
var ErrTooLarge = errors.New("image is too large")

// Options of Convert. The zero value is a good default.
type Options struct {
	// Platform chooses among the images of an index. The zero value means this machine's.
	Platform source.Platform
	// Image holds the choices of the image format.
	Image daxfs.Options
	// Concurrency is how many layers are read at the same time, at least 4; 0 means one for each core.
	Concurrency int
	// Memory bounds the file contents that wait in memory for those of lower layers, in bytes, at least 32 MiB; 0 means
	// DefaultMemory. What does not fit waits on disk, beside the output, when layers come over a network. Where they
	// are files already, they are not read that far ahead: 32 MiB are used for them, whatever Memory says.
	Memory int64
	// MaxSize bounds the bytes of all layers once they are decompressed, holes of sparse files included; 0 means
	// DefaultMaxSize. It is what stops a decompression bomb.
	MaxSize int64
	// MaxEntries bounds the entries of all layers, each of which takes about 400 bytes of memory; 0 means DefaultMaxEntries. Behind
	// the second xattr of an entry, every two count as one more.
	MaxEntries int64
	// NoAlign places files of 2 MiB and more at any block instead of at multiples of 2 MiB. Images get a little
	// smaller, and cannot be mapped with huge pages.
	NoAlign bool
	// NoXattrs leaves out all extended attributes, for readers that refuse inodes with any, such as gVisor. Result.LostXattrs
	// says which.
	NoXattrs bool
	// Sync makes Convert return only when the image is on disk.
	Sync bool
	// Progress is told what happens; nil means nobody.
	Progress Progress
}

func (o Options) withDefaults() Options {
	if o.Platform == (source.Platform{}) {
		o.Platform = source.Host()
	}
	if o.Memory <= 0 {
		o.Memory = DefaultMemory
	}
	if o.MaxSize <= 0 {
		o.MaxSize = DefaultMaxSize
	}
	if o.MaxEntries <= 0 {
		o.MaxEntries = DefaultMaxEntries
	}
	if o.Concurrency <= 0 {
		o.Concurrency = runtime.GOMAXPROCS(0)
	}
	o.Concurrency = max(o.Concurrency, sink.Lanes)
	return o
}

// Progress observes a conversion. Its methods are called from several goroutines, and should return soon.
type Progress interface {
	// Start is called once, when the layers are known.
	Start(layers []source.Layer)
	// Read says that n more bytes of a layer's blob were read.
	Read(layer int, n int)
	// Done says that a layer was read and verified.
	Done(layer int)
}

// Result says what was converted.
type Result struct {
	// Digest of the manifest (of the configuration where there is no manifest; empty for a tree), and what
	// Platform it is for.
	Digest   digest.Digest
	Platform ocispec.Platform
	// Layers is the number of layers, BytesIn the bytes of their blobs, and Unpacked the bytes of their tars.
	Layers   int
	BytesIn  int64
	Unpacked int64
	// BytesOut is the size of the image.
	BytesOut int64
	// Deduplicated is the sum of the sizes of file contents that were not stored again because equal ones were there.
	Deduplicated int64
	// Stats are the counts of the image.
	Stats daxfs.Stats
	// LeftOut are the names that the DAXFS half cannot hold, see daxfs.Plan.LeftOut.
	LeftOut []daxfs.LeftOut
	// LostXattrs are the extended attributes that Options.NoXattrs left out, sorted by name.
	LostXattrs []tree.LostXattr
	// Dir counts what the layer of a source without layers has; zero for others.
	Dir layer.Stats
	// UUID of the image.
	UUID [16]byte
	// RootHash authenticates the image: see daxfs.Prove.
	RootHash daxfs.RootHash
}

// Convert writes the image that src holds to the file output, which it replaces. When it fails, or ctx ends, output is
// as it was before.
func Convert(ctx context.Context, src source.Source, output string, o Options) (*Result, error) {
	o = o.withDefaults()
	f, err := newOutput(output) // first: looking for an image may take a while
	if err != nil {
		return nil, err
	}
	defer f.discard()
	img, err := src.Image(ctx, o.Platform)
	if err != nil {
		return nil, tooLarge(err)
	}
	res, err := write(ctx, img, f, o)
	if err != nil {
		if cause := context.Cause(ctx); cause != nil {
			return nil, cause
		}
		return nil, fmt.Errorf("%s: %w", src, tooLarge(err))
	}
	if err := f.commit(o.Sync); err != nil {
		return nil, err
	}
	return res, nil
}

// tooLarge marks errors of those who met a limit.
func tooLarge(err error) error {
	if errors.Is(err, sink.ErrTooLarge) || errors.Is(err, blob.ErrTooLarge) {
		return fmt.Errorf("%w: %w", ErrTooLarge, err)
	}
	return err
}

// write puts the image into f.
func write(ctx context.Context, img *source.Image, f *output, o Options) (*Result, error) {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	n := len(img.Layers)
	if img.Tree != nil {
		n = 1
	}
	s, err := sink.New(f.File, n, sink.Options{
		Memory: o.Memory, Wait: !img.Remote, MaxBytes: o.MaxSize, NoAlign: o.NoAlign, Failed: cancel,
	})
	if err != nil {
		return nil, err
	}
	defer s.Abort()
	c := &conversion{o: o, store: func(i int) contents { return s.Layer(i) }, img: img, tree: tree.NewMerger()}
	root, err := c.run(ctx)
	if err != nil {
		return nil, err
	}
	var lost []tree.LostXattr
	if o.NoXattrs {
		lost = tree.StripXattrs(root)
	}
	placed, err := s.Finish(root)
	if err != nil {
		return nil, err
	}
	o.Image.Digests, o.Image.Take = true, true
	plan, err := daxfs.NewPlan(root, o.Image)
	if err != nil {
		return nil, err
	}
	size := placed.End + plan.MetaSize()
	if err := plan.Place(daxfs.Placement{Image: 0, Meta: placed.End, End: size}); err != nil {
		return nil, err
	}
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	if err := f.Truncate(size); err != nil {
		return nil, err
	}
	if err := plan.WriteTo(f); err != nil {
		return nil, fmt.Errorf("write image: %w", err)
	}
	hash, err := daxfs.ReadRootHash(f, size)
	if err != nil {
		return nil, fmt.Errorf("write image: %w", err)
	}
	return &Result{
		Digest: img.Digest, Platform: img.Platform, Layers: len(img.Layers),
		BytesIn: c.in.Load(), Unpacked: c.unpacked.Load(), BytesOut: size, Deduplicated: placed.Deduplicated,
		Stats: plan.Stats(), LeftOut: plan.LeftOut(), LostXattrs: lost, Dir: c.dir, UUID: plan.UUID(), RootHash: hash,
	}, nil
}

// conversion is the reading half of one Convert or Compare.
type conversion struct {
	o     Options
	store func(layer int) contents
	img   *source.Image
	tree  *tree.Merger
	dir   layer.Stats

	in, unpacked, entries, names atomic.Int64
}

// contents takes the contents of one layer.
type contents interface {
	layer.Store
	// Close says that the layer has no more.
	Close() error
}

// run reads all that the image has, and returns the tree.
func (c *conversion) run(ctx context.Context) (*daxfs.Node, error) {
	read := c.read
	if c.img.Tree != nil {
		read = c.wholeTree
	}
	if err := read(ctx); err != nil {
		// What made the others stop is the reason, not that they stopped.
		return nil, cmp.Or(context.Cause(ctx), err)
	}
	return c.tree.Root(), nil
}

// read reads all layers, some of them at the same time, and merges them in their order.
func (c *conversion) read(ctx context.Context) error {
	if c.o.Progress != nil {
		c.o.Progress.Start(c.img.Layers)
	}
	g, ctx := errgroup.WithContext(ctx)
	parsed := make([]chan *layer.Layer, len(c.img.Layers)) // each gets its layer once that was verified, or is closed
	for i := range parsed {
		parsed[i] = make(chan *layer.Layer, 1)
	}
	merged := make(chan error, 1)
	go func() { merged <- c.merge(parsed) }()
	// Layers start in order: those whose contents are placed next are always among them, and nothing waits for ever.
	g.SetLimit(c.o.Concurrency)
	for i, l := range c.img.Layers {
		g.Go(func() error {
			defer close(parsed[i])
			if err := ctx.Err(); err != nil {
				return context.Cause(ctx)
			}
			y, err := c.layer(ctx, i, l)
			if err != nil {
				return fmt.Errorf("layer %d (%s): %w", i, l.Name(), err)
			}
			parsed[i] <- y
			return nil
		})
	}
	// A layer that is not what was promised explains more than what it could not be merged with.
	err := g.Wait()
	return cmp.Or(err, <-merged)
}

// merge applies the layers as they come, up to the first that does not.
func (c *conversion) merge(parsed []chan *layer.Layer) error {
	for _, ch := range parsed {
		l, ok := <-ch
		if !ok {
			return nil
		}
		if err := c.tree.Take(l); err != nil {
			return err
		}
	}
	return nil
}

func (c *conversion) layer(ctx context.Context, i int, l source.Layer) (*layer.Layer, error) {
	rc, err := l.Open(ctx)
	if err != nil {
		return nil, err
	}
	spec := l.Blob()
	spec.MaxSize = c.o.MaxSize
	if c.o.Progress != nil {
		spec.Progress = func(n int) { c.o.Progress.Read(i, n) }
	}
	store := c.store(i)
	b, err := layer.FromBlob(ctx, rc, spec, store, c.limits())
	if err != nil {
		return nil, err
	}
	if err := store.Close(); err != nil {
		return nil, err
	}
	if err := c.count(b.Layer); err != nil {
		return nil, err
	}
	c.in.Add(b.BytesRead)
	if c.unpacked.Add(b.Size) > c.o.MaxSize {
		return nil, fmt.Errorf("%w of %d bytes", blob.ErrTooLarge, c.o.MaxSize)
	}
	if c.o.Progress != nil {
		c.o.Progress.Done(i)
	}
	return b.Layer, nil
}

// wholeTree reads a source that has no layers.
func (c *conversion) wholeTree(ctx context.Context) error {
	store := c.store(0)
	l, err := c.img.Tree(ctx, store, c.limits())
	if err != nil {
		return err
	}
	if err := c.count(l); err != nil {
		return err
	}
	c.dir = l.Stats
	c.in.Store(l.Stats.Bytes)
	c.unpacked.Store(l.Stats.Bytes)
	if err := store.Close(); err != nil {
		return err
	}
	return c.tree.Take(l)
}

// limits of one layer. The contents of all layers together are bounded by the sink.
func (c *conversion) limits() layer.Limits {
	return layer.Limits{MaxBytes: math.MaxInt64, MaxEntries: c.o.MaxEntries, MaxMetaBytes: maxNames}
}

// count holds what all layers keep in memory against the limits of the image.
func (c *conversion) count(l *layer.Layer) error {
	if n := c.entries.Add(l.Cost()); n > c.o.MaxEntries {
		return fmt.Errorf("%w: more than %d entries in all layers", ErrTooLarge, c.o.MaxEntries)
	}
	if c.names.Add(l.Names()) > maxNames {
		return fmt.Errorf("%w: more than %d bytes of names and attributes in all layers", ErrTooLarge, maxNames)
	}
	return nil
}
