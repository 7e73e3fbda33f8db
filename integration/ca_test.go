package integration

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"math/big"
	"net"
	"os"
	"path/filepath"
	"testing"
	"time"
)

// authority is the CA of the lab: P-256, because Cyrus 3.6 takes that curve
// only, and valid from 1990, because synctest's clock starts in 2000.
type authority struct {
	file string // its certificate, for clients
	cert *x509.Certificate
	key  *ecdsa.PrivateKey
	pool *x509.CertPool
}

func newAuthority(dir string) (*authority, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, err
	}
	template := certificate("posthouse test CA")
	template.IsCA, template.BasicConstraintsValid = true, true
	template.KeyUsage = x509.KeyUsageCertSign
	der, err := x509.CreateCertificate(rand.Reader, template, template, &key.PublicKey, key)
	if err != nil {
		return nil, err
	}
	ca := &authority{file: filepath.Join(dir, "ca.pem"), key: key, pool: x509.NewCertPool()}
	if ca.cert, err = x509.ParseCertificate(der); err != nil {
		return nil, err
	}
	ca.pool.AddCert(ca.cert)
	if err = os.MkdirAll(dir, 0o755); err != nil {
		return nil, err
	}
	return ca, os.WriteFile(ca.file, pemBlock("CERTIFICATE", der), 0o644)
}

func certificate(name string) *x509.Certificate {
	serial, _ := rand.Int(rand.Reader, new(big.Int).Lsh(big.NewInt(1), 100))
	return &x509.Certificate{
		SerialNumber: serial,
		Subject:      pkix.Name{CommonName: name},
		NotBefore:    time.Date(1990, 1, 1, 0, 0, 0, 0, time.UTC),
		NotAfter:     time.Date(2120, 1, 1, 0, 0, 0, 0, time.UTC),
	}
}

// issue writes cert.pem and key.pem for name and address into dir. The key is
// readable for everybody, since each server runs under its own user.
func (ca *authority) issue(t testing.TB, dir, name, address string) (cert, key string) {
	t.Helper()
	private, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	must(t, err)
	template := certificate(name)
	template.DNSNames, template.IPAddresses = []string{name}, []net.IP{net.ParseIP(address)}
	template.KeyUsage = x509.KeyUsageDigitalSignature
	template.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth} // an MTA has one
	der, err := x509.CreateCertificate(rand.Reader, template, ca.cert, &private.PublicKey, ca.key)
	must(t, err)
	pkcs8, err := x509.MarshalPKCS8PrivateKey(private)
	must(t, err)
	cert, key = filepath.Join(dir, "cert.pem"), filepath.Join(dir, "key.pem")
	must(t, os.WriteFile(cert, pemBlock("CERTIFICATE", der), 0o644))
	must(t, os.WriteFile(key, pemBlock("PRIVATE KEY", pkcs8), 0o644))
	return cert, key
}

func pemBlock(kind string, der []byte) []byte {
	return pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: der})
}

// client is the TLS configuration of a client that trusts the lab's CA only.
func (ca *authority) client(name string) *tls.Config {
	return &tls.Config{RootCAs: ca.pool, ServerName: name}
}
