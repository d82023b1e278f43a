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

// ErrTooLarge is wrapped if an image exceeds Options.MaxSize or the reach of an image file.
var ErrTooLarge = errors.New("image is too large")

// Options of Convert. The zero value is a good default.
type Options struct {
	// Platform selects an image of an index. The zero value means the platform of this machine.
	Platform source.Platform
	// Image holds the options of the image format.
	Image daxfs.Options
	// Concurrency is the number of layers read at a time, at least 4; 0 means one for each core.
	Concurrency int
	// Memory bounds the bytes of file contents that wait in memory for those of lower layers, at least 32 MiB;
	// 0 means DefaultMemory. Contents of layers from a network that do not fit wait on disk, beside the
	// output. Layers that are local files are not read that far ahead: they use 32 MiB, whatever Memory says.
	Memory int64
	// MaxSize bounds the decompressed bytes of all layers, holes of sparse files included; 0 means
	// DefaultMaxSize. It stops decompression bombs.
	MaxSize int64
	// MaxEntries bounds the entries of all layers, which take about 400 bytes of memory each; 0 means
	// DefaultMaxEntries. From the third xattr of an entry on, every two count as one more entry.
	MaxEntries int64
	// NoAlign places files of 2 MiB and more at any block instead of at multiples of 2 MiB. Images get a
	// little smaller, but cannot be mapped with huge pages.
	NoAlign bool
	// NoXattrs omits all extended attributes, for readers such as gVisor that refuse inodes with any.
	// Result.LostXattrs lists them.
	NoXattrs bool
	// Sync makes Convert flush the image to disk before it returns.
	Sync bool
	// Progress observes the conversion; it may be nil.
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

// Progress observes a conversion. Several goroutines call its methods, which should return soon.
type Progress interface {
	// Start is called once the layers are known.
	Start(layers []source.Layer)
	// Read reports n more bytes read from a layer's blob.
	Read(layer int, n int)
	// Done reports that a layer was read and verified.
	Done(layer int)
}

// Result describes a conversion.
type Result struct {
	// Digest is the digest of the manifest, or of the configuration if there is no manifest; empty for a
	// tree. Platform is the platform of the image.
	Digest   digest.Digest
	Platform ocispec.Platform
	// Layers is the number of layers, BytesIn the size of their blobs, and Unpacked the size of their tars.
	Layers   int
	BytesIn  int64
	Unpacked int64
	// BytesOut is the size of the image.
	BytesOut int64
	// Deduplicated is the total size of file contents that were not stored again.
	Deduplicated int64
	// Stats are the counts of the image.
	Stats daxfs.Stats
	// LeftOut lists the names that the DAXFS half cannot hold; see daxfs.Plan.LeftOut.
	LeftOut []daxfs.LeftOut
	// LostXattrs lists the extended attributes that Options.NoXattrs omitted, sorted by name.
	LostXattrs []tree.LostXattr
	// Dir holds the counts for a source without layers, else zero.
	Dir layer.Stats
	// UUID is the UUID of the image.
	UUID [16]byte
	// RootHash authenticates the image: see daxfs.Prove.
	RootHash daxfs.RootHash
}

// Convert writes the image of src to the file output and replaces an existing file. On failure or
// cancellation, output stays unchanged.
func Convert(ctx context.Context, src source.Source, output string, o Options) (*Result, error) {
	o = o.withDefaults()
	f, err := newOutput(output) // first: finding the image may take a while
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

// tooLarge marks errors about exceeded limits.
func tooLarge(err error) error {
	if errors.Is(err, sink.ErrTooLarge) || errors.Is(err, blob.ErrTooLarge) {
		return fmt.Errorf("%w: %w", ErrTooLarge, err)
	}
	return err
}

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

// conversion is the reading part of Convert and Compare.
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
	// Close ends the contents of the layer.
	Close() error
}

// run reads the whole image and returns its tree.
func (c *conversion) run(ctx context.Context) (*daxfs.Node, error) {
	read := c.read
	if c.img.Tree != nil {
		read = c.wholeTree
	}
	if err := read(ctx); err != nil {
		// The cause of the cancellation is the reason; err is only its effect.
		return nil, cmp.Or(context.Cause(ctx), err)
	}
	return c.tree.Root(), nil
}

// read reads all layers, several at a time, and merges them in order.
func (c *conversion) read(ctx context.Context) error {
	if c.o.Progress != nil {
		c.o.Progress.Start(c.img.Layers)
	}
	g, ctx := errgroup.WithContext(ctx)
	parsed := make([]chan *layer.Layer, len(c.img.Layers)) // each channel gets its verified layer, or is closed
	for i := range parsed {
		parsed[i] = make(chan *layer.Layer, 1)
	}
	merged := make(chan error, 1)
	go func() { merged <- c.merge(parsed) }()
	// Layers start in order, so the layers to be placed next are always running and nothing waits for ever.
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
	// A layer that failed verification explains more than a failed merge.
	err := g.Wait()
	return cmp.Or(err, <-merged)
}

// merge applies the layers in order, up to the first missing one.
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

// limits returns the limits of one layer. The sink bounds the contents of all layers together.
func (c *conversion) limits() layer.Limits {
	return layer.Limits{MaxBytes: math.MaxInt64, MaxEntries: c.o.MaxEntries, MaxMetaBytes: maxNames}
}

// count adds what a layer keeps in memory and checks the limits of the image.
func (c *conversion) count(l *layer.Layer) error {
	if n := c.entries.Add(l.Cost()); n > c.o.MaxEntries {
		return fmt.Errorf("%w: more than %d entries in all layers", ErrTooLarge, c.o.MaxEntries)
	}
	if c.names.Add(l.Names()) > maxNames {
		return fmt.Errorf("%w: more than %d bytes of names and attributes in all layers", ErrTooLarge, maxNames)
	}
	return nil
}
