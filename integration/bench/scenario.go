package main

import (
	"bytes"
	"crypto/sha256"
	"fmt"
	"io"
	"math"
	"math/rand/v2"
	"path"
	"strings"
	"time"

	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/tarball"
	"github.com/google/go-containerregistry/pkg/v1/types"
	"github.com/klauspost/compress/gzip"

	"github.com/daxfs/daxfs-snapshotter/integration/testimage"
)

// scenario is a set of images with contents in common. Every machine makes the same bytes.
type scenario struct {
	name  string // in the samples
	title string
	build func(base []testimage.Entry) imageSet
}

// imageSet holds images as lists of layers, bottom first.
type imageSet struct {
	images [][]*layer
	// further are new combinations of layers from images.
	further [][]*layer
}

// layer is one layer, perhaps of several images.
type layer struct {
	entries []testimage.Entry
	packed  *mutate.Addendum // nil until an image with it is packed
}

const (
	scenarioA = "images A"
	scenarioB = "images B"
	scenarioC = "images C"
)

func scenarios() []scenario {
	return []scenario{
		{scenarioA, "10 images on one base layer", commonLayer},
		{scenarioB, "4 images whose bases are equal files in different layers", equalLayers},
		{scenarioC, "2 images whose bases differ in modification times only", touchedLayers},
	}
}

// commonLayer is a team that builds all its images on one base image.
func commonLayer(base []testimage.Entry) (set imageSet) {
	bottom := &layer{entries: base}
	for i := range 10 {
		set.images = append(set.images, []*layer{bottom, ownLayer(base, i+1)})
	}
	for i := 0; i < 10; i += 2 {
		set.further = append(set.further, []*layer{bottom, set.images[i][1], set.images[i+1][1]})
	}
	return set
}

// equalLayers are images built on different days: the files of their bases are equal, the layers differ.
func equalLayers(base []testimage.Entry) (set imageSet) {
	for i := range 4 {
		build := testimage.File("etc-build", 0o644, fmt.Appendf(nil, "build %d\n", i+1))
		bottom := &layer{entries: append([]testimage.Entry{build}, base...)}
		set.images = append(set.images, []*layer{bottom, ownLayer(base, i+1)})
	}
	return set
}

// touchedLayers are images from a builder that does not preserve modification times.
func touchedLayers(base []testimage.Entry) (set imageSet) {
	for i := range 2 {
		bottom := &layer{}
		for _, e := range base {
			bottom.entries = append(bottom.entries, e.At(time.Unix(1_600_000_001+int64(i), 0)))
		}
		set.images = append(set.images, []*layer{bottom, ownLayer(base, i+1)})
	}
	return set
}

// The base layer resembles 3,500 files below /usr of a Debian 12 with Python: 127 MiB in 417 directories.
const (
	baseFiles = 3500
	baseDirs  = 417
)

// baseSizes are quantiles of the sizes of those files.
var baseSizes = []struct{ share, size float64 }{
	{0, 1},
	{.05, 162},
	{.1, 339},
	{.2, 767},
	{.3, 1301},
	{.4, 2155},
	{.5, 3695},
	{.6, 6860},
	{.7, 13454},
	{.8, 22632},
	{.9, 48965},
	{.95, 97005},
	{.98, 231725},
	{.99, 512443},
	{.995, 1100280},
	{.999, 3713416},
	{1, 10395104},
}

// baseSize interpolates between the quantiles, on a logarithmic scale.
func baseSize(share float64) int {
	i := 1
	for share > baseSizes[i].share {
		i++
	}
	a, b := baseSizes[i-1], baseSizes[i]
	at := (share - a.share) / (b.share - a.share)
	return int(math.Round(math.Exp(math.Log(a.size)*(1-at) + math.Log(b.size)*at)))
}

// baseLayer is the common base of the images.
func baseLayer() []testimage.Entry {
	entries := []testimage.Entry{testimage.Dir("usr", 0o755)}
	for i := range baseDirs {
		entries = append(entries, testimage.Dir(baseDir(i), 0o755))
	}
	for i := range baseFiles {
		// 1999 is coprime to the number of files: each size occurs once, and directories get all sizes.
		size := baseSize(float64(i*1999%baseFiles) / (baseFiles - 1))
		mode := int64(0o644)
		if i%5 == 0 {
			mode = 0o755
		}
		name := fmt.Sprintf("%s/file-with-a-usual-name-%d", baseDir(i%baseDirs), i)
		entries = append(entries, testimage.File(name, mode, testimage.Noise(uint64(i), size)))
	}
	return entries
}

// baseDir returns the i-th directory below usr: one of 17 top directories, or one of 24 or 25 in each of them.
func baseDir(i int) string {
	if i < 17 {
		return fmt.Sprintf("usr/package-%d", i)
	}
	return fmt.Sprintf("usr/package-%d/part-%d", i%17, i/17)
}

// ownLayer returns the i-th application: 8 MiB of its own, and replacements of 20 files of the base.
func ownLayer(base []testimage.Entry, i int) *layer {
	dir := fmt.Sprintf("application-%d", i)
	entries := []testimage.Entry{testimage.Dir(dir, 0o755)}
	for k := range 8 {
		body := testimage.Noise(uint64(1_000_000+100*i+k), 1<<20)
		entries = append(entries, testimage.File(fmt.Sprintf("%s/part-%d", dir, k), 0o644, body))
	}
	files := base[len(base)-baseFiles:]
	order := rand.New(rand.NewPCG(uint64(i), 0)).Perm(len(files))
	for _, n := range order[:20] {
		old := files[n]
		body := fmt.Appendf(bytes.Clone(old.Body[:min(len(old.Body), 1<<20)]), "replaced by application %d", i)
		for parent := path.Dir(old.Name); parent != "."; parent = path.Dir(parent) {
			entries = append(entries, testimage.Dir(parent, 0o755))
		}
		entries = append(entries, testimage.File(old.Name, old.Mode, body))
	}
	return &layer{entries: entries}
}

// contents maps the paths of an image's regular files to SHA-256 digests.
type contents map[string][sha256.Size]byte

// hashes caches the digests of bodies, which many layers share, by their first byte.
type hashes map[*byte][sha256.Size]byte

func (h hashes) of(body []byte) [sha256.Size]byte {
	if len(body) == 0 {
		return sha256.Sum256(nil)
	}
	sum, ok := h[&body[0]]
	if !ok {
		sum = sha256.Sum256(body)
		h[&body[0]] = sum
	}
	return sum
}

// merge returns the contents of an image as a container reads them, and adds their whole pages to
// distinct. The layers have no whiteouts.
func (h hashes) merge(image []*layer, distinct map[[sha256.Size]byte]int64) contents {
	c, sizes := contents{}, map[string]int{}
	for _, l := range image {
		for _, e := range l.entries {
			if !strings.HasSuffix(e.Name, "/") {
				c[e.Name], sizes[e.Name] = h.of(e.Body), len(e.Body)
			}
		}
	}
	for name, sum := range c {
		distinct[sum] = int64(sizes[name]+page-1) / page * page
	}
	return c
}

// pack compresses the layer the first time. Its contents do not compress.
func (l *layer) pack() (mutate.Addendum, error) {
	if l.packed != nil {
		return *l.packed, nil
	}
	var raw bytes.Buffer
	z, err := gzip.NewWriterLevel(&raw, gzip.BestSpeed)
	if err != nil {
		return mutate.Addendum{}, err
	}
	if err := testimage.Tar(z, l.entries); err != nil {
		return mutate.Addendum{}, err
	}
	if err := z.Close(); err != nil {
		return mutate.Addendum{}, err
	}
	open := func() (io.ReadCloser, error) { return io.NopCloser(bytes.NewReader(raw.Bytes())), nil }
	made, err := tarball.LayerFromOpener(open, tarball.WithMediaType(types.OCILayer))
	if err != nil {
		return mutate.Addendum{}, err
	}
	l.packed = &mutate.Addendum{Layer: made}
	return *l.packed, nil
}
