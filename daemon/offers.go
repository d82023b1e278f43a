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

// offers remembers which OCI images of shared pools were attached, by namespace and name, with the digest that the name
// stood for. An image that a user removed again is not attached a second time by itself. It is safe for concurrent use.
type offers struct {
	path string

	mu   sync.Mutex
	made map[string]map[string]digest.Digest
	// failed is why an image could not be attached the last time.
	failed map[[2]string]string
}

// openOffers reads the file, which may be missing.
func openOffers(path string) (*offers, error) {
	o := &offers{path: path, made: map[string]map[string]digest.Digest{}, failed: map[[2]string]string{}}
	b, err := os.ReadFile(path)
	if errors.Is(err, fs.ErrNotExist) {
		return o, nil
	}
	if err == nil {
		err = json.Unmarshal(b, &o.made)
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
	return o.made[namespace][name] == target
}

// fails notes why a name could not be attached, and reports whether that is new.
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

// add notes that a name was attached.
func (o *offers) add(namespace, name string, target digest.Digest) error {
	o.mu.Lock()
	defer o.mu.Unlock()
	if o.made[namespace] == nil {
		o.made[namespace] = map[string]digest.Digest{}
	}
	o.made[namespace][name] = target
	b, err := json.Marshal(o.made)
	if err != nil {
		return err
	}
	return renameio.WriteFile(o.path, append(b, '\n'), 0o600)
}
