package proxy

import (
	"cmp"
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
	"net/netip"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"
	"go.uber.org/zap/zaptest/observer"

	"github.com/posthouse/posthouse/backendpool"
	"github.com/posthouse/posthouse/proxy/auth"
	"github.com/posthouse/posthouse/routing"
	"github.com/posthouse/posthouse/routing/directory"
	"github.com/posthouse/posthouse/routing/filestore"
	"github.com/posthouse/posthouse/routing/statedir"
)

// site is a server with a role r1 on backend a, replica b, both scripted: behind
// one listener, or, for LMTP, behind one each, with a role r2 on c and d, and r3 on e.
type site struct {
	server   *Server
	table    *routing.Table
	logs     *observer.ObservedLogs
	listener net.Listener
	backends map[string]net.Listener
	accepted map[string]chan *peer
	stop     context.CancelFunc // ends Serve, as SIGTERM does first
	shut     func() error       // Shutdown, once

	mu    sync.Mutex
	peers []*peer // all backends that were ever accepted
}

func newSite(t testing.TB, protocol string, settings map[string]string) *site {
	t.Helper()
	core, logs := observer.New(zapcore.DebugLevel)
	s := &site{logs: logs, accepted: make(map[string]chan *peer), listener: listen(t), backends: make(map[string]net.Listener)}
	names := []string{"a", "b"}
	if protocol == "lmtp" {
		names = []string{"a", "b", "c", "d", "e"}
	}
	var list []*backendpool.Backend
	for _, name := range names {
		list = append(list, s.backend(t, name, protocol, settings))
	}
	pool := backendpool.New(list,
		backendpool.Limits{ConnectTimeout: limitOf(t, settings, "connect", patience), Logins: 8, KeepAlive: time.Minute})
	s.table = s.startTable(t, settings, pool, zap.New(core))
	connections, err := strconv.Atoi(settings["connections"])
	if err != nil {
		t.Fatal(err)
	}
	limits := Limits{
		PreauthTimeout: limitOf(t, settings, "preauth", patience), AuthTries: 3, BadCommands: 5, AuthFailureDelay: time.Millisecond,
		ConnectTimeout:      limitOf(t, settings, "connect", patience),
		BackendLoginTimeout: limitOf(t, settings, "login", patience),
		IdleTimeout:         limitOf(t, settings, "idle", patience),
		DrainTimeout:        limitOf(t, settings, "drain", patience),
		WriteTimeout:        limitOf(t, settings, "write", patience), KeepAlive: time.Minute, MaxConnections: connections, MaxConnectionsPerIP: connections,
	}
	var verifier auth.Verifier = &auth.Backend{}
	if settings["auth"] == "file" {
		verifier = fileVerifier(t)
	}
	s.server = New(Options{
		Hostname: "mail.example.org", TLS: &tls.Config{Certificates: []tls.Certificate{testCertificate}, MinVersion: tls.VersionTLS12},
		Listeners: []Listener{{Protocol: protocol, Implicit: settings["listener"] == "implicit", Listener: s.listener, LMTP: lmtpListener(protocol, settings)}},
		LMTP:      lmtpOptions(t, settings),
		Verifier:  verifier, Table: s.table, Backends: pool, Limits: limits,
		Logger: zap.New(core), Metrics: NewMetrics(prometheus.NewRegistry()),
	})
	if shared := settings["shared"]; shared != "" {
		ofA, ofC, two := strings.Cut(shared, " / ")
		s.server.offers.learn(protocol, "a", strings.Split(ofA, ","))
		if two {
			s.server.offers.learn(protocol, "c", strings.Split(ofC, ","))
		}
	}
	for name, l := range s.backends {
		go s.acceptBackends(name, l)
	}
	ctx, cancel := context.WithCancel(context.Background())
	serving := make(chan struct{})
	go func() { defer close(serving); s.server.Serve(ctx) }()
	s.shut = sync.OnceValue(func() error {
		cancel()
		<-serving
		ctx, cancel := context.WithTimeout(context.Background(), patience)
		defer cancel()
		return s.server.Shutdown(ctx)
	})
	s.stop = func() { go func() { _ = s.shut() }() }
	t.Cleanup(func() { s.end(t) })
	return s
}

func lmtpListener(protocol string, settings map[string]string) *LMTPListener {
	if protocol != "lmtp" {
		return nil
	}
	l := &LMTPListener{BareNewline: settings["bare"], StartTLS: settings["listener"] == "starttls", NeedsTLS: settings["listener"] == "starttls"}
	if settings["certificates"] == "demanded" {
		l.ClientCAs = testRoots
	}
	if settings["peer"] == "trusted" {
		l.Trusted = []netip.Prefix{netip.MustParsePrefix("127.0.0.0/8")}
	}
	return l
}

func lmtpOptions(t testing.TB, settings map[string]string) LMTPOptions {
	recipients, err := strconv.Atoi(cmp.Or(settings["recipients"], "100"))
	berths, bad := strconv.Atoi(cmp.Or(settings["berths"], "4"))
	if err := errors.Join(err, bad); err != nil {
		t.Fatal(err)
	}
	return LMTPOptions{
		MaxSize: 1 << 20, MaxRecipients: recipients, MaxHops: 5, MaxLine: 8000, MaxConnections: berths,
		IdleTimeout: patience, CommandTimeout: limitOf(t, settings, "command", patience), ReplyTimeout: limitOf(t, settings, "reply", patience),
		Hold: limitOf(t, settings, "hold", patience), MaxLag: limitOf(t, settings, "lag", time.Second), SpoolDir: t.TempDir(), MaxSpool: 1 << 30,
		Delimiter: "+", LocalDomains: []string{"example.org"}, Postmaster: "bob", Names: auth.Normalizer{Lowercase: true},
	}
}

func (s *site) backend(t testing.TB, name, protocol string, settings map[string]string) *backendpool.Backend {
	at := "" // where transcripts look for it
	if protocol == "lmtp" {
		at = name
	}
	if s.backends[at] == nil {
		s.backends[at], s.accepted[at] = listen(t), make(chan *peer, 8)
	}
	b := &backendpool.Backend{
		Name: name, Addresses: map[string]string{protocol: s.backends[at].Addr().String()}, TLS: backendpool.TLSMode(settings["backend"]),
		Style: backendpool.Style(settings["style"]), User: "proxy", EOFProves: settings["done"] == "eof",
	}
	b.SetPassword("secret")
	if b.TLS != backendpool.TLSOff {
		b.TLSConfig = &tls.Config{RootCAs: testRoots, ServerName: "localhost"}
	}
	return b
}

func (s *site) startTable(t testing.TB, settings map[string]string, pool *backendpool.Pool, log *zap.Logger) *routing.Table {
	t.Helper()
	dir, err := statedir.Open(filepath.Join(t.TempDir(), "state"))
	if err != nil {
		t.Fatal(err)
	}
	store, err := filestore.Open(dir, nil)
	if err != nil {
		t.Fatal(err)
	}
	users := filepath.Join(t.TempDir(), "users.map")
	if err := os.WriteFile(users, []byte("alice: r1\nbob: r1\ndave@example.org: r1\ncarol: r2\nerin: r3\nteam@example.org -> alice\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	file, err := directory.NewFile(users, nil)
	if err != nil {
		t.Fatal(err)
	}
	addresses := make(map[string]map[string]string)
	for _, name := range pool.Names() {
		b, _ := pool.Backend(name)
		addresses[name] = b.Addresses
	}
	roles := map[string]routing.RoleConfig{"r1": {Members: []string{"a", "b"}, Active: "a"}}
	if addresses["c"] != nil {
		roles["r2"] = routing.RoleConfig{Members: []string{"c", "d"}, Active: "c"}
		roles["r3"] = routing.RoleConfig{Members: []string{"e"}, Active: "e"}
	}
	table, err := routing.Start(t.Context(), routing.Options{
		ID: routing.NewID("test"), Store: store, Directory: directory.Chain{unsure{}, file}, Local: dir, Backends: addresses,
		HoldWindow:   limitOf(t, settings, "window", patience),
		SwitchBudget: limitOf(t, settings, "budget", patience),
		Roles:        roles,
		Logger:       log,
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := errors.Join(table.Check(), table.Close(context.Background()), store.Close(), dir.Close()); err != nil {
			t.Error(err)
		}
	})
	return table
}

// unsure cannot tell whether the user "unsure" exists.
type unsure struct{}

func (unsure) Lookup(_ context.Context, name string) (routing.Entry, error) {
	if strings.HasPrefix(name, "unsure") {
		return routing.Entry{}, errors.New("the directory does not answer")
	}
	return routing.Entry{}, routing.ErrUnknownUser
}

func limitOf(t testing.TB, settings map[string]string, name string, otherwise time.Duration) time.Duration {
	t.Helper()
	for field := range strings.FieldsSeq(settings["limits"]) {
		key, value, _ := strings.Cut(field, "=")
		if key != name {
			continue
		}
		d, err := time.ParseDuration(value)
		if err != nil {
			t.Fatal(err)
		}
		return d
	}
	return otherwise
}

func fileVerifier(t testing.TB) auth.Verifier {
	t.Helper()
	path := filepath.Join(t.TempDir(), "users.passwd")
	if err := os.WriteFile(path, []byte("alice:{PLAIN}wonder land\nbob:{PLAIN}builder\nnobody:{PLAIN}nowhere\nmaster:{PLAIN}mistress\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	f, err := auth.OpenFile(path, auth.FileOptions{Masters: []string{"master"}})
	if err != nil {
		t.Fatal(err)
	}
	return f
}

func listen(t testing.TB) net.Listener {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	return l
}

func (s *site) dial(t testing.TB) net.Conn {
	t.Helper()
	conn, err := net.Dial("tcp", s.listener.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = conn.Close() })
	return conn
}

func (s *site) acceptBackends(name string, l net.Listener) {
	for {
		conn, err := l.Accept()
		if err != nil {
			return
		}
		p := newPeer("backend", conn)
		s.mu.Lock()
		s.peers = append(s.peers, p)
		s.mu.Unlock()
		s.accepted[name] <- p
	}
}

func (s *site) accept(name string) (*peer, error) {
	select {
	case p := <-s.accepted[name]:
		return p, nil
	case <-time.After(patience):
		return nil, errors.New("nobody connected to the backend")
	}
}

// waitFor polls what the server does on its own, until it holds.
func (s *site) waitFor(holds func() bool) error {
	for end := time.Now().Add(patience); !holds(); {
		if time.Now().After(end) {
			return errors.New("it did not happen")
		}
		<-time.After(2 * time.Millisecond)
	}
	return nil
}

func (s *site) logged() string {
	var b strings.Builder
	encoder := zapcore.NewConsoleEncoder(zap.NewProductionEncoderConfig())
	for _, e := range s.logs.All() {
		line, err := encoder.EncodeEntry(e.Entry, e.Context)
		if err == nil {
			b.WriteString(line.String())
		}
	}
	return b.String()
}

// finish closes both sides and expects that nothing is left of the session.
func (s *site) finish(t *testing.T, tr *transcript) {
	t.Helper()
	for _, c := range tr.clients {
		_ = c.conn.Close()
	}
	for _, b := range tr.backends {
		if b != nil {
			_ = b.conn.Close()
		}
	}
	if err := s.waitFor(func() bool { return s.server.sessions.count() == 0 && s.table.Counters().Inside == 0 }); err != nil {
		t.Errorf("sessions or stays are left: %v\n%s", s.server.Sessions(), s.logged())
	}
	if err := errors.Join(s.server.Check(), s.server.lmtp.reuse.Check()); err != nil {
		t.Error(err)
	}
	for name := range s.accepted {
		// What was idle while the frontend stopped is being closed.
		if err := s.waitFor(func() bool { inUse, _ := s.server.lmtp.reuse.Counts(name); return inUse == 0 }); err != nil {
			t.Errorf("connections to backend %s are in use by nobody\n%s", name, s.logged())
		}
	}
	if strings.Contains(s.logged(), "wonder land") || strings.Contains(s.logged(), "d29uZGVyIGxhbmQ") {
		t.Error("a password was logged") // G10
	}
}

func (s *site) end(t testing.TB) {
	for _, l := range s.backends {
		_ = l.Close()
	}
	s.mu.Lock()
	for _, p := range s.peers {
		_ = p.conn.Close()
	}
	s.mu.Unlock()
	if err := s.shut(); err != nil {
		t.Errorf("%v\n%s", err, s.logged())
	}
}

var testCertificate, testRoots = newCertificate()

// newCertificate is valid from 1990, because the clock of synctest starts in
// 2000.
func newCertificate() (tls.Certificate, *x509.CertPool) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		panic(err)
	}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "localhost"}, DNSNames: []string{"localhost"},
		NotBefore: time.Date(1990, 1, 1, 0, 0, 0, 0, time.UTC), NotAfter: time.Date(2100, 1, 1, 0, 0, 0, 0, time.UTC),
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageDigitalSignature | x509.KeyUsageCertSign,
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		panic(err)
	}
	leaf, err := x509.ParseCertificate(der)
	if err != nil {
		panic(err)
	}
	pool := x509.NewCertPool()
	pool.AddCert(leaf)
	return tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key, Leaf: leaf}, pool
}
