package daemon

import (
	"bytes"
	"context"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"

	snapshotsapi "github.com/containerd/containerd/api/services/snapshots/v1"
	"github.com/containerd/containerd/api/types"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/peer"
	"google.golang.org/grpc/status"
)

// If an image's mount is not visible to the process that mounts an overlay over it, that process sees
// an empty directory. The root of its container is then empty too, and nothing fails. So a caller in
// another mount namespace gets mounts only if the images below them are mounted there as well.

// peerCredentials identify the process at the other end of a unix socket. They do not encrypt or authenticate.
type peerCredentials struct{}

type peerInfo struct {
	credentials.CommonAuthInfo
	pid int
}

// AuthType implements credentials.AuthInfo.
func (peerInfo) AuthType() string { return "unix" }

// ServerHandshake implements credentials.TransportCredentials.
func (peerCredentials) ServerHandshake(conn net.Conn) (net.Conn, credentials.AuthInfo, error) {
	info := peerInfo{CommonAuthInfo: credentials.CommonAuthInfo{SecurityLevel: credentials.NoSecurity}}
	if cred := callerOf(conn); cred != nil {
		info.pid = int(cred.Pid) // 0 if the process is not visible from here
	}
	return conn, info, nil
}

// callerOf returns the process at the other end of a unix socket; nil if the kernel does not tell.
func callerOf(conn net.Conn) (cred *unix.Ucred) {
	sc, ok := conn.(syscall.Conn)
	if !ok {
		return nil
	}
	raw, err := sc.SyscallConn()
	if err != nil {
		return nil
	}
	cerr := raw.Control(func(fd uintptr) {
		cred,
			err = unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED)
	})
	if cerr != nil || err != nil {
		return nil
	}
	return cred
}

// ClientHandshake implements credentials.TransportCredentials.
func (peerCredentials) ClientHandshake(_ context.Context, _ string,
	c net.Conn,
) (net.Conn, credentials.AuthInfo, error) {
	return c, peerInfo{}, nil
}

// Info implements credentials.TransportCredentials.
func (peerCredentials) Info() credentials.ProtocolInfo {
	return credentials.ProtocolInfo{SecurityProtocol: "unix"}
}

// Clone implements credentials.TransportCredentials.
func (c peerCredentials) Clone() credentials.TransportCredentials { return c }

// OverrideServerName implements credentials.TransportCredentials.
func (peerCredentials) OverrideServerName(string) error { return nil }

// checkVisible is a server interceptor that refuses mounts over an image that the caller cannot see.
func (d *Daemon) checkVisible(ctx context.Context, req any, _ *grpc.UnaryServerInfo,
	handler grpc.UnaryHandler,
) (any, error) {
	resp, err := handler(ctx, req)
	if err != nil {
		return resp, err
	}
	var mounts []*types.Mount
	createdKey := "" // the key of the snapshot that this call created
	switch r := resp.(type) {
	case *snapshotsapi.PrepareSnapshotResponse:
		mounts, createdKey = r.Mounts, req.(*snapshotsapi.PrepareSnapshotRequest).Key
	case *snapshotsapi.ViewSnapshotResponse:
		mounts, createdKey = r.Mounts, req.(*snapshotsapi.ViewSnapshotRequest).Key
	case *snapshotsapi.MountsResponse:
		mounts = r.Mounts
	}
	if len(mounts) == 0 {
		return resp, nil
	}
	if p, ok := peer.FromContext(ctx); ok {
		if info, ok := p.AuthInfo.(peerInfo); ok && info.pid > 0 {
			err = visible(info.pid, []string{filepath.Join(d.cfg.Root, "images"), d.sharedRoot()}, mounts)
		}
	}
	if err == nil {
		return resp, nil
	}
	if createdKey != "" {
		if rerr := d.sn.Remove(context.WithoutCancel(ctx), createdKey); rerr != nil {
			err = fmt.Errorf("%w; and its snapshot stays: %w", err, rerr)
		}
	}
	return nil, status.Error(codes.FailedPrecondition, err.Error())
}

// visible returns an error if mounts stand on an image, mounted below images, that a process cannot see.
func visible(pid int, images []string, mounts []*types.Mount) error {
	own, err := os.Readlink("/proc/self/ns/mnt")
	if err != nil {
		return nil // without /proc the namespaces cannot be compared
	}
	its, err := os.Readlink(fmt.Sprintf("/proc/%d/ns/mnt", pid))
	if err != nil || its == own {
		return nil // it is gone, or in our namespace
	}
	table, err := os.ReadFile(fmt.Sprintf("/proc/%d/mountinfo", pid))
	if err != nil {
		return nil
	}
	seen := map[string]bool{}
	for line := range bytes.Lines(table) {
		if fields := strings.Fields(string(line)); len(fields) > 4 {
			seen[fields[4]] = true
		}
	}
	for _, m := range mounts {
		for _, dir := range lowerdirs(m) {
			below := slices.ContainsFunc(images, func(root string) bool { return strings.HasPrefix(dir, root+"/") })
			if below && !seen[dir] {
				return fmt.Errorf("image %q is mounted here and not in the mount namespace of the caller "+
					"(process %d, %s): run both in one mount namespace, or let mounts below %q propagate to it",
					dir, pid, its, filepath.Dir(images[0]))
			}
		}
	}
	return nil
}

// lowerdirs returns the lower directories of an overlay mount.
func lowerdirs(m *types.Mount) []string {
	for _, o := range m.Options {
		if v, ok := strings.CutPrefix(o, "lowerdir="); ok {
			return strings.Split(v, ":")
		}
	}
	return nil
}
