package source

import (
	"archive/tar"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path"
	"strings"

	"github.com/daxfs/daxfs-snapshotter/converter/blob"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// member is the place of a file in a tar archive.
type member struct {
	off, size int64
	links     []string // the members it may link to, the likely one first; nil for a file
	sparse    bool     // its contents are not contiguous
}

// key normalizes the name of a member: tar -P writes absolute names, other tools a leading "./".
func key(name string) string { return strings.TrimPrefix(path.Clean("/"+name), "/") }

// archive is a tar file with an index, so that its members can be read concurrently and in any order.
type archive struct {
	f       *os.File
	members map[string]member
}

// openArchive indexes a tar. It decompresses a compressed one into an unnamed temporary file of at
// most limit bytes, because members are not read in their order.
func openArchive(ctx context.Context, file string, limit int64) (*archive, error) {
	if limit <= 0 {
		limit = DefaultMaxSize
	}
	if fi, err := os.Stat(file); err == nil && fi.IsDir() {
		return nil, fmt.Errorf("%q is a directory, expected a tar file (for a layout in a directory: oci:DIR)", file)
	} else if err == nil && !fi.Mode().IsRegular() {
		return nil,
			fmt.Errorf("%q is not a regular file: members of an archive are not read in the order in which they lie, "+
				"so it has to be saved to a file first", file)
	}
	f, err := os.Open(file)
	if err != nil {
		return nil, err
	}
	a := &archive{f: f}
	if err := a.inflate(ctx, limit); err != nil {
		a.f.Close()
		return nil, fmt.Errorf("%q: %w", file, err)
	}
	if err := a.index(ctx); err != nil {
		defer a.f.Close()
		if other := a.looksLike(); other != "" {
			return nil,
				fmt.Errorf("%q is compressed with %s, expected a tar archive, plain or compressed with gzip or zstd",
					file, other)
		}
		return nil,
			fmt.Errorf("%q is not a tar archive that can be read, plain or compressed with gzip or zstd: %w", file, err)
	}
	return a, nil
}

func (a *archive) inflate(ctx context.Context, limit int64) error {
	head := make([]byte, 4)
	n, err := a.f.ReadAt(head, 0)
	if err != nil && !errors.Is(err, io.EOF) {
		return err
	}
	if !blob.IsCompressed(head[:n]) {
		return nil
	}
	r, err := blob.NewReader(ctx, a.f, blob.Spec{MaxSize: limit})
	if err != nil {
		return err
	}
	defer r.Close() // also closes the file
	tmp, err := os.CreateTemp("", "daxfs-archive-*")
	if err != nil {
		return err
	}
	os.Remove(tmp.Name())
	_, err = io.Copy(tmp, r)
	if err = r.Finish(err); err == nil {
		_, err = tmp.Seek(0, io.SeekStart)
	}
	if err != nil {
		tmp.Close()
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		return err
	}
	a.f = tmp
	return nil
}

// looksLike returns the apparent compression of a file that is not a tar.
func (a *archive) looksLike() string {
	head := make([]byte, blob.HeadSize)
	n, _ := a.f.ReadAt(head, 0)
	return blob.LooksLike(head[:n])
}

// maxMembers bounds the members of an archive: each takes memory, and images have a few for each layer.
const maxMembers = 1 << 20

// index records the place of every member. The tar reader does not read beyond a header and skips by
// seeking, so the file's position is the start of the contents.
func (a *archive) index(ctx context.Context) error {
	a.members = map[string]member{}
	tr := tar.NewReader(a.f)
	for n := 0; ; n++ {
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		if n == maxMembers {
			return fmt.Errorf("more than %d members", maxMembers)
		}
		h, err := tr.Next()
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return err
		}
		m := member{size: h.Size, sparse: h.Typeflag == tar.TypeGNUSparse}
		for record := range h.PAXRecords {
			m.sparse = m.sparse || strings.HasPrefix(record, "GNU.sparse.")
		}
		switch h.Typeflag {
		case tar.TypeReg, tar.TypeCont, tar.TypeGNUSparse:
			if m.off, err = a.f.Seek(0, io.SeekCurrent); err != nil {
				return err
			}
		case tar.TypeLink:
			m.links = []string{key(h.Linkname)}
		case tar.TypeSymlink:
			// Old versions of docker save wrote a layer once and linked to it. Other tools write the target
			// relative to the archive's root.
			m.links = []string{key(h.Linkname)}
			if !path.IsAbs(h.Linkname) {
				m.links = []string{key(path.Join(path.Dir(key(h.Name)), h.Linkname)), key(h.Linkname)}
			}
		default:
			continue
		}
		a.members[key(h.Name)] = m
	}
}

// errNoMember reports a name that is not in the archive.
var errNoMember = errors.New("is not in the archive")

func (a *archive) reader(name string) (*io.SectionReader, error) {
	steps := 64
	m, ok := a.find(key(name), &steps)
	if !ok {
		return nil, fmt.Errorf("%q %w", name, errNoMember)
	}
	if m.sparse {
		return nil, fmt.Errorf("%q has holes, expected an archive that was written without tar --sparse", name)
	}
	return io.NewSectionReader(a.f, m.off, m.size), nil
}

// find returns the file at a name. It follows links to files and directories, at most steps of them.
func (a *archive) find(name string, steps *int) (member, bool) {
	const maxName, maxDepth = 4096, 32
	if *steps--; *steps < 0 || len(name) > maxName {
		return member{}, false
	}
	m, ok := a.members[name]
	if ok && m.links == nil {
		return m, true
	}
	rest := ""
	for depth, i := 0, 0; !ok && depth < maxDepth; depth++ { // a parent directory may be a link
		n := strings.IndexByte(name[i:], '/')
		if n < 0 {
			break
		}
		if m, ok = a.members[name[:i+n]]; ok {
			rest = name[i+n:]
		}
		i += n + 1
	}
	for _, l := range m.links {
		if file, ok := a.find(key(l+rest), steps); ok {
			return file, true
		}
	}
	return member{}, false
}

func (a *archive) document(name string) ([]byte, error) {
	r, err := a.reader(name)
	if err != nil {
		return nil, err
	}
	if r.Size() > maxDocument {
		return nil, fmt.Errorf("%q: %d bytes, expected at most %d", name, r.Size(), maxDocument)
	}
	return io.ReadAll(r)
}

func (a *archive) open(_ context.Context, d ocispec.Descriptor) (io.ReadCloser, error) {
	if err := d.Digest.Validate(); err != nil {
		return nil, fmt.Errorf("digest %q: %w", d.Digest, err)
	}
	r, err := a.reader(path.Join(ocispec.ImageBlobsDir, d.Digest.Algorithm().String(), d.Digest.Encoded()))
	if err != nil {
		return nil, fmt.Errorf("blob %s: %w", d.Digest, err)
	}
	return io.NopCloser(r), nil
}

type ociArchive struct {
	name, file, tag string
	limit           int64
	*archive
}

func (s *ociArchive) String() string { return s.name }

func (s *ociArchive) Close() error { return s.archive.close() }

func (a *archive) close() error {
	if a == nil {
		return nil
	}
	return a.f.Close()
}

func (s *ociArchive) Image(ctx context.Context, p Platform) (*Image, error) {
	var err error
	if s.archive == nil {
		if s.archive, err = openArchive(ctx, s.file, s.limit); err != nil {
			return nil, fmt.Errorf("%s: %w", s.name, err)
		}
	}
	doc, err := s.document(ocispec.ImageIndexFile)
	if err != nil {
		if _, inner := s.reader(dockerManifestFile); inner == nil {
			err = fmt.Errorf("%w (it has a %s: docker-archive:FILE reads it)", err, dockerManifestFile)
		}
		return nil, fmt.Errorf("%s: not an OCI archive: %w", s.name, err)
	}
	img, err := fromIndexFile(ctx, bytes.NewReader(doc), s, s.tag, p)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", s.name, err)
	}
	return img, nil
}
