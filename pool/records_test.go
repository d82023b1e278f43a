package pool

import (
	"errors"
	"fmt"
	"path/filepath"
	"testing"
)

// A noted record becomes durable with the next change, in order, even if a change fails in between.
// FlushRecords and SetRecord do not wait.
func TestNotedRecords(t *testing.T) {
	dir := t.TempDir()
	r := openRegion(t, dir, 64<<20)
	path := filepath.Join(dir, "index")
	p, err := Create(r, path, Options{})
	if err != nil {
		t.Fatal(err)
	}
	expect := func(want string) {
		t.Helper()
		got, err := p.Records("k")
		if err != nil || fmt.Sprintf("%s", got) != want {
			t.Errorf("records %s, %v; expected %s", got, err, want)
		}
	}
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	must(p.NoteRecord("k", "a", []byte("1")))
	must(p.NoteRecord("k", "b", []byte("2")))
	expect("map[]")
	p.index.fail = func(string) error { return errors.New("the disk is tired") }
	if err := p.Begin().CommitLayer(t.Context(), "l", nil); err == nil {
		t.Error("a change on a disk that fails")
	}
	p.index.fail = func(string) error { return nil }
	must(p.NoteRecord("k", "a", []byte("3")))
	must(p.Begin().CommitLayer(t.Context(), "l", nil))
	expect("map[a:3 b:2]")
	must(p.NoteRecord("k", "b", nil))
	must(p.FlushRecords())
	expect("map[a:3]")
	must(p.NoteRecord("k", "a", []byte("4")))
	must(p.SetRecord("k", "c", []byte("5")))
	expect("map[a:4 c:5]")
	if err := p.NoteRecord("", "x", nil); !errors.Is(err, ErrInvalid) {
		t.Errorf("a record without a kind: %v", err)
	}
	must(p.NoteRecord("k", "a", nil))
	must(p.Close())
	p, err = Open(r, path, Options{})
	must(err)
	defer p.Close()
	expect("map[c:5]")
}
