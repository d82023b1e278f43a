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

// plainError is a server interceptor that leaves the kind of an error at the end of its text once, however many layers
// appended it.
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

// kindTexts are the texts of containerd's kinds of errors, by their code.
var kindTexts = map[codes.Code]string{
	codes.InvalidArgument: errdefs.ErrInvalidArgument.Error(), codes.NotFound: errdefs.ErrNotFound.Error(),
	codes.AlreadyExists:      errdefs.ErrAlreadyExists.Error(),
	codes.FailedPrecondition: errdefs.ErrFailedPrecondition.Error(),
	codes.ResourceExhausted:  errdefs.ErrResourceExhausted.Error(), codes.DataLoss: errdefs.ErrDataLoss.Error(),
	codes.Unavailable: errdefs.ErrUnavailable.Error(), codes.Unimplemented: errdefs.ErrNotImplemented.Error(),
}

// logFailure is a server interceptor that says in one line which call failed, on what, and why. Whoever called may show
// the reason to nobody.
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
		// Answers that containerd asks for: is it there, does somebody else have to do it. Or it has gone away.
		logger.Debug("call answered with an error")
	default:
		logger.Error("call failed")
	}
	return nil, err
}
