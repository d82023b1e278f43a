package daxfs_test

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/daxfs/daxfs-snapshotter/daxfs"
	"github.com/daxfs/daxfs-snapshotter/daxfs/internal/disk"
)

// reader hides that an image is in memory.
type reader struct{ io.ReaderAt }

func proof(t testing.TB, b []byte, o daxfs.ProveOptions) (list []daxfs.Finding, err error) {
	t.Helper()
	err = daxfs.Prove(t.Context(), daxfs.Mem(b), int64(len(b)), o, func(f daxfs.Finding) bool {
		list = append(list, f)
		return true
	})
	return list, err
}

// provable is a small image with a digest table.
func provable(t testing.TB) []byte {
	s := newStore(daxfs.BlockSize)
	_, b := s.fileImage(t, fuzzTree(s), daxfs.Options{Label: "fuzz", Digests: true})
	return b
}

// TestProve verifies random images. A digest table changes nothing for readers.
func TestProve(t *testing.T) {
	seeds := uint64(40)
	if testing.Short() {
		seeds = 12
	}
	for seed := range seeds {
		images := [2][]byte{}
		for i := range images {
			s := newStore(daxfs.BlockSize)
			root := randomTree(seed, 3+int(seed*seed)%300, s)
			p, b := s.fileImage(t, root, daxfs.Options{Digests: true})
			compareHalves(t, b, 0, root, s)
			plain, err := daxfs.NewPlan(root, daxfs.Options{})
			if err != nil {
				t.Fatal(err)
			}
			if plain.UUID() != p.UUID() {
				t.Error("the digest table counts for the UUID")
			}
			images[i] = b
		}
		if !bytes.Equal(images[0], images[1]) {
			t.Fatalf("seed %d: equal trees, different images", seed)
		}
		b := images[0]
		root, err := daxfs.ReadRootHash(daxfs.Mem(b), int64(len(b)))
		if err != nil {
			t.Fatal(err)
		}
		for _, r := range []io.ReaderAt{daxfs.Mem(b), reader{bytes.NewReader(b)}} {
			if err := daxfs.Prove(t.Context(), r, int64(len(b)), daxfs.ProveOptions{Root: &root}, nil); err != nil {
				t.Fatalf("seed %d: %v", seed, err)
			}
		}
	}
}

// TestProveLarge has contents and gaps longer than one read.
func TestProveLarge(t *testing.T) {
	s := newStore(daxfs.BlockSize)
	at := func(off int64, size int) *daxfs.Node {
		s.next = off
		b := bytes.Repeat([]byte{1, 2, 3, 4, byte(off >> 20)}, size/5+1)[:size]
		n := regular()
		n.Data = s.put(b)
		return n
	}
	root := dir(map[string]*daxfs.Node{
		"a": at(4096, 10), "b": at(3<<20, 3<<20+17), "c": at(9<<20, 1<<20), "d": at(10<<20, 4096), "e": at(13<<20, 5),
	})
	s.next = 20 << 20
	s.f.Truncate(s.next)
	_, b := s.fileImage(t, root, daxfs.Options{Digests: true})
	for _, wrap := range []func([]byte) io.ReaderAt{
		func(b []byte) io.ReaderAt { return daxfs.Mem(b) },
		func(b []byte) io.ReaderAt { return reader{bytes.NewReader(b)} },
	} {
		if err := daxfs.Prove(t.Context(), wrap(b), int64(len(b)), daxfs.ProveOptions{}, nil); err != nil {
			t.Fatal(err)
		}
		for _, c := range []struct {
			off  int64
			rule daxfs.Rule
			path string
		}{
			{4096, daxfs.RuleDigestData, "/a"},
			{4106, daxfs.RuleDigestGap, ""},
			{2 << 20, daxfs.RuleDigestGap, ""},
			{3 << 20, daxfs.RuleDigestData, "/b"},
			{6<<20 + 16, daxfs.RuleDigestData, "/b"},
			{6<<20 + 17, daxfs.RuleDigestGap, ""},
			{8 << 20, daxfs.RuleDigestGap, ""},
			{10<<20 - 1, daxfs.RuleDigestData, "/c"},
			{10 << 20, daxfs.RuleDigestData, "/d"},
			{12 << 20, daxfs.RuleDigestGap, ""},
			{13<<20 + 4, daxfs.RuleDigestData, "/e"},
			{20<<20 - 1, daxfs.RuleDigestGap, ""},
		} {
			b[c.off] ^= 0x10
			var got []daxfs.Finding
			err := daxfs.Prove(t.Context(), wrap(b), int64(len(b)), daxfs.ProveOptions{}, func(f daxfs.Finding) bool {
				got = append(got, f)
				return true
			})
			b[c.off] ^= 0x10
			if err == nil || len(got) != 1 || got[0].Rule != c.rule || got[0].Path != c.path {
				t.Errorf("a flip at %d gives %v, %v; want %s of %q", c.off, got, err, c.rule, c.path)
			}
		}
	}
}

// TestProveFlips flips one bit at a time: in every byte of block 0 and behind the core, and in every
// seventh byte of the rest (a fifth of these with -short). Prove finds each flip.
func TestProveFlips(t *testing.T) {
	b := provable(t)
	rng := rand.New(rand.NewPCG(1, 2))
	table := len(b) - disk.V8OverlaySize - daxfs.BlockSize
	step := 1
	if testing.Short() {
		step = 5
	}
	for off := 0; off < len(b); off += step {
		if off > daxfs.BlockSize && off%7 != 0 && off < table {
			continue
		}
		bit := byte(1) << rng.UintN(8)
		b[off] ^= bit
		if err := daxfs.Prove(t.Context(), daxfs.Mem(b), int64(len(b)), daxfs.ProveOptions{}, nil); err == nil {
			t.Errorf("a flip at %d of %d is not found", off, len(b))
		} else if errors.Is(err, daxfs.ErrNoDigests) {
			t.Errorf("a flip at %d of %d hides the table", off, len(b))
		}
		b[off] ^= bit
	}
}

// footer lets edit change the footer and seals it again: a table that lies.
func (s *surgeon) footer(edit func(*disk.DigestFooter)) {
	at := s.b[len(s.b)-disk.V8OverlaySize-disk.DigestFooterSize:]
	var f disk.DigestFooter
	f.Unmarshal(at)
	edit(&f)
	f.Marshal(at)
	root := sha256.Sum256(at[:disk.DigestRootOff])
	copy(at[disk.DigestRootOff:], root[:])
}

// entry lets edit change an entry of the table and seals the table again.
func (s *surgeon) entry(n int, edit func(*disk.DigestEntry)) {
	s.footer(func(f *disk.DigestFooter) {
		at := s.b[f.TableOff+uint64(n*disk.DigestEntrySize):]
		var e disk.DigestEntry
		e.Unmarshal(at)
		edit(&e)
		e.Marshal(at)
		f.Table = sha256.Sum256(s.b[f.TableOff:][:f.Count*disk.DigestEntrySize])
	})
}

func inFooter(edit func(*disk.DigestFooter)) func(*surgeon) {
	return func(s *surgeon) { s.footer(edit) }
}

func inEntry(n int, edit func(*disk.DigestEntry)) func(*surgeon) {
	return func(s *surgeon) { s.entry(n, edit) }
}

// lies are digest tables that are damaged, wrong, or written by others. They cover all rules of Prove.
var lies = []corruption{
	{"damaged magic", daxfs.RuleDigestTable, "", func(s *surgeon) {
		s.b[len(s.b)-disk.V8OverlaySize-disk.DigestFooterSize]++
	}},
	{"damaged footer", daxfs.RuleDigestTable, "", func(s *surgeon) { s.b[len(s.b)-disk.V8OverlaySize-1]++ }},
	{"version 2", daxfs.RuleDigestTable, "", inFooter(func(f *disk.DigestFooter) { f.Version = 2 })},
	{"another algorithm", daxfs.RuleDigestTable, "", inFooter(func(f *disk.DigestFooter) { f.Algorithm = 7 })},
	{"reserved bytes", daxfs.RuleDigestTable, "", inFooter(func(f *disk.DigestFooter) { f.Reserved[15] = 1 })},
	{"table of another image", daxfs.RuleDigestTable, "", inFooter(func(f *disk.DigestFooter) { f.ImageSize += 4096 })},
	{"table behind the end", daxfs.RuleDigestTable, "", inFooter(func(f *disk.DigestFooter) { f.TableOff = 1 << 63 })},
	{"table not at a block", daxfs.RuleDigestTable, "", inFooter(func(f *disk.DigestFooter) { f.TableOff++ })},
	{"table a block earlier", daxfs.RuleDigestTable, "", inFooter(func(f *disk.DigestFooter) { f.TableOff -= 4096 })},
	{"metadata in block 0", daxfs.RuleDigestTable, "", inFooter(func(f *disk.DigestFooter) { f.MetaOff = 0 })},
	{"metadata behind the table", daxfs.RuleDigestTable, "", inFooter(func(f *disk.DigestFooter) {
		f.MetaOff = f.TableOff + 4096
	})},
	{"absurd number of entries", daxfs.RuleDigestTable, "", inFooter(func(f *disk.DigestFooter) { f.Count = 1 << 62 })},
	{"more entries", daxfs.RuleDigestTable, "", inFooter(func(f *disk.DigestFooter) { f.Count++ })},
	{"truncated by an entry", daxfs.RuleDigestTable, "digest-gap", func(s *surgeon) {
		s.footer(func(f *disk.DigestFooter) {
			f.Count--
			f.Table = sha256.Sum256(s.b[f.TableOff:][:f.Count*disk.DigestEntrySize])
		})
	}},
	{"damaged entry", daxfs.RuleDigestTable, "", func(s *surgeon) {
		s.footer(func(f *disk.DigestFooter) { s.b[f.TableOff+20]++ })
	}},
	{"something behind the table", daxfs.RuleDigestTable, "", func(s *surgeon) {
		s.footer(func(f *disk.DigestFooter) { s.b[f.TableOff+f.Count*disk.DigestEntrySize] = 1 })
	}},
	{"entry not at a page", daxfs.RuleDigestTable, "", inEntry(1, func(e *disk.DigestEntry) { e.Off++ })},
	{"entry of nothing", daxfs.RuleDigestTable, "", inEntry(1, func(e *disk.DigestEntry) { e.Size = 0 })},
	{"entry of everything", daxfs.RuleDigestTable, "", inEntry(1, func(e *disk.DigestEntry) { e.Size = 1<<64 - 1 })},
	{"entry in block 0", daxfs.RuleDigestTable, "", inEntry(0, func(e *disk.DigestEntry) { e.Off = 0 })},
	{"entry in the metadata", daxfs.RuleDigestTable, "", func(s *surgeon) {
		s.footer(func(f *disk.DigestFooter) {
			meta, last := f.MetaOff, int(f.Count)-1
			s.entry(last, func(e *disk.DigestEntry) { e.Off = meta })
			f.Unmarshal(s.b[len(s.b)-disk.V8OverlaySize-disk.DigestFooterSize:])
		})
	}},
	{"entries out of order", daxfs.RuleDigestTable, "", func(s *surgeon) {
		s.entry(1, func(e *disk.DigestEntry) { e.Off -= 4096 })
	}},
	{"other contents", daxfs.RuleDigestData, "", func(s *surgeon) { s.contents("two")[0]++ }},
	{"other digest", daxfs.RuleDigestData, "", inEntry(0, func(e *disk.DigestEntry) { e.Sum[0]++ })},
	{"shorter contents", daxfs.RuleDigestData, "digest-gap", inEntry(0, func(e *disk.DigestEntry) { e.Size-- })},
	{"tail", daxfs.RuleDigestGap, "", func(s *surgeon) { b := s.contents("two"); b[:4096][4095] = 1 }},
	{"time", daxfs.RuleDigestMeta, "", func(s *surgeon) {
		s.super(func(d *disk.ErofsSuper) { d.EpochNsec++ })
	}},
	{"overlay", daxfs.RuleDigestMeta, "", func(s *surgeon) { s.b[len(s.b)-1] = 1 }},
}

// contents returns the contents of a file.
func (s *surgeon) contents(name string) []byte {
	in := s.lookup(name)
	off, size, ok := in.Data()
	if !ok {
		s.t.Fatalf("%s has no contents", name)
	}
	return s.b[off : off+size]
}

// TestProveLies: each wrong digest table gives findings of its rule only.
func TestProveLies(t *testing.T) {
	sound := provable(t)
	for _, c := range lies {
		t.Run(c.name, func(t *testing.T) {
			s := operate(t, bytes.Clone(sound))
			c.edit(s)
			list, err := proof(t, s.close(), daxfs.ProveOptions{})
			if len(list) == 0 || err == nil {
				t.Fatalf("no finding, error %v", err)
			}
			wantRule(t, err)
			seen := false
			for _, f := range list {
				seen = seen || f.Rule == c.rule
				if f.Rule != c.rule && !slices.Contains(strings.Fields(c.also), string(f.Rule)) {
					t.Errorf("finding: %v", f)
				}
			}
			if !seen {
				t.Errorf("findings %v, none of rule %s", list, c.rule)
			}
		})
	}
}

// TestRootHash compares images with root hashes.
func TestRootHash(t *testing.T) {
	b := provable(t)
	root, err := daxfs.ReadRootHash(daxfs.Mem(b), int64(len(b)))
	if err != nil {
		t.Fatal(err)
	}
	other := root
	other[31] ^= 1
	list, err := proof(t, b, daxfs.ProveOptions{Root: &other})
	if err == nil || len(list) != 1 || list[0].Rule != daxfs.RuleDigestRoot ||
		!strings.Contains(list[0].Msg, root.String()) || !strings.Contains(list[0].Msg, other.String()) {
		t.Errorf("another root hash: %v, %v", list, err)
	}
	// The root hash detects a sealed lie.
	s := operate(t, bytes.Clone(b))
	two := s.contents("two")
	two[0]++
	s.entry(1, func(e *disk.DigestEntry) { e.Sum = sha256.Sum256(two) })
	lie := s.close()
	if list, err := proof(t, lie, daxfs.ProveOptions{}); err != nil {
		t.Errorf("a sealed image: %v, %v", list, err)
	}
	list, err = proof(t, lie, daxfs.ProveOptions{Root: &root})
	if err == nil || len(list) != 1 || list[0].Rule != daxfs.RuleDigestRoot {
		t.Errorf("a sealed image and the root hash of another: %v, %v", list, err)
	}
	// Images without a table: of an earlier version, and windows.
	for _, b := range [][]byte{fuzzImage(t), fuzzWindow(t), b[:8192]} {
		if list, err := proof(t, b, daxfs.ProveOptions{}); !errors.Is(err, daxfs.ErrNoDigests) || len(list) != 0 {
			t.Errorf("%d bytes without a table: %v, %v", len(b), list, err)
		}
		list, err := proof(t, b, daxfs.ProveOptions{Root: &root})
		if err == nil || len(list) != 1 || list[0].Rule != daxfs.RuleDigestRoot {
			t.Errorf("%d bytes without a table, and a root hash: %v, %v", len(b), list, err)
		}
	}
}

// TestProveNames checks the finding for contents with several names.
func TestProveNames(t *testing.T) {
	s := newStore(daxfs.BlockSize)
	linked := regular()
	linked.Data = s.put([]byte("shared"))
	entries := map[string]*daxfs.Node{"a": linked, "b": linked}
	for i := range 20 {
		n := regular()
		n.Data = linked.Data
		entries[fmt.Sprintf("n%02d", i)] = n
	}
	_, b := s.fileImage(t, dir(entries), daxfs.Options{Digests: true})
	b[linked.Data.Off] ^= 1
	list, err := proof(t, b, daxfs.ProveOptions{})
	if err == nil || len(list) != 1 {
		t.Fatalf("findings %v, %v", list, err)
	}
	f := list[0]
	for _, want := range []string{
		fmt.Sprintf("%x", sha256.Sum256([]byte("shared"))), fmt.Sprintf("%x", sha256.Sum256(b[linked.Data.Off:][:6])),
		`"/b"`, "13 more names",
	} {
		if !strings.Contains(f.Msg, want) {
			t.Errorf("%q is not in %q", want, f.Msg)
		}
	}
	if f.Path != "/a" || f.Off != linked.Data.Off || f.Ino == 0 {
		t.Errorf("finding %+v", f)
	}
}

// provableLarge has a file and a gap that are longer than one read.
func provableLarge(t testing.TB) []byte {
	t.Helper()
	s := newStore(daxfs.BlockSize)
	large := file(s.put(bytes.Repeat([]byte("large"), 300_000)))
	s.next += 2 << 20
	_, b := s.fileImage(t, dir(map[string]*daxfs.Node{"large": large}), daxfs.Options{Digests: true})
	return b
}

// TestProveStops: a proof ends when no more findings are wanted.
func TestProveStops(t *testing.T) {
	b := provable(t)
	o := operate(t, b)
	o.contents("one")[0]++
	o.contents("two")[0]++
	if list, _ := proof(t, b, daxfs.ProveOptions{}); len(list) != 2 {
		t.Fatalf("findings %v, want 2", list)
	}
	n := 0
	err := daxfs.Prove(t.Context(), daxfs.Mem(b), int64(len(b)), daxfs.ProveOptions{}, func(daxfs.Finding) bool {
		n++
		return false
	})
	if n != 1 || !errors.Is(err, daxfs.ErrCorrupt) {
		t.Errorf("%d findings, %v; want 1", n, err)
	}
}

// TestProveWithoutTree: changed contents are found in an image whose metadata cannot be read. They have no name then.
func TestProveWithoutTree(t *testing.T) {
	b := provable(t)
	o := operate(t, b)
	two := o.lookup("two").Off
	b[two]++
	b[disk.ErofsSuperOff]++
	list, err := proof(t, b, daxfs.ProveOptions{})
	if !errors.Is(err, daxfs.ErrCorrupt) || len(list) != 2 || list[0].Rule != daxfs.RuleDigestMeta ||
		list[1].Rule != daxfs.RuleDigestData || list[1].Off != two || list[1].Path != "" {
		t.Errorf("findings %v, %v", list, err)
	}
}

// TestProveSizes: no image has such a size, whoever asks for its root hash or its proof.
func TestProveSizes(t *testing.T) {
	for _, size := range []int64{-1, 0, daxfs.BlockSize - 1, 1 << 45} {
		_, root := daxfs.ReadRootHash(failingReader{}, size)
		for _, err := range []error{
			root, daxfs.Prove(t.Context(), failingReader{}, size, daxfs.ProveOptions{}, nil),
		} {
			var fe *daxfs.FormatError
			if !errors.As(err, &fe) || fe.Rule != daxfs.RuleImageSize {
				t.Errorf("size %d: error %v, want rule %s", size, err, daxfs.RuleImageSize)
			}
		}
	}
}

// TestProveErrors: a failed read is not a finding.
func TestProveErrors(t *testing.T) {
	b := provable(t)
	size := int64(len(b))
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := daxfs.Prove(ctx, daxfs.Mem(b), size, daxfs.ProveOptions{}, nil); !errors.Is(err, context.Canceled) {
		t.Errorf("cancelled: %v", err)
	}
	for off := int64(0); off < size; off += daxfs.BlockSize {
		found := false
		r := hole{bytes.NewReader(b), off}
		err := daxfs.Prove(t.Context(), r, size, daxfs.ProveOptions{}, func(daxfs.Finding) bool {
			found = true
			return true
		})
		if !errors.Is(err, errDisk) || found {
			t.Errorf("the page at %d cannot be read: %v", off, err)
		}
	}
}

// hole is an image with one unreadable page.
type hole struct {
	r   io.ReaderAt
	off int64
}

func (h hole) ReadAt(p []byte, off int64) (int, error) {
	if off < h.off+daxfs.BlockSize && h.off < off+int64(len(p)) {
		return 0, errDisk
	}
	return h.r.ReadAt(p, off)
}

// TestDigestOptions: digest tables that would be wrong or could not be found are refused.
func TestDigestOptions(t *testing.T) {
	s := newStore(64 << 10)
	a := regular()
	a.Data = s.put([]byte("contents"))
	p, err := daxfs.NewPlan(dir(map[string]*daxfs.Node{"a": a}), daxfs.Options{Digests: true})
	if err != nil {
		t.Fatal(err)
	}
	for _, pl := range []daxfs.Placement{
		{Meta: 4096, End: s.next},
		{Meta: s.next, End: s.next + p.MetaSize() + 4096},
	} {
		if err := p.Place(pl); !errors.Is(err, daxfs.ErrInvalid) {
			t.Errorf("place %+v: %v", pl, err)
		}
	}
	for name, d := range map[string]daxfs.Data{
		"no digest":   {Off: a.Data.Off, Size: a.Data.Size},
		"two digests": {Off: a.Data.Off, Size: a.Data.Size, Sum: [32]byte{1}},
	} {
		b := regular()
		b.Data = d
		var te *daxfs.TreeError
		_, err := daxfs.NewPlan(dir(map[string]*daxfs.Node{"a": a, "b": b}), daxfs.Options{Digests: true})
		if !errors.As(err, &te) || te.Path != "/b" {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// FuzzProve changes an image with a digest table: only the original passes.
func FuzzProve(f *testing.F) {
	sound := provable(f)
	foot := uint32(len(sound) - disk.V8OverlaySize - disk.DigestFooterSize)
	f.Add(foot, []byte{1}, true)
	f.Add(foot+24, binary.LittleEndian.AppendUint64(nil, 1<<40), true)
	f.Add(uint32(5000), []byte{1, 2, 3}, false)
	f.Fuzz(func(t *testing.T, off uint32, change []byte, seal bool) {
		b := bytes.Clone(sound)
		for i, x := range change {
			b[(int(off)+i)%len(b)] ^= x
		}
		if seal {
			(&surgeon{b: b}).footer(func(*disk.DigestFooter) {})
		}
		_, err := proof(t, b, daxfs.ProveOptions{})
		if same := bytes.Equal(b, sound); same != (err == nil) {
			t.Errorf("the image is the same: %v; error: %v", same, err)
		}
		if err != nil && !errors.Is(err, daxfs.ErrNoDigests) {
			wantRule(t, err)
		}
	})
}

func regular() *daxfs.Node { return &daxfs.Node{Mode: unix.S_IFREG | 0o644} }
