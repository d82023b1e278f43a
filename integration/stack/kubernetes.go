package stack

import (
	"os"
	"path/filepath"
)

const (
	criToolsVersion = "v1.34.0"
	criToolsModule  = "sigs.k8s.io/cri-tools"
	runcVersion     = "v1.4.0"
	runcModule      = "github.com/opencontainers/runc"
)

// BuildCritest builds critest, the test suite for Kubernetes' container runtimes, and the program for
// the images of package kubernetes. For Main.
func BuildCritest(cache string) error {
	bin := filepath.Join(cache, "bin")
	root, err := moduleRoot()
	if err != nil {
		return err
	}
	program := goCommand(filepath.Join(root, "integration/kubernetes/testprogram"), "build", "-ldflags", "-s -w",
		"-o", filepath.Join(bin, "testprogram"), ".")
	if err := run(program); err != nil {
		return err
	}
	stamp := filepath.Join(bin, "critest.version")
	if have, err := os.ReadFile(stamp); err == nil && string(have) == criToolsVersion {
		return nil
	}
	module, err := moduleDir(criToolsModule, criToolsVersion)
	if err != nil {
		return err
	}
	build := goCommand(module, "test", "-c", "-ldflags", "-s -w", "-o", filepath.Join(bin, "critest"), "./cmd/critest")
	if err := run(build); err != nil {
		return err
	}
	return os.WriteFile(stamp, []byte(criToolsVersion), 0o644)
}

// BuildKubernetes builds etcd, kube-apiserver and kubelet, at the versions of
// integration/kubernetes/programs. For Main.
func BuildKubernetes(cache string) error {
	root, err := moduleRoot()
	if err != nil {
		return err
	}
	bin := filepath.Join(cache, "bin") + string(filepath.Separator)
	return run(goCommand(filepath.Join(root, "integration/kubernetes/programs"), "build", "-p", "2", "-ldflags",
		"-s -w", "-o", bin,
		"./etcd", "k8s.io/kubernetes/cmd/kube-apiserver", "k8s.io/kubernetes/cmd/kubelet"))
}

// RuncDir contains a runc that supports pods in a user namespace, unlike that of Debian 12.
func RuncDir(cache string) string { return filepath.Join(cache, "runc") }

// BuildRunc builds the program of RuncDir. For Main.
func BuildRunc(cache string) error {
	return program{runcModule, runcVersion, ""}.install(RuncDir(cache), "CGO_ENABLED=1",
		"GOFLAGS=-buildvcs=false -tags=seccomp")
}
