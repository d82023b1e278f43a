package daemon

import (
	"context"
	"errors"
	"fmt"
	"syscall"

	"github.com/containerd/errdefs"

	"github.com/daxfs/daxfs-snapshotter/converter/blob"
	"github.com/daxfs/daxfs-snapshotter/converter/layer"
	"github.com/daxfs/daxfs-snapshotter/daxfs"
	"github.com/daxfs/daxfs-snapshotter/mount"
	"github.com/daxfs/daxfs-snapshotter/pool"
	"github.com/daxfs/daxfs-snapshotter/store"
	"github.com/daxfs/daxfs-snapshotter/store/shared"
)

// kinds maps errors of the packages below to containerd's kinds. The first match wins.
var kinds = []struct{ err, kind error }{
	{shared.ErrNotFound, errdefs.ErrNotFound}, // whatever the other pools report
	{pool.ErrFull, errdefs.ErrResourceExhausted},
	{syscall.ENOSPC, errdefs.ErrResourceExhausted},
	{syscall.EDQUOT, errdefs.ErrResourceExhausted},
	{pool.ErrCorrupt, errdefs.ErrDataLoss},
	{daxfs.ErrCorrupt, errdefs.ErrDataLoss},
	{mount.ErrCheck, errdefs.ErrDataLoss},
	{store.ErrDamaged, errdefs.ErrDataLoss},
	{store.ErrLost, errdefs.ErrNotFound},
	{shared.ErrReset, errdefs.ErrFailedPrecondition},
	{shared.ErrOwn, errdefs.ErrFailedPrecondition},
	{shared.ErrSize, errdefs.ErrFailedPrecondition},

	{blob.ErrMismatch, errdefs.ErrDataLoss},
	{blob.ErrMediaType, errdefs.ErrNotImplemented},
	{blob.ErrEncrypted, errdefs.ErrNotImplemented},
	{blob.ErrTooLarge, errdefs.ErrInvalidArgument},
	{layer.ErrInvalid, errdefs.ErrInvalidArgument},
	{layer.ErrLimit, errdefs.ErrInvalidArgument},
	{pool.ErrInvalid, errdefs.ErrInvalidArgument},
	{mount.ErrUnsupported, errdefs.ErrFailedPrecondition},
	{pool.ErrBusy, errdefs.ErrFailedPrecondition},
	{mount.ErrBusy, errdefs.ErrFailedPrecondition},
	{pool.ErrClosed, errdefs.ErrUnavailable},
	{pool.ErrNotFound, errdefs.ErrNotFound},
}

// toErrdefs adds containerd's kind to an error. Context errors and errors that have a kind stay as
// they are; any other error becomes gRPC's Unknown, with its text.
func toErrdefs(err error) error {
	if err == nil || errors.Is(err, context.Canceled) || errors.Is(err, context.DeadlineExceeded) || hasKind(err) {
		return err
	}
	for _, k := range kinds {
		if errors.Is(err, k.err) {
			return fmt.Errorf("%w: %w", err, k.kind)
		}
	}
	return err
}

// hasKind reports whether err already has an errdefs kind.
func hasKind(err error) bool {
	for _, kind := range []error{
		errdefs.ErrResourceExhausted, errdefs.ErrDataLoss, errdefs.ErrNotImplemented, errdefs.ErrInvalidArgument,
		errdefs.ErrFailedPrecondition, errdefs.ErrUnavailable, errdefs.ErrNotFound, errdefs.ErrAlreadyExists,
	} {
		if errors.Is(err, kind) {
			return true
		}
	}
	return false
}
