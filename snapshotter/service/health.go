package service

import (
	"context"
	"fmt"
	"os"

	"github.com/containerd/containerd/v2/core/snapshots"
)

// Healthy returns nil if the daemon can do its work: its metadata answers and every mounted image can be looked at.
func (s *Service) Healthy(ctx context.Context) error {
	if err := s.sn.Walk(ctx, func(context.Context, snapshots.Info) error { return ctx.Err() }); err != nil {
		return fmt.Errorf("metadata: %w", err)
	}
	for _, m := range s.table.List() {
		if _, err := os.Stat(m.Dir); err != nil {
			return fmt.Errorf("image of chain %q: %w", m.Key, err)
		}
	}
	return nil
}
