package region

import (
	"bytes"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
)

func TestIdentify(t *testing.T) {
	const size = 1 << 20
	for _, s := range signatures {
		b := make([]byte, size)
		copy(b[s.off:], s.bytes)
		if got := Identify(bytes.NewReader(b), size); got != s.name {
			t.Errorf("%q at %d is %q, expected %q", s.bytes, s.off, got, s.name)
		}
	}
	b := make([]byte, size)
	if got := Identify(bytes.NewReader(b), size); got != "" {
		t.Errorf("zeros are %q", got)
	}
	copy(b[size-labelArea+4096:], "NAMESPACE_INDEX\x00")
	if got := Identify(bytes.NewReader(b), size); got != "an nvdimm label area" {
		t.Errorf("labels are %q", got)
	}
	clear(b)
	copy(b[size-512:], "EFI PART")
	if got := Identify(bytes.NewReader(b), size); got != "a backup GPT partition table" {
		t.Errorf("a backup GPT is %q", got)
	}
}

// TestIdentifyReal uses the programs that write these signatures.
func TestIdentifyReal(t *testing.T) {
	for want, command := range map[string][]string{
		"an ext filesystem":   {"mkfs.ext4", "-q", "-F"},
		"an EROFS filesystem": {"mkfs.erofs"},
		"swap space":          {"mkswap"},
		"an XFS filesystem":   {"mkfs.xfs", "-q"},
		"a Btrfs filesystem":  {"mkfs.btrfs", "-q"},
		"an encrypted volume": {
			"cryptsetup", "luksFormat", "-q", "--pbkdf", "pbkdf2", "--pbkdf-force-iterations",
			"1000", "--key-file", "/dev/zero", "--keyfile-size", "16",
		},
	} {
		t.Run(command[0], func(t *testing.T) {
			if _, err := exec.LookPath(command[0]); err != nil {
				t.Skip(err)
			}
			path := filepath.Join(t.TempDir(), "image")
			if err := os.WriteFile(path, nil, 0o600); err != nil {
				t.Fatal(err)
			}
			args := append(command[1:], path)
			if command[0] == "mkfs.erofs" {
				args = append(args, t.TempDir())
			}
			if err := os.Truncate(path, 320<<20); err != nil {
				t.Fatal(err)
			}
			if out, err := exec.Command(command[0], args...).CombinedOutput(); err != nil {
				t.Skipf("%v: %s", err, out)
			}
			f, err := os.Open(path)
			if err != nil {
				t.Fatal(err)
			}
			defer f.Close()
			if got := Identify(f, 320<<20); got != want {
				t.Errorf("%q, expected %q", got, want)
			}
		})
	}
}
