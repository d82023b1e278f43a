package lease

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"

	"github.com/daxfs/daxfs-snapshotter/pool"
	"github.com/daxfs/daxfs-snapshotter/pool/region"
)

// Regions are the lease regions of a pool's readers, as the owner of the pool sees them. They implement pool.Leases.
type Regions struct {
	specs []string

	mu sync.Mutex // one look at a time, because looking may void
}

var _ pool.Leases = (*Regions)(nil)

// launched begins the names of regions whose launcher holds flock(2) on the file while the reader lives.
const launched = "flock:"

// suffix ends the names of lease regions in a directory.
const suffix = ".lease"

// NewRegions names the lease regions that the owner looks at: as Open takes them, or a directory, of which it is all files
// that end in ".lease". "flock:" before a file or directory says that whoever starts a reader holds flock(2) on its file
// while the reader lives: when nobody does, the claims are void. What is not there holds nothing.
func NewRegions(specs []string) (*Regions, error) {
	for _, s := range specs {
		path, isLaunched := strings.CutPrefix(s, launched)
		p, err := parsePlace(path)
		if err != nil {
			return nil, err
		}
		if isLaunched && (p.path != path || !filepath.IsAbs(path)) {
			return nil, fmt.Errorf("lease region %q: only a whole file can be locked, expected %sPATH", s, launched)
		}
	}
	return &Regions{specs: slices.Clone(specs)}, nil
}

// Claim is an image that a reader has named.
type Claim struct {
	PoolID [16]byte
	UUID   [16]byte // of the image's tree
	Slot   int
	// Earlier says that the reader made it before it booted the last time.
	Earlier bool
}

// Of tells whether a claim names an image.
func (c Claim) Of(poolID [16]byte, m pool.Image) bool {
	return c.PoolID == poolID && c.UUID == m.UUID && c.Slot == m.Slot
}

// State is what the owner sees of a lease region.
type State struct {
	Region string // its file or device
	Reader string // who opened it; empty if nobody did
	Claims []Claim
	// Torn counts the entries that claim nobody knows what: they hold all images.
	Torn int
}

// label is how messages call a reader.
func (s State) label() string {
	if s.Reader == "" {
		return s.Region
	}
	return s.Reader
}

// List looks at all regions. The error names those that cannot be read; the others are returned all the same.
func (r *Regions) List() ([]State, error) { return r.list(true) }

// Peek is List for somebody who is not the owner of the pool: it only reads. Claims of a reader whose launcher is gone are
// returned, because the owner alone may void them.
func (r *Regions) Peek() ([]State, error) { return r.list(false) }

func (r *Regions) list(owner bool) ([]State, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	var out []State
	specs, err := r.expand()
	errs := []error{err}
	for _, s := range specs {
		st, err := look(s, owner)
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			errs = append(errs, err)
			continue
		}
		out = append(out, st)
	}
	return out, errors.Join(errs...)
}

// Users implements pool.Leases.
func (r *Regions) Users(poolID [16]byte, m pool.Image) ([]string, error) {
	return r.users(func(c Claim) bool { return c.Of(poolID, m) })
}

// Any implements pool.Leases.
func (r *Regions) Any(poolID [16]byte) ([]string, error) {
	return r.users(func(c Claim) bool { return c.PoolID == poolID })
}

func (r *Regions) users(named func(Claim) bool) ([]string, error) {
	all, err := r.List()
	if err != nil {
		return nil, err
	}
	var out []string
	for _, s := range all {
		if s.Torn > 0 || slices.ContainsFunc(s.Claims, named) {
			out = append(out, s.label())
		}
	}
	return out, nil
}

// Void ends all claims of a reader, named by itself or by its region: somebody says that the reader is gone. With earlier,
// only those that the reader made before it booted the last time. It returns how many they were.
//
// Errors: pool.ErrNotFound; pool.ErrInvalid if several regions are meant.
func (r *Regions) Void(reader string, earlier bool) (int, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	specs, err := r.expand()
	if err != nil {
		return 0, err
	}
	var found []string
	for _, s := range specs {
		st, err := look(s, true)
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil && strings.TrimPrefix(s, launched) != reader {
			return 0, err
		}
		if st.Reader == reader || strings.TrimPrefix(s, launched) == reader {
			found = append(found, strings.TrimPrefix(s, launched))
		}
	}
	switch len(found) {
	case 0:
		return 0, fmt.Errorf("no lease region is that of reader %q: %w", reader, pool.ErrNotFound)
	case 1:
	default:
		return 0, fmt.Errorf("reader %q has the lease regions %q, name one of them: %w", reader, found, pool.ErrInvalid)
	}
	m, err := openMemory(found[0], true)
	if err != nil {
		return 0, err
	}
	n, err := void(m, earlier)
	return n, errors.Join(err, m.close())
}

// expand replaces directories by the regions in them.
func (r *Regions) expand() ([]string, error) {
	var out []string
	for _, s := range r.specs {
		path, isLaunched := strings.CutPrefix(s, launched)
		st, err := os.Stat(path)
		if err != nil || !st.IsDir() {
			out = append(out, s)
			continue
		}
		list, err := os.ReadDir(path)
		if err != nil {
			return nil, fmt.Errorf("lease regions: %w", err)
		}
		prefix := ""
		if isLaunched {
			prefix = launched
		}
		for _, e := range list {
			if strings.HasSuffix(e.Name(), suffix) {
				out = append(out, prefix+filepath.Join(path, e.Name()))
			}
		}
	}
	return out, nil
}

// look reads a region, which it voids first if the owner looks and its launcher is gone.
func look(spec string, owner bool) (s State, err error) {
	path, isLaunched := strings.CutPrefix(spec, launched)
	isLaunched = isLaunched && owner
	m, err := openMemory(path, isLaunched)
	if err != nil {
		return s, err
	}
	defer func() { err = errors.Join(err, m.close()) }() // which ends the lock
	s, err = read(m, path)
	if err != nil {
		return s, fmt.Errorf("lease region %q: %w", path, err)
	}
	if !isLaunched || len(s.Claims)+s.Torn == 0 {
		return s, nil
	}
	f, _ := m.file()
	switch err := region.Flock(f); {
	case errors.Is(err, region.ErrBusy):
		return s, nil
	case err != nil:
		return s, err
	}
	if _, err := void(m, false); err != nil {
		return s, fmt.Errorf("lease region %q, whose reader is gone: %w", path, err)
	}
	return State{Region: path}, nil
}

// read reads a region of which nothing is believed.
func read(m memory, path string) (State, error) {
	s := State{Region: path}
	b := make([]byte, headerSize)
	if err := m.load(b, 0); err != nil {
		return s, err
	}
	h, ok := decodeHeader(b)
	if ok {
		s.Reader = h.reader.Name
	}
	t, err := readTable(m)
	if err != nil {
		return s, err
	}
	for i := range t.count() {
		switch e, st := t.entry(i); st {
		case claimed:
			s.Claims = append(s.Claims,
				Claim{PoolID: e.pool, UUID: e.image, Slot: int(e.slot), Earlier: !ok || e.run != h.run})
		case torn:
			s.Torn++
		}
	}
	return s, nil
}

// void ends claims, and makes the region nobody's unless only earlier ones end.
func void(m memory, earlier bool) (int, error) {
	b := make([]byte, headerSize)
	if err := m.load(b, 0); err != nil {
		return 0, err
	}
	h, ok := decodeHeader(b)
	if !earlier { // first: a reader that lives after all must find out before its claims are gone
		if err := m.store(make([]byte, headerSize), 0); err != nil {
			return 0, err
		}
	}
	t, err := readTable(m)
	if err != nil {
		return 0, err
	}
	n := 0
	for i := range t.count() {
		e, s := t.entry(i)
		if s == free || earlier && (s == torn || ok && e.run == h.run) {
			continue
		}
		if err := m.store(make([]byte, entrySize), headerSize+int64(i)*entrySize); err != nil {
			return n, err
		}
		n++
	}
	return n, nil
}
