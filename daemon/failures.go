package daemon

import (
	"context"
	"path"
	"strings"

	diffapi "github.com/containerd/containerd/api/services/diff/v1"
	snapshotsapi "github.com/containerd/containerd/api/services/snapshots/v1"
	"github.com/containerd/errdefs"
	"github.com/containerd/log"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

// plainError is a server interceptor that removes repetitions of an error's kind from the end of its
// text: several layers may have appended it.
func plainError(ctx context.Context, req any, _ *grpc.UnaryServerInfo, handler grpc.UnaryHandler) (any, error) {
	resp, err := handler(ctx, req)
	st, ok := status.FromError(err)
	kind := kindTexts[st.Code()]
	if err == nil || !ok || kind == "" {
		return resp, err
	}
	p, suffix := st.Proto(), ": "+kind
	for strings.HasSuffix(p.Message, suffix+suffix) {
		p.Message = strings.TrimSuffix(p.Message, suffix)
	}
	return resp, status.FromProto(p).Err()
}

// kindTexts maps codes to the texts of containerd's error kinds.
var kindTexts = map[codes.Code]string{
	codes.InvalidArgument: errdefs.ErrInvalidArgument.Error(), codes.NotFound: errdefs.ErrNotFound.Error(),
	codes.AlreadyExists:      errdefs.ErrAlreadyExists.Error(),
	codes.FailedPrecondition: errdefs.ErrFailedPrecondition.Error(),
	codes.ResourceExhausted:  errdefs.ErrResourceExhausted.Error(), codes.DataLoss: errdefs.ErrDataLoss.Error(),
	codes.Unavailable: errdefs.ErrUnavailable.Error(), codes.Unimplemented: errdefs.ErrNotImplemented.Error(),
}

// logFailure is a server interceptor that logs failed calls in one line: the call, its subject and the
// reason. The caller may not show the reason to anybody.
func logFailure(ctx context.Context, req any, info *grpc.UnaryServerInfo, handler grpc.UnaryHandler) (any, error) {
	resp, err := handler(ctx, req)
	if err == nil {
		return resp, nil
	}
	logger := log.G(ctx).WithError(err).WithField("call", path.Base(info.FullMethod))
	switch r := req.(type) {
	case interface{ GetKey() string }:
		logger = logger.WithField("snapshot", r.GetKey())
	case *diffapi.ApplyRequest:
		logger = logger.WithField("layer", r.Diff.GetDigest()).WithField("type", r.Diff.GetMediaType())
	}
	if r, ok := req.(*snapshotsapi.PrepareSnapshotRequest); ok && r.Parent != "" {
		logger = logger.WithField("parent", r.Parent)
	}
	switch status.Code(err) {
	case codes.AlreadyExists, codes.NotFound, codes.Unimplemented, codes.Canceled:
		// containerd asks whether something exists or whether another plugin must do the work, or is gone.
		logger.Debug("call answered with an error")
	default:
		logger.Error("call failed")
	}
	return nil, err
}
