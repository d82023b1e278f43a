package clientsuite

import (
	"runtime"
	"testing"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/types"

	. "github.com/daxfs/daxfs-snapshotter/integration/testimage"
)

// The accounts in the images that containerd's tests use by name or number.
const (
	passwd = "root:x:0:0:root:/root:/bin/sh\nsys:x:3:3:sys:/dev:/bin/false\n" +
		"www-data:x:33:33::/var/www:/bin/false\nbackup:x:34:34::/:/bin/false\n"
	group = "root:x:0:\nsys:x:3:\nwww-data:x:33:\nbackup:x:34:\n"
)

// pushImages uploads stand-ins for images of containerd's tests; those of other platforms are only fetched.
func pushImages(t *testing.T, u *upstream) {
	t.Helper()
	base, err := Busybox()
	if err != nil {
		t.Fatal(err)
	}
	users := []Entry{
		Dir("etc", 0o755), File("etc/passwd", 0o644, []byte(passwd)), File("etc/group", 0o644, []byte(group)),
		// Debian's nc ignores SIGTERM when it is a container's first process.
		Dir("bin", 0o755),
		File("bin/nc", 0o755, []byte("#!/bin/sh\ntrap 'exit 143' TERM\nbusybox nc \"$@\" &\nwait $!\n")),
	}
	for reference, layers := range map[string][][]Entry{
		"ghcr.io/containerd/busybox:1.36":                {users},
		"registry.k8s.io/e2e-test-images/busybox:1.29-2": {users},
		"registry.k8s.io/pause:3.10.2":                   {{File("pause", 0o755, []byte("3.10.2"))}},
		"registry.k8s.io/pause:3.6":                      {{File("pause", 0o755, []byte("3.6"))}},
		// Three more layers, so that several may be unpacked at once.
		"ghcr.io/containerd/volume-copy-up:2.2": {
			users,
			{Dir("test_dir", 0o755), File("test_dir/test_file", 0o644, []byte("test_content\n"))},
			{
				Dir("C:", 0o755), Dir("C:/weird_test_dir", 0o755),
				File("C:/weird_test_dir/weird_test_file", 0o644, []byte("test_content\n")),
			},
			{
				Dir(":colon_prefixed", 0o755),
				File(":colon_prefixed/colon_prefixed_file", 0o644, []byte("test_content\n")),
			},
		},
		// A larger distribution than busybox: the tests run bash and inspect a set-user-ID program.
		"ghcr.io/containerd/volume-ownership:2.1": {
			users,
			{
				File("bin/bash", 0o755, []byte("#!/bin/sh\nexec /bin/sh \"$@\"\n")),
				File("usr/bin/passwd", 0o4755, []byte("#!/bin/sh\n")),
				Dir("test_dir", 0o755).Owned(65534, 65534),
			},
		},
	} {
		u.push(t, reference, multiPlatform(t, reference, append([][]Entry{base}, layers...)))
	}
}

// multiPlatform is an index of images for several platforms. No two of them, under the same or another
// name, share layers, so fetching one does not fetch part of another.
func multiPlatform(t *testing.T, reference string, layers [][]Entry) v1.ImageIndex {
	t.Helper()
	var index v1.ImageIndex = mutate.IndexMediaType(empty.Index, types.OCIImageIndex)
	for _, p := range []v1.Platform{
		{OS: "linux", Architecture: "amd64"},
		{OS: "linux", Architecture: "arm64", Variant: "v8"},
		{OS: "linux", Architecture: "ppc64le"},
		{OS: "linux", Architecture: "s390x"},
	} {
		content := [][]Entry{{File("platform", 0o644, []byte(reference+" for "+p.Architecture+"\n"))}}
		if p.Architecture == runtime.GOARCH {
			content = append(layers, content...)
		}
		img, err := Image(content...)
		if err != nil {
			t.Fatal(err)
		}
		config, err := img.ConfigFile()
		if err != nil {
			t.Fatal(err)
		}
		config = config.DeepCopy()
		config.Architecture, config.Variant = p.Architecture, p.Variant
		if img, err = mutate.ConfigFile(img, config); err != nil {
			t.Fatal(err)
		}
		index = mutate.AppendManifests(index, mutate.IndexAddendum{Add: img, Descriptor: v1.Descriptor{Platform: &p}})
	}
	return index
}
