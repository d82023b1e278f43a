// Package kubernetes runs critest on containerd with daxfs and, beside it, with overlayfs, a kubelet
// on daxfs, and an API server that validates docs/kubernetes. It takes minutes, so its tests have the
// build tag "kubernetes": "make test" leaves them out and "make test-kubernetes" runs them.
package kubernetes
