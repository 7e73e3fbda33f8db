// Package backendpool gets to a backend: it dials, verifies TLS, retries, and
// bounds how many logins a backend is asked for at once. It knows no roles and
// no users: which backend is somebody else's decision, and there is never a
// second choice.
package backendpool

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"net"
	"slices"
	"sync/atomic"
	"time"
)

// TLSMode says how TLS begins on the way to a backend.
type TLSMode string

const (
	TLSOff      TLSMode = "off"      // plaintext; only where the operator says so
	TLSStartTLS TLSMode = "starttls" // by the protocol's command
	TLSImplicit TLSMode = "implicit" // at once
)

// Style says in whose name posthouse logs in to a backend.
type Style string

const (
	// StyleAuthzid: the proxy user's credentials with the user as SASL
	// authorization identity (Cyrus: proxyservers).
	StyleAuthzid Style = "authzid"
	// StyleMasterUser: the proxy user's password under the name
	// user*proxyuser (Dovecot: auth_master_user_separator = *).
	StyleMasterUser Style = "master-user"
	// StyleReplay: the client's own password.
	StyleReplay Style = "replay"
)

// Backend is one mail server instance, as the configuration describes it. It
// is not changed after New, except by SetPassword.
type Backend struct {
	Name string
	// Addresses by service: imap, pop3, sieve, lmtp → host:port.
	Addresses map[string]string
	TLS       TLSMode
	// LMTPTLS, if not empty, is that of the lmtp service: Cyrus has no
	// STARTTLS there where it takes mail without authentication.
	LMTPTLS TLSMode
	// TLSConfig verifies the backend; nil only with TLSOff. Where it has no
	// ServerName the certificate must be for the address's host.
	TLSConfig *tls.Config
	Style     Style
	// User is the proxy user; unused with StyleReplay.
	User string
	// EOFProves: the operator states that this backend ends its stream only
	// after everything that it had read is executed (done: eof).
	EOFProves bool

	password atomic.Pointer[string]
	tls      map[string]*tls.Config // by service
	slots    chan struct{}
}

// TLSOf says how TLS begins on a service.
func (b *Backend) TLSOf(service string) TLSMode {
	if service == "lmtp" && b.LMTPTLS != "" {
		return b.LMTPTLS
	}
	return b.TLS
}

// SetPassword replaces the proxy user's password. It is safe at any time.
func (b *Backend) SetPassword(password string) { b.password.Store(&password) }

// Password returns the proxy user's password; empty with StyleReplay.
func (b *Backend) Password() string {
	if p := b.password.Load(); p != nil {
		return *p
	}
	return ""
}

// Limits bound the way to each backend.
type Limits struct {
	// ConnectTimeout bounds the TCP connect and the TLS handshake, each.
	ConnectTimeout time.Duration
	// Logins is how many logins may be in flight to one backend: everybody
	// reconnecting at once must not be its second outage.
	Logins int
	// KeepAlive is the TCP keepalive period: shorter than ipvs forgets an
	// idle flow (900 s).
	KeepAlive time.Duration
}

// Pool holds the backends by name. It is safe for concurrent use.
type Pool struct {
	backends map[string]*Backend
	limits   Limits
}

// New makes a pool of backends, which it owns from then on.
func New(backends []*Backend, limits Limits) *Pool {
	p := &Pool{backends: make(map[string]*Backend, len(backends)), limits: limits}
	for _, b := range backends {
		b.slots = make(chan struct{}, max(limits.Logins, 1))
		b.tls = make(map[string]*tls.Config)
		for service, address := range b.Addresses {
			if b.TLSConfig == nil {
				continue
			}
			b.tls[service] = b.TLSConfig
			if b.TLSConfig.ServerName == "" {
				host, _, _ := net.SplitHostPort(address)
				b.tls[service] = b.TLSConfig.Clone()
				b.tls[service].ServerName = host
			}
		}
		p.backends[b.Name] = b
	}
	return p
}

// Backend returns the backend of that name.
func (p *Pool) Backend(name string) (*Backend, bool) {
	b, ok := p.backends[name]
	return b, ok
}

// Names lists the backends, sorted.
func (p *Pool) Names() []string {
	names := make([]string, 0, len(p.backends))
	for name := range p.backends {
		names = append(names, name)
	}
	slices.Sort(names)
	return names
}

// Dial connects to a backend's service and, with TLSImplicit, returns a
// *tls.Conn whose peer is verified. The caller closes the connection. It
// blocks for at most twice ConnectTimeout, or until ctx ends.
func (p *Pool) Dial(ctx context.Context, b *Backend, service string) (net.Conn, error) {
	address, ok := b.Addresses[service]
	if !ok {
		return nil, fmt.Errorf("backend %s has no %s address: add it to the configuration", b.Name, service)
	}
	d := net.Dialer{
		Timeout:         p.limits.ConnectTimeout,
		KeepAliveConfig: net.KeepAliveConfig{Enable: true, Idle: p.limits.KeepAlive, Interval: p.limits.KeepAlive},
	}
	conn, err := d.DialContext(ctx, "tcp", address)
	if err != nil {
		return nil, fmt.Errorf("connect to backend %s: %w", b.Name, err)
	}
	if b.TLSOf(service) != TLSImplicit {
		return conn, nil
	}
	secured, err := p.Secure(ctx, b, service, conn)
	if err != nil {
		_ = conn.Close()
		return nil, err
	}
	return secured, nil
}

// Secure plays the TLS client over conn and verifies the backend. It blocks
// for at most ConnectTimeout, or until ctx ends. On an error the caller still
// owns conn.
func (p *Pool) Secure(ctx context.Context, b *Backend, service string, conn net.Conn) (*tls.Conn, error) {
	config := b.tls[service]
	if config == nil {
		return nil, fmt.Errorf("backend %s is configured without TLS", b.Name)
	}
	ctx, cancel := context.WithTimeout(ctx, p.limits.ConnectTimeout)
	defer cancel()
	secured := tls.Client(conn, config)
	if err := secured.HandshakeContext(ctx); err != nil {
		var wrong *tls.CertificateVerificationError
		if errors.As(err, &wrong) {
			return nil, fmt.Errorf("backend %s does not prove to be %q, check tls.ca and tls.server_name: %w",
				b.Name, config.ServerName, err)
		}
		return nil, fmt.Errorf("TLS with backend %s: %w", b.Name, err)
	}
	return secured, nil
}

// Slot waits for one of the backend's login slots and returns what gives it
// back. It blocks until ctx ends.
func (b *Backend) Slot(ctx context.Context) (release func(), err error) {
	select {
	case b.slots <- struct{}{}:
		return func() { <-b.slots }, nil
	case <-ctx.Done():
		return nil, fmt.Errorf("backend %s: all %d login slots are in use: %w", b.Name, cap(b.slots), ctx.Err())
	}
}
