package proxy

import (
	"bufio"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"errors"
	"fmt"
	"io"
	"math/big"
	"net"
	"os"
	"path/filepath"
	"regexp"
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
	"github.com/posthouse/posthouse/proxy/splice"
	"github.com/posthouse/posthouse/routing"
	"github.com/posthouse/posthouse/routing/directory"
	"github.com/posthouse/posthouse/routing/filestore"
	"github.com/posthouse/posthouse/routing/statedir"
)

// TestTranscripts plays every testdata/<protocol>/*.txt: a client and a
// scripted backend, with the real server between them.
//
// A line is one step, in order. `S: ` expects a line at the client, `C: `
// sends one from it; `>: ` expects one at the backend, `<: ` sends one from
// it. CRLF is added. `C~ `, `<~ ` send a Go-quoted string as it is. `$name` in
// an expected line matches a word and remembers it, elsewhere it stands for
// it; `...` matches anything. The other steps:
//
//	C! tls      the client does its handshake      >! tls     so does the backend
//	C! close    the client closes                  <! close   so does the backend
//	C! half     the client half-closes             <! reset   the backend resets
//	S! eof      the client sees a clean end        >! eof     so does the backend
//	>! accept   the backend gets a connection      >! none    it has got none
//	S~ "a"      the client gets these octets       >~ "a"     so does the backend
//	C! endless  a line of twice the limit          <! endless so does the backend
//	kick        the administrator ends all sessions
//	switch      role r1 is switched to backend b; it goes on in the background
//	opened      the switch has ended well          aborted    it has not
//	log TEXT    a log line contains TEXT           residue N  the table knows N residues
//	silent TEXT no log line contains TEXT
//
// Settings come first: `listener: starttls|implicit` (default implicit, after
// the handshake and the greeting of the client), `backend: off|starttls|
// implicit`, `style: authzid|master-user|replay`, `done: logout|eof`,
// `auth: file|backend`, `shared: TOKENS` announced by the actives,
// `limits: NAME=DURATION`.
func TestTranscripts(t *testing.T) {
	files, err := filepath.Glob("testdata/*/*.txt")
	if err != nil || len(files) == 0 {
		t.Fatalf("no transcripts: %v", err)
	}
	for _, file := range files {
		protocol := filepath.Base(filepath.Dir(file))
		name := strings.TrimSuffix(filepath.Base(file), ".txt")
		t.Run(protocol+"/"+name, func(t *testing.T) {
			t.Parallel()
			text, err := os.ReadFile(file)
			if err != nil {
				t.Fatal(err)
			}
			play(t, protocol, string(text))
		})
	}
}

// patience bounds each step: long enough for a loaded machine under -race.
const patience = 20 * time.Second

// peer is one side of a transcript.
type peer struct {
	name string
	conn net.Conn
	r    *bufio.Reader
}

func newPeer(name string, conn net.Conn) *peer {
	_ = conn.SetDeadline(time.Now().Add(patience))
	return &peer{name: name, conn: conn, r: bufio.NewReader(conn)}
}

func (p *peer) line() (string, error) {
	text, err := p.r.ReadString('\n')
	if err != nil {
		return text, err
	}
	if !strings.HasSuffix(text, "\r\n") {
		return text, fmt.Errorf("line %q does not end with CRLF", text)
	}
	return strings.TrimSuffix(text, "\r\n"), nil
}

type transcript struct {
	t         *testing.T
	site      *site
	client    *peer
	backend   *peer
	vars      map[string]string
	switching chan error
}

func play(t *testing.T, protocol, text string) {
	settings := map[string]string{
		"listener": "implicit", "backend": "off", "style": "authzid", "done": "logout", "auth": "file", "shared": "", "limits": "", "greeting": "eaten", "connections": "4",
	}
	lines := strings.Split(text, "\n")
	first := 0
	for ; first < len(lines); first++ {
		line := strings.TrimSpace(lines[first])
		if line == "" || strings.HasPrefix(line, "#") {
			continue
		}
		key, value, _ := strings.Cut(line, ":")
		if _, known := settings[key]; !known {
			break
		}
		settings[key] = strings.TrimSpace(value)
	}
	s := newSite(t, protocol, settings)
	tr := &transcript{t: t, site: s, vars: make(map[string]string)}
	tr.client = newPeer("client", s.dial(t))
	if settings["listener"] == "implicit" {
		tr.handshake()
	}
	if settings["greeting"] == "eaten" {
		tr.eatGreeting(protocol)
	}
	for n, line := range lines[first:] {
		if line == "" || strings.HasPrefix(line, "#") {
			continue
		}
		if err := tr.step(line); err != nil {
			t.Fatalf("line %d, %s: %v\n%s", first+n+1, line, err, s.logged())
		}
	}
	s.finish(t, tr)
}

func (tr *transcript) eatGreeting(protocol string) {
	for {
		line, err := tr.client.line()
		if err != nil {
			tr.t.Fatalf("greeting: %v\n%s", err, tr.site.logged())
		}
		if protocol != "sieve" || strings.HasPrefix(line, "OK") {
			return
		}
	}
}

func (tr *transcript) handshake() {
	secured := tls.Client(tr.client.conn, &tls.Config{RootCAs: testRoots, ServerName: "localhost"})
	if err := secured.Handshake(); err != nil {
		tr.t.Fatalf("client TLS: %v\n%s", err, tr.site.logged())
	}
	tr.client = newPeer("client", secured)
}

func (tr *transcript) step(line string) error {
	word, rest, _ := strings.Cut(line, " ")
	switch word {
	case "S:":
		return tr.expect(tr.client, rest)
	case ">:":
		return tr.expect(tr.backend, rest)
	case "C:":
		return send(tr.client, tr.fill(rest)+"\r\n")
	case "<:":
		return send(tr.backend, tr.fill(rest)+"\r\n")
	case "S~":
		return expectOctets(tr.client, rest)
	case ">~":
		return expectOctets(tr.backend, rest)
	case "C~", "<~":
		text, err := strconv.Unquote(rest)
		if err != nil {
			return err
		}
		if word == "C~" {
			return send(tr.client, tr.fill(text))
		}
		return send(tr.backend, tr.fill(text))
	case "C!", "<!", ">!", "S!":
		return tr.act(line)
	case "kick":
		tr.site.server.sessions.endAll(splice.Kicked)
		return nil
	case "switch":
		tr.switching = make(chan error, 1)
		go func() {
			_, err := tr.site.table.Switch(context.Background(), routing.SwitchRequest{Role: "r1", To: "b", Who: "test"}, nil)
			tr.switching <- err
		}()
		return tr.site.waitFor(func() bool { return tr.site.table.Snapshot().Roles["r1"].Phase != routing.PhaseOpen })
	case "opened":
		return <-tr.switching
	case "aborted":
		if err := <-tr.switching; err == nil {
			return errors.New("the switch went through")
		}
		return nil
	case "log":
		return tr.site.waitFor(func() bool { return strings.Contains(tr.site.logged(), rest) })
	case "silent":
		if strings.Contains(tr.site.logged(), rest) {
			return errors.New("it was logged")
		}
		return nil
	case "residue":
		return tr.site.waitFor(func() bool {
			r := tr.site.table.Roles()[0]
			return fmt.Sprint(len(r.Unhanded)+len(r.Residues)) == rest && r.Inside == 0
		})
	}
	return errors.New("no such step")
}

func (tr *transcript) act(line string) (err error) {
	switch line {
	case "C! tls":
		tr.handshake()
	case "C! close":
		err = tr.client.conn.Close()
	case "C! half":
		err = tr.client.conn.(interface{ CloseWrite() error }).CloseWrite()
	case "C! reset":
		reset(tr.client.conn)
	case "S! eof":
		err = atEnd(tr.client)
	case ">! accept":
		tr.backend, err = tr.site.accept()
	case ">! tls":
		secured := tls.Server(tr.backend.conn, &tls.Config{Certificates: []tls.Certificate{testCertificate}})
		if err = secured.Handshake(); err == nil {
			tr.backend = newPeer("backend", secured)
		}
	case ">! none":
		select {
		case <-tr.site.accepted:
			err = errors.New("the backend was connected to")
		default:
		}
	case "<! close":
		err = tr.backend.conn.Close()
	case "<! reset":
		reset(tr.backend.conn)
	case "C! endless", "<! endless":
		p := tr.client
		if line[0] == '<' {
			p = tr.backend
		}
		_, _ = io.WriteString(p.conn, strings.Repeat("x", 2*maxLine)) // it may be cut off meanwhile
	case ">! eof":
		err = atEnd(tr.backend)
	default:
		err = errors.New("no such step")
	}
	return err
}

func reset(conn net.Conn) {
	if t, ok := conn.(*tls.Conn); ok {
		conn = t.NetConn()
	}
	_ = conn.(*net.TCPConn).SetLinger(0)
	_ = conn.Close()
}

// atEnd expects a clean end: EOF after a close_notify where TLS is on.
func atEnd(p *peer) error {
	rest, err := io.ReadAll(p.r)
	if err != nil {
		return fmt.Errorf("no clean end: %w", err)
	}
	if len(rest) > 0 {
		return fmt.Errorf("%q came before the end", rest)
	}
	return nil
}

func send(p *peer, text string) error {
	_, err := io.WriteString(p.conn, text)
	return err
}

func expectOctets(p *peer, quoted string) error {
	text, err := strconv.Unquote(quoted)
	if err != nil {
		return err
	}
	got := make([]byte, len(text))
	if _, err := io.ReadFull(p.r, got); err != nil || string(got) != text {
		return fmt.Errorf("got %q: %w", got, err)
	}
	return nil
}

var variable = regexp.MustCompile(`\$[a-z]+`)

func (tr *transcript) fill(text string) string {
	return variable.ReplaceAllStringFunc(text, func(name string) string {
		if value, ok := tr.vars[name]; ok {
			return value
		}
		return name
	})
}

func (tr *transcript) expect(p *peer, want string) error {
	if p == nil {
		return errors.New("the backend was not connected to yet")
	}
	got, err := p.line()
	if err != nil {
		return fmt.Errorf("got %q: %w", got, err)
	}
	var names []string
	pattern := regexp.QuoteMeta(tr.fill(want))
	pattern = strings.ReplaceAll(pattern, `\.\.\.`, `.*`)
	pattern = regexp.MustCompile(`\\\$[a-z]+`).ReplaceAllStringFunc(pattern, func(name string) string {
		names = append(names, name[1:])
		return `(\S+)`
	})
	found := regexp.MustCompile("^" + pattern + "$").FindStringSubmatch(got)
	if found == nil {
		return fmt.Errorf("got  %q", got)
	}
	for i, name := range names {
		tr.vars[name] = found[i+1]
	}
	return nil
}

// site is a server with a role r1 on backend a, replica b, both scripted.
type site struct {
	server   *Server
	table    *routing.Table
	logs     *observer.ObservedLogs
	listener net.Listener
	backends net.Listener
	accepted chan *peer

	mu    sync.Mutex
	peers []*peer // all backends that were ever accepted
}

func newSite(t *testing.T, protocol string, settings map[string]string) *site {
	t.Helper()
	core, logs := observer.New(zapcore.DebugLevel)
	s := &site{logs: logs, accepted: make(chan *peer, 8), listener: listen(t), backends: listen(t)}
	pool := backendpool.New([]*backendpool.Backend{s.backend("a", protocol, settings), s.backend("b", protocol, settings)},
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
		WriteTimeout:        patience, KeepAlive: time.Minute, MaxConnections: connections, MaxConnectionsPerIP: connections,
	}
	var verifier auth.Verifier = &auth.Backend{}
	if settings["auth"] == "file" {
		verifier = fileVerifier(t)
	}
	s.server = New(Options{
		Hostname: "mail.example.org", TLS: &tls.Config{Certificates: []tls.Certificate{testCertificate}, MinVersion: tls.VersionTLS12},
		Listeners: []Listener{{Protocol: protocol, Implicit: settings["listener"] == "implicit", Listener: s.listener}},
		Verifier:  verifier, Table: s.table, Backends: pool, Limits: limits,
		Logger: zap.New(core), Metrics: NewMetrics(prometheus.NewRegistry()),
	})
	if shared := settings["shared"]; shared != "" {
		s.server.offers.learn(protocol, "a", strings.Split(shared, ","))
	}
	go s.acceptBackends()
	ctx, cancel := context.WithCancel(context.Background())
	serving := make(chan struct{})
	go func() { defer close(serving); s.server.Serve(ctx) }()
	t.Cleanup(func() {
		cancel()
		<-serving
		s.end(t)
	})
	return s
}

func (s *site) backend(name, protocol string, settings map[string]string) *backendpool.Backend {
	b := &backendpool.Backend{
		Name: name, Addresses: map[string]string{protocol: s.backends.Addr().String()}, TLS: backendpool.TLSMode(settings["backend"]),
		Style: backendpool.Style(settings["style"]), User: "proxy", EOFProves: settings["done"] == "eof",
	}
	b.SetPassword("secret")
	if b.TLS != backendpool.TLSOff {
		b.TLSConfig = &tls.Config{RootCAs: testRoots, ServerName: "localhost"}
	}
	return b
}

func (s *site) startTable(t *testing.T, settings map[string]string, pool *backendpool.Pool, log *zap.Logger) *routing.Table {
	t.Helper()
	dir, err := statedir.Open(filepath.Join(t.TempDir(), "state"))
	if err != nil {
		t.Fatal(err)
	}
	store, err := filestore.Open(dir)
	if err != nil {
		t.Fatal(err)
	}
	users := filepath.Join(t.TempDir(), "users.map")
	if err := os.WriteFile(users, []byte("alice: r1\nbob: r1\n"), 0o600); err != nil {
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
	table, err := routing.Start(t.Context(), routing.Options{
		ID: routing.NewID("test"), Store: store, Directory: directory.Chain{file}, Local: dir, Backends: addresses,
		HoldWindow:   limitOf(t, settings, "window", patience),
		SwitchBudget: limitOf(t, settings, "budget", patience),
		Roles:        map[string]routing.RoleConfig{"r1": {Members: []string{"a", "b"}, Active: "a"}},
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

func limitOf(t *testing.T, settings map[string]string, name string, otherwise time.Duration) time.Duration {
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

func fileVerifier(t *testing.T) auth.Verifier {
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

func listen(t *testing.T) net.Listener {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	return l
}

func (s *site) dial(t *testing.T) net.Conn {
	t.Helper()
	conn, err := net.Dial("tcp", s.listener.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = conn.Close() })
	return conn
}

func (s *site) acceptBackends() {
	for {
		conn, err := s.backends.Accept()
		if err != nil {
			return
		}
		p := newPeer("backend", conn)
		s.mu.Lock()
		s.peers = append(s.peers, p)
		s.mu.Unlock()
		s.accepted <- p
	}
}

func (s *site) accept() (*peer, error) {
	select {
	case p := <-s.accepted:
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
	_ = tr.client.conn.Close()
	if tr.backend != nil {
		_ = tr.backend.conn.Close()
	}
	if err := s.waitFor(func() bool { return s.server.sessions.count() == 0 && s.table.Counters().Inside == 0 }); err != nil {
		t.Errorf("sessions or stays are left: %v\n%s", s.server.Sessions(), s.logged())
	}
	if err := s.server.Check(); err != nil {
		t.Error(err)
	}
	if strings.Contains(s.logged(), "wonder land") || strings.Contains(s.logged(), "d29uZGVyIGxhbmQ") {
		t.Error("a password was logged") // G10
	}
}

func (s *site) end(t *testing.T) {
	_ = s.backends.Close()
	s.mu.Lock()
	for _, p := range s.peers {
		_ = p.conn.Close()
	}
	s.mu.Unlock()
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	if err := s.server.Shutdown(ctx); err != nil {
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
