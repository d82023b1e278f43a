package snapshotter

import (
	"context"
	"maps"
	"slices"

	"github.com/containerd/containerd/v2/core/snapshots"
	bolt "go.etcd.io/bbolt"
)

// uses implements Uses from the records and the pins.
type uses struct {
	pins   *pins
	needs  map[string]Use                 // by key of an image or layer
	plain  map[string]bool                // images whose plain copy is needed
	spaces map[string]map[string]struct{} // namespaces by key
}

func (u *uses) Image(key string) Use { return u.need(key) }
func (u *uses) Layer(key string) Use { return u.need(key) }

func (u *uses) need(key string) Use {
	if u.pins.has(key) {
		return InUse
	}
	return u.needs[key]
}

func (u *uses) Plain(key string) bool { return u.plain[key] || u.pins.has(key) }

func (u *uses) Namespaces(key string) []string { return slices.Sorted(maps.Keys(u.spaces[key])) }

// stand notes the lower of an overlay. An overlay of a removed snapshot has no namespace.
func (u *uses) stand(low *lower, namespace string) {
	switch {
	case low == nil || low.Image == "":
	case low.Plain:
		u.plain[low.Image] = true
	case namespace == "":
		u.needs[low.Image] = InUse
	default:
		u.raise(low.Image, namespace, InUse)
	}
}

// raise notes that a namespace needs key.
func (u *uses) raise(key, namespace string, use Use) {
	u.needs[key] = max(u.needs[key], use)
	if u.spaces[key] == nil {
		u.spaces[key] = map[string]struct{}{}
	}
	u.spaces[key][namespace] = struct{}{}
}

// uses reads from the records what is needed. A sweep may use the result only while pins are watched.
func (s *Snapshotter) uses(ctx context.Context) (*uses, error) {
	u := &uses{
		pins: &s.pins, needs: map[string]Use{}, plain: map[string]bool{}, spaces: map[string]map[string]struct{}{},
	}
	err := s.st.view(ctx, func(ctx context.Context, tx *bolt.Tx) error {
		gone, err := goneLowers(tx)
		if err != nil {
			return err
		}
		for _, low := range gone {
			u.stand(low, "")
		}
		all, err := all(ctx, tx)
		if err != nil {
			return err
		}
		hasChild := map[string]bool{}
		for _, l := range all {
			hasChild[l.info.Parent] = hasChild[l.info.Parent] || l.info.Kind == snapshots.KindCommitted
		}
		for name := range all {
			s.usesOf(all.chain(name), hasChild[name], u)
		}
		return nil
	})
	return u, err
}

// usesOf adds the needs of the first of links, a snapshot and those below it. A claimed layer, and an
// image with one, may belong to another namespace: they are not needed before the claim is proven.
func (s *Snapshotter) usesOf(links []link, hasChild bool, u *uses) {
	id, info, rec := links[0].id, links[0].info, links[0].rec
	ns, _ := splitName(info.Name)
	if rec.Claim == nil {
		for _, key := range rec.Streamed {
			u.raise(key, ns, Stored)
		}
	}
	if rec.Dir && info.Kind == snapshots.KindCommitted {
		use := Stored
		if rec.Dropped {
			use = InUse // no other copy exists
		}
		u.raise(s.dirKey(id), ns, use)
	}
	u.stand(rec.Lower, ns)
	proven := !slices.ContainsFunc(links, func(l link) bool { return l.rec.Claim != nil })
	if rec.Image == "" || !proven {
		return
	}
	if rec.Top || !hasChild {
		u.raise(rec.Image, ns, Ready)
	} else {
		u.raise(rec.Image, ns, Stored)
	}
}
