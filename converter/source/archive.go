package source

import (
	"archive/tar"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path"
	"strings"

	"github.com/daxfs/daxfs-snapshotter/converter/blob"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// member is where a file lies in a tar archive.
type member struct {
	off, size int64
	link      string // the member that it is a link to
	sparse    bool   // its contents are not in one piece
}

// archive is a tar file with an index, so that its members can be read in any order and concurrently.
type archive struct {
	f       *os.File
	members map[string]member
}

// openArchive indexes a tar. One that is compressed is unpacked into a temporary file without a name first, since its
// members could not be read in the order in which they are needed. It may have at most limit bytes then.
func openArchive(ctx context.Context, file string, limit int64) (*archive, error) {
	if limit <= 0 {
		limit = DefaultMaxSize
	}
	if fi, err := os.Stat(file); err == nil && fi.IsDir() {
		return nil, fmt.Errorf("%q is a directory, expected a tar file (for a layout in a directory: oci:DIR)", file)
	} else if err == nil && !fi.Mode().IsRegular() {
		return nil, fmt.Errorf("%q is not a regular file: members of an archive are not read in the order in which they lie, "+
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
		a.f.Close()
		return nil, fmt.Errorf("%q is not a tar archive that can be read, plain or compressed with gzip or zstd: %w", file, err)
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
	defer r.Close() // and with it the file
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

// maxMembers bounds the members of an archive: each takes memory, and images have a few for each layer.
const maxMembers = 1 << 20

// index notes where every member lies. The tar reader does not read ahead of a header, and skips by seeking, so that
// the file's position is where the contents begin.
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
		case tar.TypeReg, tar.TypeGNUSparse:
			if m.off, err = a.f.Seek(0, io.SeekCurrent); err != nil {
				return err
			}
		case tar.TypeLink:
			m.link = path.Clean(h.Linkname)
		case tar.TypeSymlink: // old versions of docker save write a layer once and link to it
			m.link = path.Join(path.Dir(path.Clean(h.Name)), h.Linkname)
		default:
			continue
		}
		a.members[path.Clean(h.Name)] = m
	}
}

// errNoMember marks a name that an archive does not have.
var errNoMember = errors.New("is not in the archive")

// reader returns the contents of a member.
func (a *archive) reader(name string) (*io.SectionReader, error) {
	key := path.Clean(name)
	for range 8 {
		m, ok := a.members[key]
		if !ok {
			break
		}
		if m.sparse {
			return nil, fmt.Errorf("%q has holes, expected an archive that was written without tar --sparse", name)
		}
		if m.link == "" {
			return io.NewSectionReader(a.f, m.off, m.size), nil
		}
		key = m.link
	}
	return nil, fmt.Errorf("%q %w", name, errNoMember)
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

// ociArchive is an OCI image layout in a tar file.
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

// dockerArchive is what docker save writes: a manifest.json that names a configuration and tars of layers.
type dockerArchive struct {
	name, file, ref string
	limit           int64
	*archive
}

func (s *dockerArchive) String() string { return s.name }

func (s *dockerArchive) Close() error { return s.archive.close() }

// dockerManifestFile is the member of a docker archive that lists its images.
const dockerManifestFile = "manifest.json"

type dockerEntry struct {
	Config   string
	RepoTags []string
	Layers   []string
}

func (s *dockerArchive) Image(ctx context.Context, p Platform) (*Image, error) {
	var err error
	if s.archive == nil {
		if s.archive, err = openArchive(ctx, s.file, s.limit); err != nil {
			return nil, fmt.Errorf("%s: %w", s.name, err)
		}
	}
	img, err := s.find(p)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", s.name, err)
	}
	return img, nil
}

func (s *dockerArchive) find(p Platform) (*Image, error) {
	doc, err := s.document(dockerManifestFile)
	if err != nil {
		if _, inner := s.reader(ocispec.ImageIndexFile); inner == nil {
			err = fmt.Errorf("%w (it has an %s: oci-archive:FILE reads it)", err, ocispec.ImageIndexFile)
		}
		return nil, fmt.Errorf("not a docker archive: %w", err)
	}
	var list []dockerEntry
	if err := json.Unmarshal(doc, &list); err != nil {
		return nil, fmt.Errorf("%s: %w", dockerManifestFile, err)
	}
	e, err := pickDocker(list, s.ref)
	if err != nil {
		return nil, err
	}
	doc, err = s.document(e.Config)
	if err != nil {
		return nil, fmt.Errorf("config: %w", err)
	}
	// The name of the configuration is its digest: <hex>.json of old, blobs/sha256/<hex> now, and sha256:<hex> of crane and ko.
	hex := strings.TrimPrefix(strings.TrimSuffix(path.Base(e.Config), ".json"), "sha256:")
	want := digest.NewDigestFromEncoded(digest.SHA256, hex)
	if want.Validate() == nil {
		if err := verify(doc, ocispec.Descriptor{Digest: want}); err != nil {
			return nil, fmt.Errorf("config: %w", err)
		}
	}
	img, err := fromConfig(doc, digest.FromBytes(doc), len(e.Layers))
	if err != nil {
		return nil, err
	}
	for i, name := range e.Layers {
		r, err := s.reader(name)
		if err != nil {
			return nil, fmt.Errorf("layer %d (%s): %w", i, img.Layers[i].DiffID, err)
		}
		d := ocispec.Descriptor{Size: r.Size()}
		if hex, ok := strings.CutPrefix(path.Clean(name), "blobs/sha256/"); ok {
			d.Digest = digest.NewDigestFromEncoded(digest.SHA256, hex)
			if err := d.Digest.Validate(); err != nil {
				return nil, fmt.Errorf("layer %d: %q: %w", i, name, err)
			}
		}
		img.Layers[i].Desc = d
		img.Layers[i].Open = func(context.Context) (io.ReadCloser, error) {
			r, err := s.reader(name) // a reader of its own: a layer may occur twice
			if err != nil {
				return nil, err
			}
			return io.NopCloser(r), nil
		}
	}
	return img, p.accept(img.Platform)
}

func pickDocker(list []dockerEntry, ref string) (dockerEntry, error) {
	if ref == "" {
		if len(list) == 1 {
			return list[0], nil
		}
		return dockerEntry{}, fmt.Errorf("%w: no reference given and %d images: %s", ErrNotFound, len(list), repoTags(list))
	}
	for _, e := range list {
		for _, t := range e.RepoTags {
			if normal(t) == normal(ref) {
				return e, nil
			}
		}
	}
	return dockerEntry{}, fmt.Errorf("%w: no %q, there is: %s", ErrNotFound, ref, repoTags(list))
}

func repoTags(list []dockerEntry) string {
	var s []string
	for _, e := range list {
		for _, t := range e.RepoTags {
			s = append(s, fmt.Sprintf("%q", t))
		}
	}
	if len(s) == 0 {
		return "no tags"
	}
	return strings.Join(s, ", ")
}
