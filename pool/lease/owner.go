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

// Regions are the lease regions of a pool's readers, seen by the owner. They implement pool.Leases.
type Regions struct {
	specs []string

	mu sync.Mutex // one look at a time, because a look may void claims
}

var _ pool.Leases = (*Regions)(nil)

// launched is the prefix of regions whose launcher holds flock(2) on the file while the reader lives.
const launched = "flock:"

// suffix is the suffix of lease regions in a directory.
const suffix = ".lease"

// NewRegions names the lease regions that the owner looks at. A spec is one that Open takes, or a
// directory, which stands for all its files that end in ".lease". The prefix "flock:" says that the
// launcher of a reader holds flock(2) on its file while the reader lives: if nobody does, the claims
// are void. A missing file or directory claims nothing.
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

// Claim is an image that a reader says it uses.
type Claim struct {
	PoolID [16]byte
	UUID   [16]byte // of the image's tree
	Slot   int
	// Earlier says that the reader made the claim before its last boot.
	Earlier bool
}

// Of tells whether a claim names an image.
func (c Claim) Of(poolID [16]byte, m pool.Image) bool {
	return c.PoolID == poolID && c.UUID == m.UUID && c.Slot == m.Slot
}

// State is the state of a lease region as the owner sees it.
type State struct {
	Region string // file or device
	Reader string // name of the reader; empty if no reader opened it
	Claims []Claim
	// Torn counts unreadable entries. Each may claim any image, so they hold all of them.
	Torn int
}

// label is the name of a reader in messages.
func (s State) label() string {
	if s.Reader == "" {
		return s.Region
	}
	return s.Reader
}

// List looks at all regions. The error names the unreadable ones; the others are returned anyway.
func (r *Regions) List() ([]State, error) { return r.list(true) }

// Peek is like List, for a process that does not own the pool: it only reads. It returns claims of a
// reader whose launcher is gone, because only the owner may void them.
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

// Void ends all claims of a reader that is gone, named by its name or its region. With earlier, it
// ends only those from before the reader's last boot. It returns their number.
//
// Errors: pool.ErrNotFound; pool.ErrInvalid if several regions match.
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

// look reads a region. If the owner looks and the launcher is gone, it voids the claims first.
func look(spec string, owner bool) (s State, err error) {
	path, isLaunched := strings.CutPrefix(spec, launched)
	isLaunched = isLaunched && owner
	m, err := openMemory(path, isLaunched)
	if err != nil {
		return s, err
	}
	defer func() { err = errors.Join(err, m.close()) }() // also ends the lock
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

// read reads a region without trusting it.
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

// void ends claims. Unless only earlier ones end, the region then belongs to nobody.
func void(m memory, earlier bool) (int, error) {
	b := make([]byte, headerSize)
	if err := m.load(b, 0); err != nil {
		return 0, err
	}
	h, ok := decodeHeader(b)
	if !earlier { // first: a reader that lives after all must notice before its claims are gone
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
