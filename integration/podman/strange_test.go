package podman

import (
	"archive/tar"
	"bytes"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/klauspost/compress/zstd"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"go.podman.io/storage"
	"golang.org/x/sys/unix"

	"github.com/daxfs/daxfs-snapshotter/converter/chunked"
)

// header makes a tar header without archive/tar, which refuses such ones. change edits the block before the checksum.
func header(name string, typeflag byte, size int, change func([]byte)) []byte {
	b := make([]byte, 512)
	copy(b, name)
	copy(b[100:], "0000644\x000000000\x000000000\x00")
	copy(b[124:], fmt.Sprintf("%011o\x0014524777777\x00", size))
	b[156] = typeflag
	copy(b[257:], "ustar\x0000")
	if change != nil {
		change(b)
	}
	copy(b[148:], "        ")
	sum := 0
	for _, c := range b {
		sum += int(c)
	}
	copy(b[148:], fmt.Sprintf("%06o\x00 ", sum))
	return b
}

// member is a header with contents.
func member(name string, typeflag byte, body []byte, change func([]byte)) []byte {
	b := append(header(name, typeflag, len(body), change), body...)
	return append(b, make([]byte, -len(b)&511)...)
}

// records encodes PAX records.
func records(all ...string) []byte {
	var b bytes.Buffer
	for _, r := range all {
		n := len(r) + 3
		for len(fmt.Sprint(n))+len(r)+2 != n {
			n++
			if n > len(r)+20 {
				n = len(r) + 2
			}
		}
		fmt.Fprintf(&b, "%d %s\n", n, r)
	}
	return b.Bytes()
}

var end = make([]byte, 1024)

// strange are unusual tars, made by hand where archive/tar cannot write them.
func strange(t *testing.T) map[string][]byte {
	made := func(all ...entry) []byte {
		raw := rawTar(t, all)
		return raw[:len(raw)-10<<10]
	}
	file := func(name, body string) entry { return entry{tar.Header{Name: name, Mode: 0o644}, []byte(body)} }
	dir := func(name string) entry { return entry{tar.Header{Typeflag: tar.TypeDir, Name: name, Mode: 0o755}, nil} }
	link := func(name, to string) entry {
		return entry{tar.Header{Typeflag: tar.TypeLink, Name: name, Linkname: to, Mode: 0o644}, nil}
	}
	symlink := func(name, to string) entry {
		return entry{tar.Header{Typeflag: tar.TypeSymlink, Name: name, Linkname: to, Mode: 0o777}, nil}
	}
	var many []entry
	for i := range 500 {
		many = append(many, file(fmt.Sprintf("empty-%d", i), ""))
	}
	deep := []entry{dir(strings.Repeat("n", 255))}
	for i := range 100 {
		deep = append(deep, dir(strings.Repeat("dir/", i+1)))
	}
	var xattrs []entry
	for i := range 20 {
		all := map[string]string{}
		for j := range i {
			all[fmt.Sprintf("SCHILY.xattr.user.n%d", j)] = string(noise(i * 10))
		}
		all["SCHILY.xattr.user.empty"] = ""
		all["LIBARCHIVE.xattr.user.other"] = "b3RoZXI"
		xattrs = append(xattrs, entry{tar.Header{Name: fmt.Sprint("x", i), Mode: 0o644, PAXRecords: all}, []byte("x")})
	}
	one := member("f", '0', []byte("f"), nil)
	oneWith := func(change func([]byte)) []byte { return append(member("f", '0', []byte("f"), change), end...) }
	pax := func(all ...string) []byte { return member("p", 'x', records(all...), nil) }
	join := slices.Concat[[]byte]
	times := func(s string) []byte {
		return join(pax("mtime="+s, "atime="+s), one, end)
	}
	return map[string][]byte{
		"nothing":                   nil,
		"zeros":                     end,
		"one block":                 end[:512],
		"many zeros":                make([]byte, 3<<20),
		"no end":                    one,
		"half an end":               join(one, end[:512]),
		"odd end":                   join(one, end[:700]),
		"no padding":                one[:513],
		"trailing tar":              join(made(file("a", "1")), made(file("b", "2"))),
		"padding that is not zero":  join(one[:513], bytes.Repeat([]byte{7}, 511), end),
		"empty files":               made(many...),
		"one large file":            made(entry{tar.Header{Name: "large", Mode: 0o644}, noise(20 << 20)}),
		"large zeros":               made(entry{tar.Header{Name: "large", Mode: 0o644}, make([]byte, 40<<20)}),
		"hard link before target":   made(link("link", "target"), file("target", "contents")),
		"hard link to nothing":      made(link("link", "target")),
		"hard link to itself":       made(link("link", "link")),
		"hard link to a hard link":  made(file("a", "1"), link("b", "a"), link("c", "b")),
		"hard link to a symlink":    made(symlink("s", "nowhere"), link("h", "s")),
		"same name twice":           made(file("a", "1"), file("a", "2")),
		"same name, other kind":     made(file("a", "1"), symlink("a", "b")),
		"same name with dots":       made(file("a", "1"), file("./b/../a", "2")),
		"same name, absolute":       made(file("a", "1"), file("/a", "2")),
		"same name, absolute empty": made(file("a", ""), file("/a", "")),
		"same name, above":          made(file("a", "1"), file("../a", "2")),
		"same file by a symlink":    made(dir("d"), symlink("s", "d"), file("d/f", "1"), file("s/f", "2")),
		"below a symlink":           made(dir("d"), symlink("s", "d"), file("s/f", "2")),
		"symlink over a directory":  made(file("s/f", "1"), symlink("s", "d"), dir("d")),
		"only absolute":             made(dir("/a"), file("/a/b", "1"), link("/c", "/a/b"), symlink("/d", "/a")),
		"only above":                made(file("../../up", "1")),
		"root":                      made(dir("/"), file("a", "1")),
		"dot":                       made(dir("."), file("a", "1")),
		"file below nothing":        made(file("a/b/c/d", "1")),
		"file below a file":         made(file("a", ""), file("a/b", "")),
		"directory behind its file": made(file("d/f", "1"), file("d/e", ""), dir("d")),
		"whiteouts": made(dir("d"), file("d/.wh.gone", ""), file("d/.wh..wh..opq", ""),
			file("d/f", "1")),
		"whiteout with contents":  made(dir("d"), file("d/.wh.gone", "contents"), file("d/f", "1")),
		"opaque with contents":    made(dir("d"), file("d/.wh..wh..opq", "contents"), file("d/f", "1")),
		"whiteout by a link":      made(dir("d"), file("d/f", "1"), link("d/.wh.gone", "d/f")),
		"whiteout by a directory": made(dir("d"), dir("d/.wh.gone")),
		"whiteout by a symlink":   made(dir("d"), symlink("d/.wh.gone", "x")),
		"odd whiteout":            made(file(".wh.", ""), dir("d"), file("d/.wh..wh.plnk", "")),
		"devices": made(entry{tar.Header{Typeflag: tar.TypeChar, Name: "c", Devmajor: 1, Devminor: 3}, nil},
			entry{tar.Header{Typeflag: tar.TypeBlock, Name: "b", Devmajor: 4095, Devminor: 1 << 19}, nil},
			entry{tar.Header{Typeflag: tar.TypeFifo, Name: "p"}, nil}),
		"attributes": made(xattrs...),
		"long names": made(append(deep,
			file(strings.Repeat("dir/", 100)+"f", "2"), symlink("s", strings.Repeat("t", 4000)))...),
		"odd names": made(
			file("a\nb", "1"), file("a\tb\"\\<>&\u2028", "2"), dir("👻"), file("👻/ä", "3"), file(" ", "4"),
			file("...", "5"),
		),
		"no name":         join(member("", '0', []byte("f"), nil), end),
		"name of a slash": join(member("/", '0', []byte("f"), nil), end),
		"file with slash": join(member("f/", '0', []byte("f"), nil), end),
		"old file":        join(member("f", 0, []byte("f"), nil), member("d/", 0, nil, nil), end),
		"contiguous":      join(member("f", '7', []byte("f"), nil), end),
		"V7":              oneWith(func(b []byte) { clear(b[257:]) }),
		"size of 256": oneWith(func(b []byte) {
			copy(b[124:],
				"\x80\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x01")
		}),
		"negative size": oneWith(func(b []byte) {
			copy(b[124:],
				"\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xfe")
		}),
		"size of PAX":      join(pax("size=3"), member("f", '0', []byte("abc"), nil), end),
		"size of PAX lies": join(pax("size=300"), member("f", '0', []byte("abc"), nil), end),
		"dir with a size":  join(header("d/", '5', 512, nil), end),
		"mode":             oneWith(func(b []byte) { copy(b[100:], "0177777\x00") }),
		"owner":            oneWith(func(b []byte) { copy(b[108:], "\x80\x00\x00\x00\x00\x01\x00\x00") }),
		"global header":    join(member("g", 'g', records("comment=x"), nil), one, end),
		"PAX twice":        join(pax("path=a"), pax("path=b"), one, end),
		"PAX of nothing":   join(pax("path=a"), end),
		"PAX and GNU":      join(pax("path=a"), member("././@LongLink", 'L', []byte("gnu\x00"), nil), one, end),
		"large PAX":        join(pax("comment="+strings.Repeat("x", 1000_000)), one, end),
		"too large PAX":    join(pax("comment="+strings.Repeat("x", 2000_000)), one, end),
		"many large PAX": join(bytes.Repeat(pax("comment="+strings.Repeat("x", 1000_000)), 12),
			one, end),
		"PAX name with NUL":     join(pax("path=a\x00b"), one, end),
		"PAX attribute, NUL":    join(pax("SCHILY.xattr.user.a=\x00b\xff"), one, end),
		"PAX attribute, no key": join(pax("SCHILY.xattr.=b"), one, end),
		"PAX attribute, Latin":  join(pax("SCHILY.xattr.user.\xfc=b"), one, end),
		"PAX name, Latin":       join(pax("path=\xfc"), one, end),
		"PAX link, Latin":       join(pax("linkpath=\xfc"), member("f", '2', nil, nil), end),
		"PAX owner, Latin":      join(pax("uname=\xfc", "gname=\xfc"), one, end),
		"name, Latin":           join(member("\xfc", '0', []byte("f"), nil), end),
		"time of 1950":          times("-600000000"),
		"time of year 0":        times("-70000000000"),
		"time of year 12000":    times("320000000000"),
		"time, nanoseconds":     times("1700000000.123456789"),
		"time, digits":          times("1700000000.12345678912345"),
		"sparse of GNU":         join(member("f", 'S', []byte("f"), nil), end),
		"sparse, unknown":       join(pax("GNU.sparse.major=2", "GNU.sparse.minor=0"), one, end),
		"sparse 0.1": join(pax("GNU.sparse.map=0,1", "GNU.sparse.size=900", "GNU.sparse.numblocks=1"),
			one, end),
		"garbage":   noise(10_000),
		"after end": join(one, end, []byte("garbage")),
		"checksum":  bytes.Replace(join(one, end), []byte("0000644"), []byte("0000645"), 1),
	}
}

// refused are those of strange that a table of contents cannot represent, or that containers/storage,
// if it accepts them, unpacks differently by files than as a whole.
var refused = []string{
	"PAX attribute, Latin", "PAX link, Latin", "PAX name with NUL", "PAX name, Latin", "after end",
	"below a symlink", "checksum", "contiguous", "dir with a size", "directory behind its file",
	"file below a file", "file below nothing", "file with slash", "garbage", "global header",
	"many large PAX", "name of a slash", "name, Latin", "negative size", "nothing", "odd end",
	"only above", "opaque with contents", "same file by a symlink", "same name twice",
	"same name with dots", "same name, above", "same name, absolute", "same name, absolute empty",
	"same name, other kind", "sparse 0.1", "sparse of GNU", "sparse, unknown",
	"symlink over a directory", "time of year 0", "time of year 12000", "too large PAX",
	"trailing tar", "whiteout with contents",
}

// Each tar of a layer is either refused, or our encoding gives it to every reader: to a decompressor,
// to our reader, with existing files and without, and to containers/storage, which makes the same tree
// of it by files and as a whole. For tars that containers/storage cannot read at all, there is no such comparison.
func TestStrange(t *testing.T) {
	s := newStorage(t)
	all := strange(t)
	for _, name := range slices.Sorted(maps.Keys(all)) {
		t.Run(name, func(t *testing.T) {
			raw := all[name]
			var stored bytes.Buffer
			e, err := chunked.Encode(t.Context(), &stored, bytes.NewReader(raw), 1)
			if slices.Contains(refused, name) {
				if !errors.Is(err, chunked.ErrUnsuitable) {
					t.Errorf("error %v, expected that it is not suitable", err)
				}
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			var again bytes.Buffer
			_, err = chunked.Encode(t.Context(), &again, bytes.NewReader(raw), 8)
			if err != nil || !bytes.Equal(again.Bytes(), stored.Bytes()) {
				t.Errorf("8 workers: %v, or other bytes than with 1", err)
			}
			z, err := zstd.NewReader(bytes.NewReader(stored.Bytes()))
			if err != nil {
				t.Fatal(err)
			}
			defer z.Close()
			if got, err := io.ReadAll(z); err != nil || !bytes.Equal(got, raw) {
				t.Fatalf("decompressed: %d bytes, %v, expected %d", len(got), err, len(raw))
			}
			some := contents{sha256.Sum256([]byte("f")): []byte("f"), sha256.Sum256([]byte("1")): []byte("1")}
			for _, have := range []contents{{}, some} {
				if got, err := readByFiles(t, stored.Bytes(), e, have); err != nil || !bytes.Equal(got, raw) {
					t.Fatalf("our reader: %d bytes, %v, expected %d", len(got), err, len(raw))
				}
			}
			full := "full " + name
			_, _, plainErr := s.PutLayer("plain "+name, "", nil, "", false, nil, bytes.NewReader(raw))
			_, _, fullErr := s.PutLayer(full, "", nil, "", false, nil, bytes.NewReader(stored.Bytes()))
			if (fullErr == nil) != (plainErr == nil) {
				t.Fatalf("containers/storage reads it: %v; the tar as it is: %v", fullErr, plainErr)
			}
			if plainErr != nil {
				t.Logf("containers/storage does not read the tar: %v", plainErr)
				return
			}
			partial(t, s, "partial "+name, stored.Bytes(), e)
			whole, byFiles := treeOf(t, s, full), treeOf(t, s, "partial "+name)
			for path, line := range whole {
				if byFiles[path] != line {
					t.Errorf("%.100q by files is %.300q, as a whole %.300q", path, byFiles[path], line)
				}
			}
			for path, line := range byFiles {
				if whole[path] == "" {
					t.Errorf("%.100q by files is %.300q, as a whole nothing", path, line)
				}
			}
		})
	}
}

func readByFiles(t *testing.T, stored []byte, e *chunked.Encoded, have contents) ([]byte, error) {
	t.Helper()
	layout, err := chunked.ParseLayout(ocispec.Descriptor{Size: e.Size, Annotations: e.Annotations})
	if err != nil {
		return nil, err
	}
	src := &blob{b: stored}
	tables, err := chunked.ReadTables(t.Context(), src, layout)
	if err != nil {
		return nil, err
	}
	r, err := chunked.NewPlan(tables, have).Tar(t.Context(), src, chunked.Options{SpoolDir: t.TempDir()})
	if err != nil {
		return nil, err
	}
	defer r.Close()
	return io.ReadAll(r)
}

// treeOf lists a layer without devices and FIFOs: containers/storage makes none when it pulls by files.
func treeOf(t *testing.T, s storage.Store, id string) map[string]string {
	t.Helper()
	root := filepath.Join(s.GraphRoot(), "overlay", id, "diff")
	tree := map[string]string{}
	err := filepath.WalkDir(root, func(path string, _ fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		var st unix.Stat_t
		if err := unix.Lstat(path, &st); err != nil {
			return err
		}
		line := fmt.Sprintf("mode %o owner %d:%d", st.Mode, st.Uid, st.Gid)
		switch st.Mode & unix.S_IFMT {
		case unix.S_IFREG:
			// A full pull clamps times before 1970.
			line += fmt.Sprintf(" time %d.%09d links %d", max(st.Mtim.Sec, 0), st.Mtim.Nsec, st.Nlink)
			b, err := os.ReadFile(path)
			if err != nil {
				return err
			}
			line += fmt.Sprintf(" %d bytes %s", len(b), digest.FromBytes(b))
		case unix.S_IFLNK:
			to, err := os.Readlink(path)
			if err != nil {
				return err
			}
			line += " to " + to
		case unix.S_IFCHR, unix.S_IFBLK, unix.S_IFIFO:
			if st.Rdev != 0 || st.Mode&unix.S_IFMT == unix.S_IFIFO { // 0:0 is a whiteout
				return nil
			}
		}
		names := make([]byte, 8<<10)
		n, err := unix.Llistxattr(path, names)
		if err != nil {
			return err
		}
		for _, name := range slices.Sorted(strings.SplitSeq(string(names[:n]), "\x00")) {
			if name == "" {
				continue
			}
			value := make([]byte, 64<<10)
			n, err := unix.Lgetxattr(path, name, value)
			if err != nil {
				return err
			}
			line += fmt.Sprintf(" %s=%q", name, value[:n])
		}
		rel, err := filepath.Rel(root, path)
		tree[rel] = line
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return tree
}
