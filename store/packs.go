package store

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"github.com/opencontainers/go-digest"
)

// packs is the directory of layer packs.
type packs struct{ dir string }

// tempPrefix is the prefix of unfinished packs.
const tempPrefix = "new-"

// openPacks makes the directory and removes packs that a crash left unfinished.
func openPacks(dir string) (*packs, error) {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, err
	}
	entries, err := os.ReadDir(dir)
	if err != nil {
		return nil, err
	}
	for _, e := range entries {
		if strings.HasPrefix(e.Name(), tempPrefix) {
			if err := os.Remove(filepath.Join(dir, e.Name())); err != nil {
				return nil, err
			}
		}
	}
	return &packs{dir: dir}, nil
}

func (p *packs) path(diffID digest.Digest) string {
	return filepath.Join(p.dir, strings.ReplaceAll(diffID.String(), ":", "-"))
}

// open opens the pack of a layer. A nil packs has none.
func (p *packs) open(diffID digest.Digest) (io.ReadCloser, error) {
	if p == nil {
		return nil, fmt.Errorf("no layer packs are kept: %w", fs.ErrNotExist)
	}
	return os.Open(p.path(diffID))
}

func (p *packs) has(diffID digest.Digest) bool {
	_, err := os.Stat(p.path(diffID))
	return err == nil
}

func (p *packs) remove(diffID digest.Digest) error {
	if err := os.Remove(p.path(diffID)); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return nil
}

// list returns the layers that have a pack.
func (p *packs) list() ([]digest.Digest, error) {
	entries, err := os.ReadDir(p.dir)
	if err != nil {
		return nil, err
	}
	var ids []digest.Digest
	for _, e := range entries {
		algorithm, hex, _ := strings.Cut(e.Name(), "-")
		id := digest.NewDigestFromEncoded(digest.Algorithm(algorithm), hex)
		if id.Validate() == nil {
			ids = append(ids, id)
		}
	}
	return ids, nil
}

// pack is an unfinished layer pack: a copy of everything read from the blob.
type pack struct {
	io.ReadCloser
	packs *packs
	file  *os.File
}

// copyOf returns a reader of rc that copies to a new pack. The caller must call drop in the end.
func (p *packs) copyOf(rc io.ReadCloser) (*pack, error) {
	f, err := os.CreateTemp(p.dir, tempPrefix)
	if err != nil {
		return nil, err
	}
	return &pack{ReadCloser: rc, packs: p, file: f}, nil
}

func (k *pack) Read(b []byte) (int, error) {
	n, err := k.ReadCloser.Read(b)
	if _, werr := k.file.Write(b[:n]); werr != nil {
		return 0, fmt.Errorf("layer pack: %w", werr)
	}
	return n, err
}

// keep durably makes the pack that of diffID.
func (k *pack) keep(diffID digest.Digest) error {
	if err := k.file.Sync(); err != nil {
		return fmt.Errorf("layer pack: %w", err)
	}
	if err := os.Rename(k.file.Name(), k.packs.path(diffID)); err != nil {
		return fmt.Errorf("layer pack: %w", err)
	}
	d, err := os.Open(k.packs.dir)
	if err != nil {
		return err
	}
	defer d.Close()
	if err := d.Sync(); err != nil {
		return fmt.Errorf("layer pack: %w", err)
	}
	return nil
}

// drop closes the pack and removes it unless it was kept.
func (k *pack) drop() {
	k.file.Close()
	os.Remove(k.file.Name()) // no effect after keep
}
