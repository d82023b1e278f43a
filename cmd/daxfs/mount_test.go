package main

import (
	"bytes"
	"encoding/json"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/daxfs/daxfs-snapshotter/mount/drivers"
)

// program builds the daxfs program, for tests that need it as a process: a FUSE server, a mount namespace.
func program(t *testing.T) string {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("mounting needs root")
	}
	if _, err := exec.LookPath("unshare"); err != nil {
		t.Skip("unshare is not installed (util-linux)")
	}
	bin := filepath.Join(t.TempDir(), "daxfs")
	if out, err := exec.Command("go", "build", "-o", bin, ".").CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	return bin
}

// inNamespace runs a shell script in a mount namespace of its own, with the program as "daxfs".
func inNamespace(t *testing.T, bin, script string) string {
	t.Helper()
	// The records of mounts in /run end with the namespace.
	script = "mount -t tmpfs none /run; " + script
	cmd := exec.Command("unshare", "--mount", "--propagation", "private", "sh", "-euc", script)
	cmd.Dir = t.TempDir()
	cmd.Env = append(os.Environ(), "PATH="+filepath.Dir(bin)+":"+os.Getenv("PATH"), "LC_ALL=C")
	var out bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &out
	if err := cmd.Run(); err != nil {
		t.Fatalf("%v\n%s", err, &out)
	}
	return out.String()
}

func TestMount(t *testing.T) {
	if testing.Short() {
		t.Skip("slow: builds both programs and starts daemons")
	}
	bin := program(t)
	for name, f := range map[string]func(*testing.T, string){
		"every driver": mountsWithEveryDriver, "foreground": mountsInForeground, "refused": mountRefuses,
		"pool": mountsFromPool, "reader": mountsAsReader, "daemon": sharesWithDaemon,
		"rm leaves what is mounted":     removeLeavesWhatIsMounted,
		"umount leaves the snapshotter": umountLeavesTheSnapshotter,
		"larger device":                 readsLargerDevice,
		"root hash":                     mountsByRootHash,
	} {
		t.Run(name, func(t *testing.T) { f(t, bin) })
	}
}

// mountsByRootHash mounts the image with a root hash, also from memory larger than the image, and no other.
func mountsByRootHash(t *testing.T, bin string) {
	out := inNamespace(t, bin, `
		mkdir tree mnt; echo hello >tree/greeting
		daxfs convert -o image rootfs:tree >/dev/null 2>&1
		hash=$(daxfs inspect image | sed -n 's/^root hash *//p')
		truncate -s 2M image
		daxfs mount --root-hash $hash image mnt 2>/dev/null
		cat mnt/greeting
		daxfs umount mnt
		printf j | dd of=image bs=1 seek=4096 conv=notrunc 2>/dev/null
		daxfs mount image mnt 2>/dev/null
		cat mnt/greeting
		daxfs umount mnt
		! daxfs mount --root-hash $hash image mnt`)
	for _, want := range []string{"hello\n", "jello\n", `rule digest-data at offset 4096, path "/greeting"`} {
		if !strings.Contains(out, want) {
			t.Errorf("no %q in\n%s", want, out)
		}
	}
}

func mountsWithEveryDriver(t *testing.T, bin string) {
	for _, driver := range []string{"auto", "erofs", "erofs-file", "erofs-loop", "fuse"} {
		t.Run(driver, func(t *testing.T) {
			out := inNamespace(t, bin, `
				mkdir tree mnt; echo hello >tree/greeting; chmod 4755 tree/greeting; ln -s greeting tree/link
				daxfs convert -o image rootfs:tree 2>/dev/null
				daxfs mount --driver `+driver+` image mnt
				cat mnt/link
				grep " $PWD/mnt " /proc/self/mountinfo
				! daxfs mount image mnt || echo mounted twice
				daxfs umount mnt
				! daxfs umount mnt || echo unmounted twice
				daxfs mount --suid --driver `+driver+` image mnt 2>/dev/null
				grep " $PWD/mnt " /proc/self/mountinfo | grep nosuid || echo setuid works
				ln -s mnt through
				daxfs umount through
				truncate -s 2M image # as memory for a virtual machine
				daxfs mount --driver `+driver+` image mnt
				sed s/hello/padded/ mnt/link
				daxfs umount mnt`)
			for _, want := range []string{
				"mounted on", "hello\n", "padded\n", "ro,nosuid,nodev", "mount point already",
				"not mounted", "setuid works",
			} {
				if !strings.Contains(out, want) {
					t.Errorf("output lacks %q:\n%s", want, out)
				}
			}
			if strings.Contains(out, "twice") {
				t.Errorf("what must fail did not:\n%s", out)
			}
		})
	}
}

func mountsInForeground(t *testing.T, bin string) {
	out := inNamespace(t, bin, `
		mkdir tree mnt; echo hello >tree/greeting
		daxfs convert -o image rootfs:tree 2>/dev/null
		daxfs mount --driver fuse --foreground image mnt & server=$!
		for i in $(seq 200); do test -e mnt/greeting && break; sleep 0.05; done
		cat mnt/greeting
		kill -USR1 $server; sleep 0.2
		kill $server; wait $server; echo status $?
		! daxfs mount --foreground image mnt`)
	for _, want := range []string{"serving on", "hello\n", `"read":1`, "status 0", "goes with --driver fuse"} {
		if !strings.Contains(out, want) {
			t.Errorf("output lacks %q:\n%s", want, out)
		}
	}
}

// Damaged images are refused before the kernel sees them.
func mountRefuses(t *testing.T, bin string) {
	out := inNamespace(t, bin, `
		mkdir tree mnt; echo hello >tree/greeting
		daxfs convert -o image rootfs:tree 2>/dev/null
		printf x | dd of=image bs=1 seek=1030 conv=notrunc 2>/dev/null
		for args in "image mnt" "/nowhere mnt" "image /nowhere" "image image" "--driver ext4 image mnt" \
			"--offset 99999999 image mnt" \
			"--pool image sha256:00 mnt" "--pool image --offset 4096 x mnt" "mnt mnt" "image"; do
			echo "== $args"; ! daxfs mount $args || echo mounted
		done
		! daxfs umount / || echo unmounted
		! daxfs umount || echo unmounted`)
	if strings.Contains(out, "mounted\n") && !strings.Contains(out, "not mounted\n") {
		t.Errorf("what must fail did not:\n%s", out)
	}
	for _, want := range []string{
		"image check failed", "no such file or directory", "not a directory",
		`unknown mount driver "ext4"`, "which has",
		"neither a file nor a device", "expected IMAGE DIR", "not of an image", "expected DIR...",
		"does not go with --pool",
	} {
		if !strings.Contains(out, want) {
			t.Errorf("output lacks %q:\n%s", want, out)
		}
	}
}

// mountsFromPool: the pool is mounted once, images appear at their directories, and nothing is left behind.
func mountsFromPool(t *testing.T, bin string) {
	for _, driver := range []string{"auto", "erofs", "erofs-loop", "fuse"} {
		t.Run(driver, func(t *testing.T) {
			out := inNamespace(t, bin, `
				mkdir one two tree; echo one >tree/name
				daxfs pool init --size 64m pool
				daxfs pool put --name docker.io/library/one:1 pool rootfs:tree
				echo two >tree/name; ln -s name tree/link
				daxfs pool put --name second pool rootfs:tree
				key=$(daxfs pool ls pool | awk '/second/ { print $1 }')
				daxfs mount --driver `+driver+` --pool pool docker.io/library/one:1 one
				daxfs mount --pool pool $key two
				cat one/name two/link
				echo file systems $(grep -c " /run/daxfs/.*/live/" /proc/self/mountinfo)
				grep " $PWD/two " /proc/self/mountinfo
				! daxfs mount --pool pool second two || echo mounted twice
				! daxfs mount --pool pool sha256:bb two 2>&1 || echo mounted what is not there
				cd two; ! daxfs umount $OLDPWD/two || echo unmounted under a process; cd ..
				daxfs pool ls pool
				daxfs umount one two
				! grep -q daxfs /proc/self/mountinfo || echo something is left
				! daxfs umount one || echo unmounted twice
				find /run/daxfs 2>/dev/null || true
				mkdir other; daxfs mount --suid --pool pool second other
				grep " $PWD/other " /proc/self/mountinfo | grep nosuid || echo setuid works
				umount other # without asking
				daxfs pool rm pool second docker.io/library/one:1
				! grep -q daxfs /proc/self/mountinfo || echo something is left`)
			for _, want := range []string{
				"one\ntwo\n", "file systems 1\n", "nosuid", "is mounted already", "in use",
				"setuid works", "removed 2 images",
			} {
				if !strings.Contains(out, want) {
					t.Errorf("output lacks %q:\n%s", want, out)
				}
			}
			for _, bad := range []string{
				"mounted twice", "mounted what", "unmounted under", "is left",
				"unmounted twice", "/run/daxfs/",
			} {
				for line := range strings.SplitSeq(out, "\n") {
					if strings.HasPrefix(line, bad) {
						t.Errorf("output has %q:\n%s", line, out)
					}
				}
			}
		})
	}
}

// mountsAsReader: a machine without the index of a pool mounts its images by their keys.
func mountsAsReader(t *testing.T, bin string) {
	out := inNamespace(t, bin, `
		mkdir one two tree elsewhere; echo one >tree/name
		daxfs pool init --size 64m --index elsewhere/index pool
		daxfs pool put --index elsewhere/index --name one pool rootfs:tree
		! daxfs pool put --name two pool rootfs:tree || echo put without an index
		key=$(daxfs pool ls pool 2>/dev/null | awk 'NR == 2 { print $1 }')
		! daxfs mount --pool pool one one || echo mounted by a name
		daxfs mount --pool pool $key one
		daxfs mount --pool pool $key two
		cat one/name two/name
		daxfs umount one
		cat two/name
		daxfs umount two
		! grep -q daxfs /proc/self/mountinfo || echo something is left`)
	if strings.Count(out, "one\n") < 3 || !strings.Contains(out, "keys are what pool ls shows") ||
		!strings.Contains(out, "--index") ||
		strings.Contains(out, "without an index\n") || strings.Contains(out, "by a name\n") ||
		strings.Contains(out, "is left") {
		t.Errorf("output:\n%s", out)
	}
}

// sharesWithDaemon: the command line and a daemon share a pool, and neither destroys the other's data.
func sharesWithDaemon(t *testing.T, bin string) {
	server := filepath.Join(t.TempDir(), "daxfs-snapshotter")
	if out, err := exec.Command("go", "build", "-o", server, "../daxfs-snapshotter").CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	out := inNamespace(t, bin, `
		mkdir tree root mnt; echo hello >tree/file
		printf 'root = "%s/root"\naddress = "/run/d/daxfs.sock"\n' $PWD >config
		printf '[pool]\nsize = "256MiB"\n[containerd]\naddress = "/run/d/none.sock"\n' >>config
		start() {
			rm -f /run/d/control.sock
			`+server+` --config config 2>>log & daemon=$!
			for i in $(seq 100); do test -e /run/d/control.sock && return; sleep 0.1; done
			cat log; exit 1
		}
		stop() { kill $daemon; wait $daemon; }
		pool=root/pool/live control="--control /run/d/control.sock"
		mkdir /run/d; start
		daxfs pool put $control --name one $pool rootfs:tree
		daxfs mount $control --pool $pool one mnt
		cat mnt/file
		! daxfs pool rm $control $pool one || echo removed while mounted
		! daxfs pool check $pool || echo checked beside the daemon
		daxfs pool check $control $pool
		daxfs status $control
		daxfs images $control
		daxfs du $control one
		cat mnt/file >/dev/null; daxfs top $control
		daxfs pool pin $control $pool one uno
		daxfs images $control uno | grep -c pin/uno
		daxfs pool unpin $control $pool uno
		stop
		! daxfs pool rm $pool one || echo removed while mounted
		echo later >tree/file
		daxfs pool put --name two $pool rootfs:tree
		cat mnt/file
		start
		echo after the restart: $(daxfs pool ls $control $pool | grep -c -E 'one|two')
		daxfs pool gc $control $pool
		cat mnt/file
		daxfs umount $control mnt
		daxfs pool rm $control $pool one
		stop
		echo at the end: $(daxfs pool ls $pool | grep -c two)
		daxfs pool gc $pool
		daxfs pool check $pool
		! grep -q daxfs /proc/self/mountinfo || echo something is left`)
	for _, want := range []string{
		"by the daemon", "in use; unmount it first", "in use by process", "after the restart: 2\n", "at the end: 1\n",
		"is consistent", "is pinned as uno",
		"1, 1 mounted", "mount/", "FILES  DIRECTORY",
	} {
		if !strings.Contains(out, want) {
			t.Errorf("output lacks %q:\n%s", want, out)
		}
	}
	if strings.Count(out, "hello\n") != 3 || strings.Contains(out, "\nremoved while") ||
		strings.Contains(out, "beside the daemon\n") ||
		strings.Contains(out, "is left") {
		t.Errorf("output:\n%s", out)
	}
}

// A mounted image is not removed, whichever driver and path; nor is its pool reinitialized.
func removeLeavesWhatIsMounted(t *testing.T, bin string) {
	for _, driver := range []string{"erofs", "erofs-loop", "fuse"} {
		out := inNamespace(t, bin, `
			mkdir tree mnt "real dir"; echo hello >tree/greeting; ln -s "real dir" link
			daxfs pool init --size 64m link/pool
			daxfs pool put --name one link/pool rootfs:tree
			echo other >tree/greeting
			daxfs pool put --name two link/pool rootfs:tree
			daxfs mount --driver `+driver+` --pool link/pool one mnt
			! daxfs pool rm link/pool one || echo removed in use
			! daxfs pool init --force --size 64m link/pool || echo made anew in use
			daxfs pool rm link/pool two
			cat mnt/greeting
			daxfs umount mnt
			daxfs pool rm link/pool one`)
		if strings.Count(out, "in use; unmount it first") != 1 || strings.Count(out, "removed 1 images") != 2 ||
			!strings.Contains(out, "make it anew") || !strings.Contains(out, "hello\n") ||
			strings.Contains(out, "anew in use") {
			t.Errorf("%s: output:\n%s", driver, out)
		}
	}
}

// umount leaves the mounts of a table alone.
func umountLeavesTheSnapshotter(t *testing.T, bin string) {
	out := inNamespace(t, bin, `
		mkdir -p tree root/images/0123/mnt; echo hello >tree/greeting
		daxfs convert -o image rootfs:tree 2>/dev/null
		daxfs mount image root/images/0123/mnt
		echo '{}' >root/images/0123/image.json
		! daxfs umount root/images/0123/mnt
		cat root/images/0123/mnt/greeting
		daxfs umount --force root/images/0123/mnt`)
	if !strings.Contains(out, "belongs to the snapshotter") || !strings.Contains(out, "hello\n") {
		t.Errorf("output:\n%s", out)
	}
}

func TestDoctor(t *testing.T) {
	var out, errs bytes.Buffer
	status := run(t.Context(), []string{"daxfs", "doctor", "--json", t.TempDir()}, nil, &out, &errs)
	var rep report
	if err := json.Unmarshal(out.Bytes(), &struct {
		Kernel  *string `json:"kernel"`
		Support *[]support
		Memory  *[]struct{ Drivers []map[string]any }
	}{Kernel: &rep.Kernel, Support: &rep.Support}); err != nil {
		t.Fatalf("%v\n%s%s", err, &out, &errs)
	}
	if rep.Kernel == "" || len(rep.Support) == 0 || status != 0 && status != statusFindings {
		t.Errorf("status %d, %+v", status, rep)
	}
	out.Reset()
	run(t.Context(), []string{"daxfs", "doctor", t.TempDir()}, nil, &out, &errs)
	for _, want := range []string{"kernel ", "erofs-dax", "virtio-pmem", "fuse"} {
		if !strings.Contains(out.String(), want) {
			t.Errorf("output lacks %q:\n%s", want, &out)
		}
	}
	if os.Geteuid() == 0 { // others may not write there, a different error
		out.Reset()
		status := run(t.Context(), []string{"daxfs", "doctor", "--containerd=", "/proc"}, nil, &out, &errs)
		if status != statusFindings ||
			strings.Count(out.String(), `no pool can be made in "/proc"`) != len(drivers.All()) {
			t.Errorf("where there can be no file: status %d\n%s", status, &out)
		}
	}
	if status := run(t.Context(), []string{"daxfs", "doctor", "/nowhere"}, nil, &out, &errs); status != statusFailed {
		t.Errorf("status %d for a path that does not exist", status)
	}
}

// A machine with memory devices in sysfs.
func TestFindMemory(t *testing.T) {
	root := t.TempDir()
	for name, text := range map[string]string{
		"sys/class/block/pmem0/queue/dax":       "1\n",
		"sys/class/block/pmem0/size":            "8192\n",
		"sys/class/block/pmem0/device/resource": "0x100000000\n",
		"sys/class/block/pmem1/queue/dax":       "0\n",
		"sys/class/block/sda/queue/dax":         "0\n",
		"sys/bus/dax/devices/dax0.0/size":       "2097152\n",
		"sys/bus/dax/devices/dax0.0/resource":   "0x200000000\n",
		"proc/cmdline":                          "quiet memmap=1G\\$0x300000000,2G!8G memmap=512M$64g root=/dev/vda\n",
		"proc/sys/vm/nr_hugepages":              "16\n",
		"dev/dma_heap/system":                   "",
		"dev/shm/x":                             "",
	} {
		path := filepath.Join(root, name)
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	found, err := findMemory(sysroot(root), filepath.Join(root, "not", "yet"))
	if err != nil {
		t.Fatal(err)
	}
	var got []string
	for _, m := range found {
		got = append(got, m.Info.Kind)
	}
	if s := strings.Join(got, " "); !strings.HasPrefix(s, "pmem pmem devdax phys phys hugetlbfs dmabuf ") ||
		len(got) != 9 {
		t.Errorf("found %q", got)
	}
	if m := found[0]; !m.Info.DAX || m.Info.Phys != 1<<32 || !m.Info.HasPhys || m.Bytes != 4<<20 ||
		m.Info.BlockDevice != "/dev/pmem0" {
		t.Errorf("pmem0 is %+v", m)
	}
	if m := found[1]; m.Info.DAX || m.Info.HasPhys {
		t.Errorf("pmem1 is %+v", m)
	}
	if m := found[2]; m.Info.Phys != 2<<32 || m.Bytes != 2<<20 {
		t.Errorf("dax0.0 is %+v", m)
	}
	for i, want := range map[int][2]uint64{3: {3 << 32, 1 << 30}, 4: {64 << 30, 512 << 20}} {
		if m := found[i]; m.Info.Phys != want[0] || m.Bytes != want[1] {
			t.Errorf("reserved range is %+v", m)
		}
	}
	for i, want := range map[int]string{
		0: "block device with DAX; physical address 0x100000000; survives a reboot",
		1: "block device without DAX; physical address unknown; survives a reboot",
		2: "no block device; physical address 0x200000000; survives its processes, not a reboot",
		6: "no block device; physical address unknown; ends with its last user",
	} {
		if got := properties(found[i].Info); got != want {
			t.Errorf("%s: %q, expected %q", found[i].Info.Kind, got, want)
		}
	}
}

// readsLargerDevice: a block device may be larger than its image, a file may not.
func readsLargerDevice(t *testing.T, bin string) {
	if _, err := exec.LookPath("losetup"); err != nil {
		t.Skip("losetup is not installed (mount)")
	}
	inNamespace(t, bin, `
		mkdir root; echo hello >root/file
		daxfs convert -q -o image rootfs:root
		truncate -s 8M image
		if daxfs verify image; then echo a file that is too large has no finding; exit 1; fi
		device=$(losetup --find --show --read-only image)
		trap 'losetup --detach $device' EXIT
		daxfs verify $device
		daxfs inspect $device
		[ "$(daxfs cat $device file)" = hello ]`)
}
