// Package kubernetes runs critest on containerd with daxfs and beside it with overlayfs, a kubelet on daxfs, and an API
// server that is asked about docs/kubernetes. It takes minutes, so "make test" leaves it out and "make test-kubernetes"
// runs it: its tests have the build tag "kubernetes".
package kubernetes
