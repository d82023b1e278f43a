package chunked

import (
	"bytes"
	"context"
	"errors"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/klauspost/compress/zstd"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"github.com/vbatts/tar-split/tar/asm"
	"github.com/vbatts/tar-split/tar/storage"
	"golang.org/x/sys/unix"
)

// contentsOf finds contents in a blob like a reader.
type contentsOf struct {
	blob []byte
	toc  *TOC
}

func (c contentsOf) Get(name string) (io.ReadCloser, error) {
	for _, e := range c.toc.Entries {
		if e.Name == name && e.Type == TypeReg {
			z, err := zstd.NewReader(bytes.NewReader(c.blob[e.Offset:e.EndOffset]))
			if err != nil {
				return nil, err
			}
			return z.IOReadCloser(), nil
		}
	}
	return nil, os.ErrNotExist
}

// TestGNUTar: output of GNU tar in each of its formats survives encoding; files with holes are refused.
func TestGNUTar(t *testing.T) {
	dir := t.TempDir()
	long := strings.Repeat("long/", 40)
	if err := os.MkdirAll(filepath.Join(dir, long), 0o755); err != nil {
		t.Fatal(err)
	}
	for name, data := range map[string][]byte{
		"empty": nil, "small": []byte("x"), "ä ö\n": []byte("name"), long + "file": random(1, 70_000),
		"large": random(2, 6<<20),
	} {
		if err := os.WriteFile(filepath.Join(dir, name), data, 0o4755); err != nil {
			t.Fatal(err)
		}
	}
	for _, err := range []error{
		os.Link(filepath.Join(dir, "large"), filepath.Join(dir, "linked")),
		os.Symlink(strings.Repeat("target/", 30), filepath.Join(dir, "symlink")),
		unix.Mkfifo(filepath.Join(dir, "fifo"), 0o600),
		unix.Setxattr(filepath.Join(dir, "small"), "user.x", []byte("\x00\xff"), 0),
	} {
		if err != nil {
			t.Fatal(err)
		}
	}
	for _, c := range []struct {
		args   []string
		reason string
	}{
		{[]string{"--format=gnu"}, ""},
		{[]string{"--format=posix", "--xattrs"}, ""},
		{[]string{"--format=gnu", "--blocking-factor=200"}, ""},
		{[]string{"--format=gnu", "--sparse"}, "type 'S'"},
		{[]string{"--format=posix", "--sparse"}, "holes"},
		{[]string{"--format=posix", "--sparse", "--sparse-version=0.1"}, "holes"},
		{[]string{"--format=gnu", "--label=volume"}, "type 'V'"},
	} {
		if strings.Contains(strings.Join(c.args, " "), "sparse") {
			if err := os.Truncate(filepath.Join(dir, "large"), 64<<20); err != nil {
				t.Fatal(err)
			}
		}
		raw, err := exec.Command("tar", append(c.args, "-C", dir, "-cf", "-", ".")...).Output()
		if err != nil {
			t.Fatalf("tar %v: %v", c.args, err)
		}
		blob, e, err := encode(t, raw, 2)
		if c.reason != "" {
			if !errors.Is(err, ErrUnsuitable) || !strings.Contains(err.Error(), c.reason) {
				t.Errorf("tar %v: error %v, expected one with %q", c.args, err, c.reason)
			}
			continue
		}
		if err != nil {
			t.Errorf("tar %v: %v", c.args, err)
			continue
		}
		replays(t, blob, e, raw)
	}
}

// replays checks that tar-split's own package and ours restore the tar from tar-split and contents.
func replays(t testing.TB, blob []byte, e *Encoded, raw []byte) {
	t.Helper()
	toc, split := tables(t, blob, e)
	var out bytes.Buffer
	get := contentsOf{blob, toc}
	if err := asm.WriteOutputTarStream(get, storage.NewJSONUnpacker(bytes.NewReader(split)), &out); err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(out.Bytes(), raw) {
		t.Fatalf("tar-split and contents give %d bytes that are not the tar of %d", out.Len(), len(raw))
	}
	layout, err := ParseLayout(ocispec.Descriptor{Size: e.Size, Annotations: e.Annotations})
	if err != nil {
		t.Fatal(err)
	}
	found, err := ReadTables(t.Context(), inMemory(blob), layout)
	if err != nil {
		t.Fatal(err)
	}
	r, err := NewPlan(found, nothing{}).Tar(t.Context(), inMemory(blob), Options{SpoolDir: t.TempDir()})
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	if got, err := io.ReadAll(r); err != nil || !bytes.Equal(got, raw) {
		t.Fatalf("our reader gives %d bytes and %v that are not the tar of %d", len(got), err, len(raw))
	}
}

// inMemory is a blob in memory.
type inMemory []byte

func (b inMemory) Part(_ context.Context, from, to int64) ([]byte, error) {
	return bytes.Clone(b[from:to]), nil
}

// nothing has no contents.
type nothing struct{}

func (nothing) Find([32]byte, int64) (io.ReaderAt, bool) { return nil, false }
