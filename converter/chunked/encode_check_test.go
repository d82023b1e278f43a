package chunked

import (
	"bytes"
	"encoding/json"
	"fmt"
	"testing"

	"github.com/klauspost/compress/zstd"
	"github.com/opencontainers/go-digest"
	"github.com/vbatts/tar-split/archive/tar"
	"github.com/vbatts/tar-split/tar/asm"
	"github.com/vbatts/tar-split/tar/storage"
)

// tables reads the annotated tables and checks them like containers/storage: names in both are equal
// and distinct, and all digests are correct.
func tables(t testing.TB, blob []byte, e *Encoded) (*TOC, []byte) {
	t.Helper()
	z, err := zstd.NewReader(nil)
	if err != nil {
		t.Fatal(err)
	}
	defer z.Close()
	part := func(key string, want digest.Digest) []byte {
		var off, n, raw int
		if _, err := fmt.Sscanf(e.Annotations[key], "%d:%d:%d", &off, &n, &raw); err != nil {
			t.Fatalf("%s: %v", key, err)
		}
		if got := digest.FromBytes(blob[off : off+n]); got != want {
			t.Fatalf("%s: digest %s, expected %s", key, got, want)
		}
		b, err := z.DecodeAll(blob[off:off+n], nil)
		if err != nil || len(b) != raw {
			t.Fatalf("%s: %d bytes, error %v, expected %d", key, len(b), err, raw)
		}
		return b
	}
	toc := new(TOC)
	if err := json.Unmarshal(part(AnnotationTOCPosition, digest.Digest(e.Annotations[AnnotationTOCDigest])),
		toc); err != nil {
		t.Fatal(err)
	}
	split := part(AnnotationTarSplitPosition, toc.TarSplitDigest)
	names := map[string]bool{}
	var file Entry
	for _, entry := range toc.Entries {
		if entry.Type == TypeChunk {
			file.ChunkOffset += file.ChunkSize
			if entry.Name != file.Name || entry.ChunkOffset != file.ChunkOffset {
				t.Fatalf("chunk %+v behind %+v", entry, file)
			}
			file.ChunkSize = entry.ChunkSize
			continue
		}
		if names[entry.Name] {
			t.Fatalf("%q stands twice in the table of contents", entry.Name)
		}
		names[entry.Name], file = true, entry
		if entry.Size == 0 {
			continue
		}
		data, err := z.DecodeAll(blob[entry.Offset:entry.EndOffset], nil)
		if err != nil || int64(len(data)) != entry.Size || digest.FromBytes(data) != entry.Digest {
			t.Fatalf("%q: %d bytes, digest %s, error %v, expected %+v", entry.Name, len(data),
				digest.FromBytes(data), err, entry)
		}
	}
	err = asm.IterateHeaders(storage.NewJSONUnpacker(bytes.NewReader(split)), func(h *tar.Header) error {
		if !names[h.Name] {
			return fmt.Errorf("%q is in tar-split only", h.Name)
		}
		delete(names, h.Name)
		return nil
	})
	if err != nil || len(names) > 0 {
		t.Fatalf("tar-split does not match the table of contents: %v, missing %v", err, names)
	}
	return toc, split
}

// FuzzEncode: any tar is refused, or encoded so that both ways restore it.
func FuzzEncode(f *testing.F) {
	f.Add(tarOf(f, regular("a", []byte("x")), regular("b/c", nil), regular("d", random(1, 2000))), uint8(1))
	f.Add(tarOf(f, special("l", '2'), special("dir/", '5'), special("p", '6')), uint8(2))
	f.Add(make([]byte, 4096), uint8(1))
	f.Add([]byte{}, uint8(1))
	f.Fuzz(func(t *testing.T, raw []byte, workers uint8) {
		blob, e, err := encode(t, raw, int(workers%4))
		if err != nil {
			return
		}
		replays(t, blob, e, raw)
	})
}
