package clientsuite

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"io"
	"log"
	"math/big"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/google/go-containerregistry/pkg/name"
	"github.com/google/go-containerregistry/pkg/registry"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/remote"
)

// upstream is a registry in place of the hosts from which containerd's tests pull.
type upstream struct {
	certificate string // file; a client that trusts it takes the registry for the hosts
	client      http.RoundTripper
}

// serveUpstream starts the registry and redirects the host names to it, in the namespaces of the tests only.
func serveUpstream(t *testing.T, hosts ...string) *upstream {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := x509.Certificate{SerialNumber: big.NewInt(1), DNSNames: hosts, NotAfter: time.Now().Add(24 * time.Hour)}
	der, err := x509.CreateCertificate(rand.Reader, &template, &template, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	listener, err := net.Listen("tcp", "127.0.0.1:443")
	if err != nil {
		t.Fatal(err)
	}
	quiet := log.New(io.Discard, "", 0)
	server := http.Server{
		Handler: registry.New(registry.Logger(quiet)), ErrorLog: quiet,
		TLSConfig: &tls.Config{Certificates: []tls.Certificate{{Certificate: [][]byte{der}, PrivateKey: key}}},
	}
	go server.ServeTLS(listener, "", "")
	t.Cleanup(func() { server.Close() })

	dir := t.TempDir()
	u := &upstream{certificate: filepath.Join(dir, "certificate.pem")}
	certificate := pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})
	names := "127.0.0.1 localhost\n"
	for _, h := range hosts {
		names += "127.0.0.1 " + h + "\n"
	}
	for file, text := range map[string][]byte{u.certificate: certificate, filepath.Join(dir, "hosts"): []byte(names)} {
		if err := os.WriteFile(file, text, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	bind(t, filepath.Join(dir, "hosts"), "/etc/hosts")

	trusted := x509.NewCertPool()
	trusted.AppendCertsFromPEM(certificate)
	transport := &http.Transport{TLSClientConfig: &tls.Config{RootCAs: trusted}}
	t.Cleanup(transport.CloseIdleConnections)
	u.client = transport
	return u
}

// push uploads an image under a name that the tests use.
func (u *upstream) push(t *testing.T, reference string, index v1.ImageIndex) {
	t.Helper()
	ref, err := name.ParseReference(reference)
	if err != nil {
		t.Fatal(err)
	}
	if err := remote.WriteIndex(ref, index, remote.WithTransport(u.client)); err != nil {
		t.Fatalf("push %q: %v", reference, err)
	}
}
