package testimage

import (
	"fmt"

	v1 "github.com/google/go-containerregistry/pkg/v1"
)

// TwinReady is the file that a twin's program writes, below the container's root, when everything is loaded.
const TwinReady = "tmp/ready"

// twinProgram loads the modules of a typical service, then waits. It skips modules that a minimal Python lacks.
const twinProgram = `import sys, time, importlib
for name in ("json asyncio decimal email.message http.server logging.config xml.dom.minidom unittest argparse ctypes "
             "sqlite3 ssl zipfile typing dataclasses concurrent.futures urllib.request").split():
    try:
        importlib.import_module(name)
    except ImportError:
        pass
open("/` + TwinReady + `", "w").write(%q)
while True:
    time.sleep(1000)
`

// Twins are two images with the same Python, from this machine's files, and without a common layer: in
// the first, Python is a layer above busybox; in the second, it is in one base layer with busybox and
// a package. Images built on different days share files in this way. Both have a Python program
// /app/main.py, which writes TwinReady.
func Twins() (web, jobs v1.Image, err error) {
	base, err := Busybox()
	if err != nil {
		return nil, nil, err
	}
	python, err := PythonLayer()
	if err != nil {
		return nil, nil, err
	}
	app := func(name string, seed uint64) []Entry {
		return []Entry{
			Dir("app", 0o755),
			File("app/main.py", 0o644, fmt.Appendf(nil, twinProgram, name)),
			File("app/data.bin", 0o644, Noise(seed, 3<<20)),
		}
	}
	if web, err = Image(base, python, app("web", 1)); err != nil {
		return nil, nil, err
	}
	both := append(append(base[:len(base):len(base)], python...), SmallFiles(400, 7)...)
	jobs, err = Image(both, app("jobs", 2))
	return web, jobs, err
}
