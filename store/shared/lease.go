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

// openLease opens the memory in which the owner of a pool of that size looks for what is in use here, if there is some.
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
		return fmt.Errorf("what is in use here can not be told to its owner: %w", err)
	}
	return nil
}

// readerName is what the owner of a pool calls this reader: the name of the host, if it has one.
func readerName(host string, machine [16]byte) string {
	name := strings.ToValidUTF8(host[:min(len(host), 64)], "")
	if name == "" || name == "(none)" || name == "localhost" { // what the kernel and systems say that were given none
		return fmt.Sprintf("machine-%x", machine[:4])
	}
	return name
}

// identities are where a machine says who it is. Machines that were copied have one id in /etc; the firmware of virtual
// machines has another for each.
var identities = []string{"/etc/machine-id", "/sys/class/dmi/id/product_uuid"}

// noIdentity says what a machine without an identity is to do.
const noIdentity = "it has neither /etc/machine-id nor a UUID of its firmware, so that a new root directory makes it " +
	"another reader; give it one of them (-uuid of QEMU)"

// Identified reports whether this machine has an identity that stays when it boots, whatever becomes of its file systems.
func Identified() bool { return strings.Join(identity(), "") != "" }

func identity() (parts []string) {
	for _, path := range identities {
		if b, err := os.ReadFile(path); err == nil {
			parts = append(parts, strings.TrimSpace(string(b)))
		}
	}
	return parts
}

// machineID tells this root on this machine from all others, also after a boot.
func machineID(root string) (id [16]byte, err error) {
	parts := identity()
	if strings.Join(parts, "") == "" {
		made, err := ownID(filepath.Join(root, "machine-id"))
		if err != nil {
			return id, err
		}
		parts = append(parts, made)
	}
	sum := sha256.Sum256([]byte(strings.Join(append(parts, root), "\n")))
	copy(id[:], sum[:])
	return id, nil
}

// ownID reads a random id from a file, which it makes.
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
