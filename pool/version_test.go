package pool

import (
	"encoding/binary"
	"errors"
	"hash/crc32"
	"path/filepath"
	"strings"
	"testing"
)

// A pool of a later version is no wiped one: after a downgrade its images are not thrown away.
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
		if _, err := r.ReadAt(b, slot*headerSize); err != nil {
			t.Fatal(err)
		}
		binary.LittleEndian.PutUint32(b[8:], formatVersion+1)
		binary.LittleEndian.PutUint32(b[headerSize-4:], crc32.Checksum(b[:headerSize-4], castagnoli))
		if _, err := r.WriteAt(b, slot*headerSize); err != nil {
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
		if name != "create" && !strings.Contains(err.Error(), "version 2, this program knows 1") {
			t.Errorf("%s: %v", name, err)
		}
	}
}
