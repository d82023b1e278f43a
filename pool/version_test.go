package pool

import (
	"encoding/binary"
	"errors"
	"hash/crc32"
	"path/filepath"
	"strings"
	"testing"
)

// A pool of a later version is not taken for a wiped one: a downgrade does not throw its images away.
func TestLaterVersionIsKept(t *testing.T) {
	dir := t.TempDir()
	r := openRegion(t, dir, 64<<20)
	index := filepath.Join(dir, "index")
	p, err := Create(r, index, Options{})
	if err != nil {
		t.Fatal(err)
	}
	addImage(t, p, "a", random(1, 100))
	if err := p.Close(); err != nil {
		t.Fatal(err)
	}
	for slot := range int64(2) {
		b := make([]byte, headerSize)
		if _, err := r.ReadAt(b, headerOff(uint64(slot))); err != nil {
			t.Fatal(err)
		}
		binary.LittleEndian.PutUint32(b[8:], formatVersion+1)
		binary.LittleEndian.PutUint32(b[headerSize-4:], crc32.Checksum(b[:headerSize-4], castagnoli))
		if _, err := r.WriteAt(b, headerOff(uint64(slot))); err != nil {
			t.Fatal(err)
		}
	}
	for name, f := range map[string]func() (*Pool, error){
		"open":   func() (*Pool, error) { return Open(r, index, Options{}) },
		"create": func() (*Pool, error) { return Create(r, filepath.Join(dir, "new"), Options{}) },
		"reset":  func() (*Pool, error) { return Reset(r, index, Options{}) },
	} {
		_, err := f()
		if !errors.Is(err, ErrForeign) || errors.Is(err, ErrWiped) {
			t.Errorf("%s: %v, expected ErrForeign", name, err)
		}
		if name != "create" && !strings.Contains(err.Error(), "version 3, this program knows 2") {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// A pool of version 1, whose header copies are elsewhere, counts as another version, too.
func TestVersionOneIsKept(t *testing.T) {
	dir := t.TempDir()
	r := openRegion(t, dir, 64<<20)
	for _, off := range []int64{0, 4096} {
		b := make([]byte, headerSize)
		copy(b, magic)
		binary.LittleEndian.PutUint32(b[8:], 1)
		if _, err := r.WriteAt(b, off); err != nil {
			t.Fatal(err)
		}
		for name, f := range map[string]func() (*Pool, error){
			"open":  func() (*Pool, error) { return Open(r, filepath.Join(dir, "index"), Options{}) },
			"reset": func() (*Pool, error) { return Reset(r, filepath.Join(dir, "index"), Options{}) },
		} {
			if _, err := f(); !errors.Is(err, ErrVersion) || !errors.Is(err, ErrForeign) || errors.Is(err, ErrWiped) {
				t.Errorf("%s with a header at %d: %v, expected ErrVersion", name, off, err)
			}
		}
		if _, err := ReadCatalogue(r); !errors.Is(err, ErrVersion) {
			t.Errorf("catalogue: %v, expected ErrVersion", err)
		}
		if err := r.Punch(0, 8192); err != nil {
			t.Fatal(err)
		}
	}
}
