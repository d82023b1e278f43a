package shared

import (
	"cmp"
	"crypto/rand"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"github.com/google/renameio/v2"

	"github.com/daxfs/daxfs-snapshotter/pool/lease"
)

// openLease opens the configured lease region, if there is one, for a pool of size bytes.
// Preconditions: mu is held.
func (m *member) openLease(size int64) error {
	if m.lease != nil || m.src.Lease == "" {
		return nil
	}
	if in, err := lease.Within(m.src.Lease, m.mem.Info(), size); err != nil || in {
		return cmp.Or(err, fmt.Errorf("lease region %q: %w", m.src.Lease, ErrInPool))
	}
	machine, err := machineID(m.cfg.Root)
	if err != nil {
		return err
	}
	name, err := os.Hostname()
	if err != nil {
		return err
	}
	m.lease, err = lease.Open(m.src.Lease, lease.Reader{Name: readerName(name, machine), Machine: machine})
	if err != nil {
		if errors.Is(err, lease.ErrTaken) && !Identified() {
			err = fmt.Errorf("%w. If it was this machine before a boot: %s", err, noIdentity)
		}
		return fmt.Errorf("tell the owner what is in use here: %w", err)
	}
	return nil
}

// readerName is the name of this reader for the owner of a pool: the host name, if there is one.
func readerName(host string, machine [16]byte) string {
	name := strings.ToValidUTF8(host[:min(len(host), 64)], "")
	if name == "" || name == "(none)" || name == "localhost" { // defaults of kernels and systems
		return fmt.Sprintf("machine-%x", machine[:4])
	}
	return name
}

// identities are the files that identify a machine. Cloned machines share the id in /etc, but the
// firmware gives each virtual machine its own.
var identities = []string{"/etc/machine-id", "/sys/class/dmi/id/product_uuid"}

// noIdentity is the advice for a machine without an identity.
const noIdentity = "it has neither /etc/machine-id nor a UUID of its firmware, so that a new root directory makes it " +
	"another reader; give it one of them (-uuid of QEMU)"

// Identified reports whether this machine has an identity that survives reboots and new file systems.
func Identified() bool { return strings.Join(identity(), "") != "" }

func identity() (parts []string) {
	for _, path := range identities {
		if b, err := os.ReadFile(path); err == nil {
			parts = append(parts, strings.TrimSpace(string(b)))
		}
	}
	return parts
}

// machineID identifies this root on this machine, also after a reboot.
func machineID(root string) (id [16]byte, err error) {
	parts := identity()
	if strings.Join(parts, "") == "" {
		random, err := ownID(filepath.Join(root, "machine-id"))
		if err != nil {
			return id, err
		}
		parts = append(parts, random)
	}
	sum := sha256.Sum256([]byte(strings.Join(append(parts, root), "\n")))
	copy(id[:], sum[:])
	return id, nil
}

// ownID reads a random id from a file, which it makes if necessary.
func ownID(path string) (string, error) {
	b, err := os.ReadFile(path)
	if err == nil || !errors.Is(err, fs.ErrNotExist) {
		return strings.TrimSpace(string(b)), err
	}
	var raw [16]byte
	rand.Read(raw[:])
	id := hex.EncodeToString(raw[:])
	return id, renameio.WriteFile(path, []byte(id+"\n"), 0o600)
}
