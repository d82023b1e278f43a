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

// A mount point that is not visible to whoever mounts an overlay over it is an empty directory to him, and so is the root
// of his container; nothing fails. So a caller in another mount namespace is given mounts only if the images below them
// are mounted there as well.

// peerCredentials tell which process is at the other end of a unix socket. They neither encrypt nor ask for anything.
type peerCredentials struct{}

// peerInfo is what peerCredentials know of a connection.
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
		info.pid = int(cred.Pid) // 0 if it is not to be seen from here
	}
	return conn, info, nil
}

// callerOf returns who is at the other end of a unix socket; nil if the kernel does not tell.
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

// checkVisible is a server interceptor that fails a call whose answer has mounts over an image that the caller can not see.
func (d *Daemon) checkVisible(ctx context.Context, req any, _ *grpc.UnaryServerInfo,
	handler grpc.UnaryHandler,
) (any, error) {
	resp, err := handler(ctx, req)
	if err != nil {
		return resp, err
	}
	var mounts []*types.Mount
	made := "" // the snapshot that the call made
	switch r := resp.(type) {
	case *snapshotsapi.PrepareSnapshotResponse:
		mounts, made = r.Mounts, req.(*snapshotsapi.PrepareSnapshotRequest).Key
	case *snapshotsapi.ViewSnapshotResponse:
		mounts, made = r.Mounts, req.(*snapshotsapi.ViewSnapshotRequest).Key
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
	if made != "" {
		if rerr := d.sn.Remove(context.WithoutCancel(ctx), made); rerr != nil {
			err = fmt.Errorf("%w; and its snapshot stays: %w", err, rerr)
		}
	}
	return nil, status.Error(codes.FailedPrecondition, err.Error())
}

// visible returns an error if a process does not see an image, mounted below one of the directories, that mounts stand on.
func visible(pid int, images []string, mounts []*types.Mount) error {
	own, err := os.Readlink("/proc/self/ns/mnt")
	if err != nil {
		return nil // without /proc nothing can be told
	}
	its, err := os.Readlink(fmt.Sprintf("/proc/%d/ns/mnt", pid))
	if err != nil || its == own {
		return nil // it is gone, or sees what we see
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
				return fmt.Errorf("image %q is mounted here and not in the mount namespace of the caller (process %d, %s): "+
					"run both in one mount namespace, or let mounts below %q propagate to it", dir, pid, its,
					filepath.Dir(images[0]))
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
