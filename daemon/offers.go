package daemon

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"sync"

	"github.com/google/renameio/v2"
	"github.com/opencontainers/go-digest"
)

// offers remembers which OCI images of shared pools were attached, by namespace and name, with their
// digest. It is safe for concurrent use. An image that a user removed is not attached again automatically.
type offers struct {
	path string

	mu       sync.Mutex
	attached map[string]map[string]digest.Digest
	// failed holds the error of the last failed attempt.
	failed map[[2]string]string
}

// openOffers reads the file, which may be missing.
func openOffers(path string) (*offers, error) {
	o := &offers{path: path, attached: map[string]map[string]digest.Digest{}, failed: map[[2]string]string{}}
	b, err := os.ReadFile(path)
	if errors.Is(err, fs.ErrNotExist) {
		return o, nil
	}
	if err == nil {
		err = json.Unmarshal(b, &o.attached)
	}
	if err != nil {
		return nil, fmt.Errorf("record of attached images %q: %w", path, err)
	}
	return o, nil
}

// has reports whether a name was attached with that digest.
func (o *offers) has(namespace, name string, target digest.Digest) bool {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.attached[namespace][name] == target
}

// fails records why a name could not be attached, and reports whether the reason is new.
func (o *offers) fails(namespace, name string, err error) bool {
	o.mu.Lock()
	defer o.mu.Unlock()
	key, text := [2]string{namespace, name}, err.Error()
	if o.failed[key] == text {
		return false
	}
	o.failed[key] = text
	return true
}

// add records that a name was attached.
func (o *offers) add(namespace, name string, target digest.Digest) error {
	o.mu.Lock()
	defer o.mu.Unlock()
	if o.attached[namespace] == nil {
		o.attached[namespace] = map[string]digest.Digest{}
	}
	o.attached[namespace][name] = target
	b, err := json.Marshal(o.attached)
	if err != nil {
		return err
	}
	return renameio.WriteFile(o.path, append(b, '\n'), 0o600)
}
