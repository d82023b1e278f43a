package stack

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"fmt"
	"math/big"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"syscall"
	"time"

	"github.com/google/go-containerregistry/pkg/authn"
	"github.com/google/go-containerregistry/pkg/name"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/remote"
)

// BuildDistribution builds the program of StartDistribution. For Main.
func BuildDistribution(cache string) error {
	return buildModule(cache, "distribution", ".", "distribution")
}

// The only user of a Distribution. The hash is of the cheapest kind, because every request checks the password.
const (
	DistributionUser     = "puller"
	DistributionPassword = "sesame"
	distributionHash     = "$2b$04$abcdefghijklmnopqrstuuinwY/tkBVrn3xrxQI/TgnMHhkvl85RW"
)

// Distribution is the registry program behind most registries, in a process of its own: with TLS from
// an unknown authority, and with a login.
type Distribution struct {
	host  string
	front *front
	roots *x509.CertPool
}

const distributionConfig = `version: 0.1
log: {level: error, accesslog: {disabled: true}}
storage: {filesystem: {rootdirectory: %[1]q}}
auth: {htpasswd: {realm: test, path: "%[1]s/htpasswd"}}
http:
  net: unix
  addr: %[2]q
  secret: none
  tls: {certificate: "%[1]s/server.crt", key: "%[1]s/server.key"}
`

// StartDistribution starts a registry on port 443 of the loopback interface, where its name must lead.
// A hosts.toml in HostsDir names its authority. The registry ends with the stack.
func (s *Stack) StartDistribution(host string) (*Distribution, error) {
	dir, socket := filepath.Join(s.Dir, "distribution"), s.Run+"/distribution.sock"
	hosts := filepath.Join(s.HostsDir(), host)
	for _, d := range []string{dir, hosts} {
		if err := os.MkdirAll(d, 0o755); err != nil {
			return nil, err
		}
	}
	roots, err := certify(dir, host)
	if err != nil {
		return nil, err
	}
	for path, text := range map[string]string{
		dir + "/htpasswd":   DistributionUser + ":" + distributionHash + "\n",
		dir + "/config.yml": fmt.Sprintf(distributionConfig, dir, socket),
		hosts +
			"/hosts.toml": fmt.Sprintf("server = \"https://%s\"\n[host.\"https://%[1]s\"]\n  ca = %q\n",
			host, dir+"/ca.crt"),
	} {
		if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
			return nil, err
		}
	}
	s.distribution, err = startProcess("distribution", filepath.Join(s.Dir, "distribution.log"), s.env(),
		s.tools.path("distribution"), "serve", dir+"/config.yml")
	if err != nil {
		return nil, err
	}
	err = s.distribution.await(func() error {
		c, err := net.Dial("unix", socket)
		if err == nil {
			c.Close()
		}
		return err
	})
	if err != nil {
		return nil, err
	}
	d := &Distribution{host: host, roots: roots}
	d.front, err = newFront("tcp", "127.0.0.1:443", socket)
	s.distributionFront = d.front
	return d, err
}

// HostsDir returns the directory in which nerdctl looks for hosts.toml files.
func (s *Stack) HostsDir() string { return filepath.Join(s.Dir, "hosts") }

func (s *Stack) stopDistribution() error {
	if s.distributionFront != nil {
		if err := s.distributionFront.Close(); err != nil {
			return err
		}
	}
	if s.distribution != nil {
		return s.distribution.stop(syscall.SIGTERM)
	}
	return nil
}

// Sent returns the bytes sent by the registry, including the overhead of TLS and HTTP.
func (d *Distribution) Sent() int64 { return d.front.sent.Load() }

// Push uploads an image and returns its reference.
func (d *Distribution) Push(repository, tag string, img v1.Image) (string, error) {
	ref, err := name.ParseReference(d.host + "/" + repository + ":" + tag)
	if err != nil {
		return "", err
	}
	err = remote.Write(ref, img,
		remote.WithAuth(&authn.Basic{Username: DistributionUser, Password: DistributionPassword}),
		remote.WithTransport(&http.Transport{TLSClientConfig: &tls.Config{RootCAs: d.roots}}))
	if err != nil {
		return "", fmt.Errorf("push %q: %w", ref, err)
	}
	return ref.Name(), nil
}

// certify makes an authority and its certificate for a server, in dir: ca.crt, server.crt and server.key.
func certify(dir, server string) (*x509.CertPool, error) {
	ca := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "authority of a test"}, IsCA: true,
		BasicConstraintsValid: true,
		NotBefore:             time.Now().Add(-time.Hour), NotAfter: time.Now().Add(24 * time.Hour),
		KeyUsage: x509.KeyUsageCertSign,
	}
	caKey, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, err
	}
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, err
	}
	cert := &x509.Certificate{
		SerialNumber: big.NewInt(2), Subject: pkix.Name{CommonName: server}, DNSNames: []string{server},
		NotBefore: ca.NotBefore, NotAfter: ca.NotAfter, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth},
	}
	caDER, err := x509.CreateCertificate(rand.Reader, ca, ca, &caKey.PublicKey, caKey)
	if err != nil {
		return nil, err
	}
	certDER, err := x509.CreateCertificate(rand.Reader, cert, ca, &key.PublicKey, caKey)
	if err != nil {
		return nil, err
	}
	keyDER, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		return nil, err
	}
	for _, f := range []struct {
		name, kind string
		der        []byte
	}{{"ca.crt", "CERTIFICATE", caDER}, {"server.crt", "CERTIFICATE", certDER}, {"server.key", "PRIVATE KEY", keyDER}} {
		text := pem.EncodeToMemory(&pem.Block{Type: f.kind, Bytes: f.der})
		if err := os.WriteFile(filepath.Join(dir, f.name), text, 0o600); err != nil {
			return nil, err
		}
	}
	if ca, err = x509.ParseCertificate(caDER); err != nil {
		return nil, err
	}
	roots := x509.NewCertPool()
	roots.AddCert(ca)
	return roots, nil
}
