package main

import (
	"fmt"

	v1 "github.com/google/go-containerregistry/pkg/v1"

	"github.com/daxfs/daxfs-snapshotter/integration/testimage"
)

// imageNames are the repositories of the two images.
var imageNames = [2]string{"web", "jobs"}

// readyFile is what the program writes, below the root of its container, when it has loaded everything.
const readyFile = "tmp/ready"

// program loads what a service would, then waits. Modules that a minimal Python has not got are left out.
const program = `import sys, time, importlib
for name in ("json asyncio decimal email.message http.server logging.config xml.dom.minidom unittest argparse ctypes "
             "sqlite3 ssl zipfile typing dataclasses concurrent.futures urllib.request").split():
    try:
        importlib.import_module(name)
    except ImportError:
        pass
open("/` + readyFile + `", "w").write(%q)
while True:
    time.sleep(1000)
`

// makeImages builds two images that hold the same Python, with this machine's files: in a layer above busybox in the
// first, together with busybox and a package in the only base layer of the second. So they share files but no layer,
// as images that were built on different days do.
func makeImages() (images [2]v1.Image, err error) {
	base, err := testimage.Busybox()
	if err != nil {
		return images, err
	}
	python, err := testimage.PythonLayer()
	if err != nil {
		return images, err
	}
	app := func(i int) []testimage.Entry {
		return []testimage.Entry{
			testimage.Dir("app", 0o755),
			testimage.File("app/main.py", 0o644, fmt.Appendf(nil, program, imageNames[i])),
			testimage.File("app/data.bin", 0o644, testimage.Noise(uint64(i), 3<<20)),
		}
	}
	if images[0], err = testimage.Image(base, python, app(0)); err != nil {
		return images, err
	}
	both := append(append(base[:len(base):len(base)], python...), testimage.SmallFiles(400, 7)...)
	images[1], err = testimage.Image(both, app(1))
	return images, err
}
