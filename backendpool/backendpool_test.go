package backendpool

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"errors"
	"math/big"
	"net"
	"strings"
	"testing"
	"time"
)

// certificate is self-signed for name.
func certificate(t *testing.T, name string, until time.Time) (tls.Certificate, *x509.CertPool) {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: name}, DNSNames: []string{name},
		IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)}, NotBefore: time.Now().Add(-2 * time.Hour), NotAfter: until,
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageDigitalSignature | x509.KeyUsageCertSign,
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	leaf, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	pool := x509.NewCertPool()
	pool.AddCert(leaf)
	return tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key}, pool
}

// serveTLS shakes hands with whoever comes.
func serveTLS(t *testing.T, c tls.Certificate) string {
	t.Helper()
	l, err := tls.Listen("tcp", "127.0.0.1:0", &tls.Config{Certificates: []tls.Certificate{c}})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = l.Close() })
	go func() {
		for {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			go func() {
				_ = conn.(*tls.Conn).Handshake()
				_ = conn.Close()
			}()
		}
	}()
	return l.Addr().String()
}

var limits = Limits{ConnectTimeout: 10 * time.Second, Logins: 1, KeepAlive: time.Minute}

func TestTLSVerifiesCAAndName(t *testing.T) {
	good, roots := certificate(t, "be1.example.org", time.Now().Add(time.Hour))
	old, oldRoots := certificate(t, "be1.example.org", time.Now().Add(-time.Hour))
	_, foreign := certificate(t, "be1.example.org", time.Now().Add(time.Hour))
	for _, test := range []struct {
		name   string
		cert   tls.Certificate
		config *tls.Config
		want   string // in the error; empty: it works
	}{
		{"right", good, &tls.Config{RootCAs: roots, ServerName: "be1.example.org"}, ""},
		{"the address's host where no name is set", good, &tls.Config{RootCAs: roots}, ""},
		{"wrong name", good, &tls.Config{RootCAs: roots, ServerName: "be2.example.org"}, `does not prove to be "be2.example.org"`},
		{"foreign CA", good, &tls.Config{RootCAs: foreign, ServerName: "be1.example.org"}, "check tls.ca"},
		{"expired", old, &tls.Config{RootCAs: oldRoots, ServerName: "be1.example.org"}, "expired"},
		{"insecure_skip_verify", old, &tls.Config{InsecureSkipVerify: true}, ""},
	} {
		t.Run(test.name, func(t *testing.T) {
			b := &Backend{Name: "a", Addresses: map[string]string{"imap": serveTLS(t, test.cert)}, TLS: TLSImplicit, TLSConfig: test.config}
			conn, err := New([]*Backend{b}, limits).Dial(t.Context(), b, "imap")
			if err == nil {
				_ = conn.Close()
			}
			if (err == nil) != (test.want == "") || err != nil && !strings.Contains(err.Error(), test.want) {
				t.Errorf("%v, want %q", err, test.want)
			}
		})
	}
}

// TestSilentBackend: one that accepts and says nothing does not hold a login
// for ever (peers.md, Zimbra and Cyrus frontends).
func TestSilentBackend(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = l.Close() }()
	b := &Backend{Name: "a", Addresses: map[string]string{"imap": l.Addr().String()}, TLS: TLSImplicit, TLSConfig: &tls.Config{}}
	short := limits
	short.ConnectTimeout = 50 * time.Millisecond
	if _, err := New([]*Backend{b}, short).Dial(t.Context(), b, "imap"); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("got %v", err)
	}
}

func TestNoAddress(t *testing.T) {
	b := &Backend{Name: "a", Addresses: map[string]string{}}
	if _, err := New([]*Backend{b}, limits).Dial(t.Context(), b, "pop3"); err == nil || !strings.Contains(err.Error(), "backend a has no pop3 address") {
		t.Errorf("got %v", err)
	}
}

func TestSlots(t *testing.T) {
	b := &Backend{Name: "a"}
	New([]*Backend{b}, limits)
	release, err := b.Slot(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := b.Slot(ctx); !errors.Is(err, context.Canceled) {
		t.Errorf("a second slot of one: %v", err)
	}
	release()
	if release, err = b.Slot(t.Context()); err != nil {
		t.Fatal(err)
	}
	release()
}
