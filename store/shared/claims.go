package shared

import (
	"context"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"time"

	"github.com/google/renameio/v2"
	"github.com/opencontainers/go-digest"

	"github.com/daxfs/daxfs-snapshotter/pool"
)

// claim is a claimed image in the file of claims. The file is written before the lease, so that every
// lease is known here and can be ended.
type claim struct {
	Key        string    `json:"key"`
	Slot       int       `json:"slot"`
	UUID       string    `json:"uuid"`
	Created    time.Time `json:"created"`
	Window     int64     `json:"window,omitempty"`
	WindowSize int64     `json:"windowSize,omitempty"`
	Epoch      string    `json:"epoch"`
	Name       string    `json:"name,omitempty"` // an OCI image with this tree, for people
}

func claimOf(m pool.Image, epoch [16]byte) claim {
	return claim{
		Key: m.Key, Slot: m.Slot, UUID: hex.EncodeToString(m.UUID[:]), Created: m.Created, Window: m.Window,
		WindowSize: m.WindowSize, Epoch: hex.EncodeToString(epoch[:]),
	}
}

func (c claim) image() pool.Image {
	m := pool.Image{Key: c.Key, Slot: c.Slot, Created: c.Created, Window: c.Window, WindowSize: c.WindowSize}
	if b, err := hex.DecodeString(c.UUID); err == nil {
		copy(m.UUID[:], b)
	}
	return m
}

// lockedClaim is claim with the lock. It logs that a pool cannot be used. It calls then with the lock
// held, so that the epoch cannot change meanwhile.
func (m *member) lockedClaim(ctx context.Context, chain digest.Digest, then func()) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	if err := m.refresh(ctx); err != nil {
		m.complain(ctx, err)
		return err
	}
	err := m.claim(ctx, chain)
	if err == nil {
		then()
	}
	return err
}

// claim claims the image of a chain. Preconditions: mu is held, and view is current.
func (m *member) claim(ctx context.Context, chain digest.Digest) error {
	img, listed := m.view.chains[chain]
	epoch := m.view.cat.Geometry.UUID
	old, claimed := m.claims[chain]
	claimed = claimed && old.Epoch == hex.EncodeToString(epoch[:])
	switch {
	case claimed && m.lease != nil && (!listed || idOf(old.image()) != idOf(img)):
		return m.keepUnlisted(chain, old.image())
	case !listed:
		return ErrNotFound
	case claimed && idOf(old.image()) == idOf(img):
	case claimed:
		if _, mounted := m.table.Get(chain.String()); mounted {
			return fmt.Errorf("the owner has replaced the image, which is in use here, and there is no lease: %w",
				ErrReset)
		}
		fallthrough
	default:
		if err := m.release(chain); err != nil { // a claim of another image or an earlier epoch
			return err
		}
		c := claimOf(img, epoch)
		if e := m.view.known[docID{idOf(img), img.Document}]; e != nil && len(e.names) > 0 {
			c.Name = e.names[0].Name
		}
		if err := m.saveClaim(chain, c); err != nil {
			return err
		}
	}
	if err := m.takeLease(ctx, chain, img); err != nil {
		return err
	}
	if err := m.superseded(chain); err != nil {
		return err
	}
	return m.checkImage(img)
}

// keepUnlisted keeps using a leased image that the owner took out of the catalogue.
func (m *member) keepUnlisted(chain digest.Digest, img pool.Image) error {
	held, err := m.lease.Claim(m.view.cat.PoolID, img)
	if err != nil {
		return err
	}
	if held {
		return m.checkImage(img)
	}
	if _, mounted := m.table.Get(chain.String()); mounted {
		return fmt.Errorf("the owner has removed the image, which is in use here, and its lease was taken away: %w",
			ErrReset)
	}
	return errors.Join(ErrNotFound, m.release(chain))
}

// takeLease claims an image in the lease region, and checks that it was not removed just before.
func (m *member) takeLease(ctx context.Context, chain digest.Digest, img pool.Image) error {
	if m.lease == nil {
		return nil
	}
	held, err := m.lease.Claim(m.view.cat.PoolID, img)
	if err != nil || held {
		return err
	}
	err = m.refresh(ctx)
	if err == nil {
		if now, ok := m.view.chains[chain]; !ok || idOf(now) != idOf(img) {
			err = fmt.Errorf("the owner removed the image meanwhile: %w", ErrNotFound)
		}
	}
	if err != nil {
		return errors.Join(err, m.release(chain))
	}
	return nil
}

// release ends the claim of a chain. Preconditions: mu is held, and the image is not mounted.
func (m *member) release(chain digest.Digest) error {
	c, ok := m.claims[chain]
	if !ok {
		return nil
	}
	if err := m.unlease(m.mounted.pool, c.image()); err != nil {
		return err
	}
	return m.dropClaim(chain)
}

// unlease ends the claim in the lease region. If that fails, the claim stays in the file.
func (m *member) unlease(id [16]byte, img pool.Image) error {
	switch {
	case m.src.Lease == "":
		return nil
	case m.lease == nil:
		return fmt.Errorf("lease region %q is not open, so the owner cannot be told that image %q is unused",
			m.src.Lease,
			img.Key)
	}
	return m.lease.Release(id, img)
}

// claimsFile is the name of the file in the directory of a pool.
const claimsFile = "claims.json"

func readClaims(dir string) (map[digest.Digest]claim, error) {
	claims := map[digest.Digest]claim{}
	path := filepath.Join(dir, claimsFile)
	b, err := os.ReadFile(path)
	if errors.Is(err, fs.ErrNotExist) {
		return claims, nil
	}
	if err != nil {
		return nil, err
	}
	if err := json.Unmarshal(b, &claims); err != nil {
		return nil, fmt.Errorf("%q: %w", path, err)
	}
	return claims, nil
}

func writeClaims(dir string, claims map[digest.Digest]claim) error {
	b, err := json.Marshal(claims)
	if err != nil {
		return err
	}
	return renameio.WriteFile(filepath.Join(dir, claimsFile), append(b, '\n'), 0o600)
}

func (m *member) saveClaim(chain digest.Digest, c claim) error {
	claims := maps.Clone(m.claims)
	claims[chain] = c
	return m.saveClaims(claims)
}

func (m *member) dropClaim(chain digest.Digest) error {
	claims := maps.Clone(m.claims)
	delete(claims, chain)
	return m.saveClaims(claims)
}

func (m *member) saveClaims(claims map[digest.Digest]claim) error {
	if err := writeClaims(m.dir(m.mounted.pool), claims); err != nil {
		return err
	}
	m.claims = claims
	return nil
}
