package chunkedtest

import (
	"bytes"
	"encoding/json"
	"io"
	"slices"
	"strings"

	"github.com/klauspost/compress/zstd"
	"github.com/opencontainers/go-digest"

	"github.com/daxfs/daxfs-snapshotter/converter/chunked"
)

// SegmentLie is the one layer in Lies that yields a tar; only the digest proves that tar wrong.
const SegmentLie = "split: segment"

// Lies are layers that contradict themselves, their blobs or their diff IDs. The tar must have five
// files with contents, the first and the last of them with at most one other entry before or after it.
func Lies() map[string]Options {
	const weak = "md5:d41d8cd98f00b204e9800998ecf8427e"
	return map[string]Options{
		"digest of a file":    {TOC: first(func(e *chunked.Entry) { e.Digest = digest.FromString("other") })},
		"no digest":           {TOC: first(func(e *chunked.Entry) { e.Digest = "" })},
		"weak digest":         {TOC: first(func(e *chunked.Entry) { e.Digest = weak })},
		"size":                {TOC: first(func(e *chunked.Entry) { e.Size++ })},
		"negative size":       {TOC: first(func(e *chunked.Entry) { e.Size = -1 })},
		"large size":          {TOC: first(func(e *chunked.Entry) { e.Size = 1 << 62 })},
		"offset":              {TOC: first(func(e *chunked.Entry) { e.Offset++ })},
		"offset outside":      {TOC: first(func(e *chunked.Entry) { e.Offset, e.EndOffset = 1<<40, 1<<40+1 })},
		"negative offset":     {TOC: first(func(e *chunked.Entry) { e.Offset = -5 })},
		"end before begin":    {TOC: first(func(e *chunked.Entry) { e.EndOffset = e.Offset - 1 })},
		"frames of the table": {TOC: first(func(e *chunked.Entry) { e.EndOffset = 1 << 20 })},
		"chunk of no file":    {TOC: first(func(e *chunked.Entry) { e.Type = chunked.TypeChunk })},
		"unknown type":        {TOC: first(func(e *chunked.Entry) { e.Type = "door" })},
		"name":                {TOC: first(func(e *chunked.Entry) { e.Name = "./etc/passwd" })},
		"version":             {TOC: func(t *chunked.TOC) { t.Version = 2 }},
		"no tar-split":        {TOC: func(t *chunked.TOC) { t.TarSplitDigest = "" }},
		"other tar-split":     {TOC: func(t *chunked.TOC) { t.TarSplitDigest = digest.FromString("other") }},
		"overlap": {TOC: func(t *chunked.TOC) {
			for i := range t.Entries {
				if t.Entries[i].Digest != "" {
					t.Entries[i].Offset, t.Entries[i].EndOffset = t.Entries[1].Offset, t.Entries[1].EndOffset
				}
			}
		}},
		"files exchanged": {TOC: func(t *chunked.TOC) { t.Entries[1], t.Entries[2] = t.Entries[2], t.Entries[1] }},
		"file left out":   {TOC: func(t *chunked.TOC) { t.Entries = slices.Delete(t.Entries, 3, 4) }},
		"file too many":   {TOC: func(t *chunked.TOC) { t.Entries = append(t.Entries, t.Entries[len(t.Entries)-2]) }},
		"bomb":            {Frame: bomb()},
		"no frame":        {Frame: func(_ string, b []byte) []byte { return bytes.Repeat([]byte{7}, len(b)) }},
		"split: name":     {Split: lines(func(e *SplitEntry) { e.Name = strings.ToUpper(e.Name) })},
		"split: size":     {Split: lines(func(e *SplitEntry) { e.Size = min(e.Size, 5) })},
		SegmentLie:        {Split: lines(func(e *SplitEntry) { e.Payload = bytes.ToUpper(e.Payload) })},
		"split: type":     {Split: lines(func(e *SplitEntry) { e.Type += 7 })},
		"split: no JSON":  {Split: func(l [][]byte) [][]byte { return [][]byte{[]byte("split")} }},
		"split: short":    {Split: func(l [][]byte) [][]byte { return l[:len(l)/2] }},
		"split: line":     {Split: func(l [][]byte) [][]byte { return [][]byte{bytes.Repeat([]byte("x"), 20<<20)} }},
	}
}

// first changes the first entry with contents in a table.
func first(change func(*chunked.Entry)) func(*chunked.TOC) {
	return func(t *chunked.TOC) {
		change(&t.Entries[slices.IndexFunc(t.Entries, func(e chunked.Entry) bool { return e.Digest != "" })])
	}
}

// lines changes each line of tar-split.
func lines(change func(*SplitEntry)) func([][]byte) [][]byte {
	return func(all [][]byte) [][]byte {
		for i := range all {
			var e SplitEntry
			if err := json.Unmarshal(all[i], &e); err != nil {
				panic(err)
			}
			change(&e)
			all[i], _ = json.Marshal(e)
		}
		return all
	}
}

// bomb makes the first frame decompress to a gigabyte.
func bomb() func(string, []byte) []byte {
	thrown := false
	return func(_ string, frame []byte) []byte {
		if thrown {
			return frame
		}
		thrown = true
		var b bytes.Buffer
		w, err := zstd.NewWriter(&b)
		if err == nil {
			_, err = io.CopyN(w, zero{}, 1<<30)
		}
		if err == nil {
			err = w.Close()
		}
		if err != nil {
			panic(err)
		}
		return b.Bytes()
	}
}

type zero struct{}

func (zero) Read(p []byte) (int, error) { clear(p); return len(p), nil }
