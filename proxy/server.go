// Package proxy serves clients: one connection from Accept to Close. The login
// is session.go, the same for every protocol; a protocol is its dialect.
package proxy

import (
	"context"
	"crypto"
	"crypto/rand"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"runtime"
	"slices"
	"sync"
	"time"

	"go.uber.org/zap"

	"github.com/posthouse/posthouse/backendpool"
	"github.com/posthouse/posthouse/proxy/auth"
	"github.com/posthouse/posthouse/proxy/splice"
	"github.com/posthouse/posthouse/proxy/spool"
	"github.com/posthouse/posthouse/routing"
)

// Listener is one address on which a protocol is served.
type Listener struct {
	// Protocol is "imap", "pop3", "sieve" or "lmtp".
	Protocol string
	// Implicit: TLS begins at once; otherwise by the protocol's command.
	Implicit bool
	// Listener accepts; the Server closes it.
	Listener net.Listener
	// LMTP is set for that protocol only.
	LMTP *LMTPListener
}

// Limits bound what clients and backends can make posthouse do. config
// documents each with its default and reason.
type Limits struct {
	PreauthTimeout      time.Duration
	AuthTries           int
	BadCommands         int
	AuthFailureDelay    time.Duration
	ConnectTimeout      time.Duration // also bounds a backend's greeting
	BackendLoginTimeout time.Duration
	IdleTimeout         time.Duration
	WriteTimeout        time.Duration
	DrainTimeout        time.Duration
	KeepAlive           time.Duration
	MaxConnections      int // of this frontend; 0 is no limit
	MaxConnectionsPerIP int // 0 is no limit
}

// Options are what a Server is made of. It owns the listeners; everything else
// is the caller's and must outlive it.
type Options struct {
	Hostname  string
	Listeners []Listener
	// TLS holds the certificates and the least version; ALPN is the Server's.
	TLS      *tls.Config
	Verifier auth.Verifier
	Table    *routing.Table
	Backends *backendpool.Pool
	Limits   Limits
	LMTP     LMTPOptions
	// Sieve, if not empty, is announced as ManageSieve's SIEVE capability
	// instead of what all active backends have in common.
	Sieve []string
	// AskEvery is how often the active backends are asked what they announce
	// before login, besides when the actives change; 0 is never: then only
	// logins teach.
	AskEvery time.Duration
	Logger   *zap.Logger
	Metrics  *Metrics
}

// Server accepts connections and runs their sessions.
type Server struct {
	options   Options
	log       *zap.Logger
	metrics   *Metrics
	offers    *offers
	protocols map[string]func() dialect
	signing   chan struct{} // slots, see signer
	lmtp      *lmtpTarget

	sessions *sessions
	running  sync.WaitGroup // accept loops and login goroutines
	cancel   context.CancelFunc
}

// alpn are the registered protocol IDs (RFC 7301 registry). A client that
// offers only others is refused: it may have been led here (ALPACA).
var alpn = map[string]string{"imap": "imap", "pop3": "pop3", "sieve": "managesieve"}

// New makes a Server. It accepts nothing before Serve.
func New(o Options) *Server {
	s := &Server{
		options: o, log: o.Logger, metrics: o.Metrics,
		signing:  make(chan struct{}, 4*runtime.GOMAXPROCS(0)),
		sessions: newSessions(o.Limits.MaxConnections, o.Limits.MaxConnectionsPerIP),
		protocols: map[string]func() dialect{
			"imap":  func() dialect { return &imapDialect{} },
			"pop3":  func() dialect { return &pop3Dialect{} },
			"sieve": func() dialect { return &sieveDialect{announce: o.Sieve} },
		},
		lmtp: &lmtpTarget{
			options: o.LMTP, disk: spool.NewDisk(o.LMTP.MaxSpool), reuse: backendpool.NewReuse[*lmtpConn](o.LMTP.MaxConnections, o.LMTP.IdleTimeout),
		},
	}
	s.offers = newOffers(s)
	s.metrics.watch(s)
	return s
}

// signer signs in turn: a handshake's signature is the dearest thing that a
// stranger can ask for, and a crowd of them must not take the time of the
// sessions that exist. The slot is held for nothing else: whoever stops within
// a handshake would keep others from theirs.
type signer struct {
	crypto.Signer
	slots chan struct{}
}

// Sign implements crypto.Signer.
func (s signer) Sign(rand io.Reader, digest []byte, opts crypto.SignerOpts) ([]byte, error) {
	s.slots <- struct{}{}
	defer func() { <-s.slots }()
	return s.Signer.Sign(rand, digest, opts)
}

// inTurn returns a copy of a configuration whose certificates sign in turn.
func (s *Server) inTurn(given *tls.Config) *tls.Config {
	c := given.Clone()
	bound := func(cert tls.Certificate) tls.Certificate {
		if key, ok := cert.PrivateKey.(crypto.Signer); ok {
			cert.PrivateKey = signer{key, s.signing}
		}
		return cert
	}
	c.Certificates = slices.Clone(c.Certificates)
	for n, cert := range c.Certificates {
		c.Certificates[n] = bound(cert)
	}
	if choose := c.GetCertificate; choose != nil {
		c.GetCertificate = func(hello *tls.ClientHelloInfo) (*tls.Certificate, error) {
			cert, err := choose(hello)
			if cert == nil || err != nil {
				return cert, err
			}
			chosen := bound(*cert)
			return &chosen, nil
		}
	}
	return c
}

// Serve accepts until ctx ends, then closes the listeners and returns. The
// sessions go on; Shutdown ends them.
func (s *Server) Serve(ctx context.Context) {
	loginContext, cancel := context.WithCancel(context.WithoutCancel(ctx))
	s.cancel = cancel
	s.offers.start(ctx)
	var accepting sync.WaitGroup
	for _, l := range s.options.Listeners {
		stop := context.AfterFunc(ctx, func() { _ = l.Listener.Close() })
		defer stop()
		accepting.Go(func() { s.accept(ctx, loginContext, l) })
	}
	accepting.Wait()
}

// accept takes connections until the listener closes. An error that will pass
// (out of files) is waited out.
func (s *Server) accept(ctx, loginContext context.Context, l Listener) {
	config := s.tlsConfig(l)
	for {
		conn, err := l.Listener.Accept()
		if err != nil {
			if ctx.Err() != nil || errors.Is(err, net.ErrClosed) {
				return
			}
			s.log.Error("accept failed, trying again", zap.String("protocol", l.Protocol), zap.Error(err))
			select {
			case <-time.After(100 * time.Millisecond):
			case <-ctx.Done():
			}
			continue
		}
		if t, ok := conn.(*net.TCPConn); ok {
			keepAlive := s.options.Limits.KeepAlive
			_ = t.SetKeepAliveConfig(net.KeepAliveConfig{Enable: true, Idle: keepAlive, Interval: keepAlive})
		}
		s.running.Go(func() { s.serve(loginContext, l, config, conn) })
	}
}

// tlsConfig is a listener's: one for all its connections, so that sessions are
// resumed.
func (s *Server) tlsConfig(l Listener) *tls.Config {
	c := s.inTurn(s.options.TLS)
	if id, ok := alpn[l.Protocol]; ok {
		c.NextProtos = []string{id}
	}
	if l.LMTP != nil && l.LMTP.ClientCAs != nil {
		c.ClientAuth, c.ClientCAs = tls.RequireAndVerifyClientCert, l.LMTP.ClientCAs
	}
	return c
}

// serve runs one connection's session until the client is gone or spliced.
func (s *Server) serve(ctx context.Context, l Listener, config *tls.Config, conn net.Conn) {
	size := readAhead
	if l.LMTP != nil {
		size = bodyAhead
	}
	c := newLineConn(ctx, conn, size)
	c.mostStrikes = s.options.Limits.BadCommands
	c.wrap = func(ctx context.Context, plain net.Conn) (*tls.Conn, error) {
		secured := tls.Server(plain, config)
		return secured, secured.HandshakeContext(ctx)
	}
	// Whatever waits for this client ends with the frontend.
	stop := context.AfterFunc(ctx, func() { _ = conn.SetReadDeadline(time.Unix(1, 0)) })
	defer stop()

	from := origin{client: addrPort(conn.RemoteAddr()), local: addrPort(conn.LocalAddr()), session: rand.Text()[:12]}
	listed := &Session{ID: from.session, Protocol: l.Protocol, Client: clientName(from.client), Since: time.Now()}
	log := s.log.With(zap.String("protocol", l.Protocol), zap.String("session", from.session), zap.String("client", listed.Client))
	if err := s.sessions.add(listed, from.client.Addr()); err != nil {
		log.Warn("connection refused", zap.Error(err))
		s.metrics.refused(l.Protocol, Overloaded.String())
		c.deadline(time.Now().Add(answerTimeout))
		if !l.Implicit { // a handshake is what we cannot afford now
			s.turnAway(l, c)
		}
		c.close() // without lingering: that would keep the connection
		return
	}
	if l.LMTP != nil {
		s.serveLMTP(ctx, l, c, listed, from, log)
		return
	}
	sess := &session{
		server: s, listed: listed, d: s.protocols[l.Protocol](), c: c, from: from,
		implicit: l.Implicit, until: time.Now().Add(s.options.Limits.PreauthTimeout),
		log: log,
	}
	defer sess.survive()
	sess.run(ctx)
}

// turnAway refuses a connection that is one too many.
func (s *Server) turnAway(l Listener, c *lineConn) {
	if l.LMTP != nil {
		_ = c.write(newReply(421, "4.3.2 Too many connections, try again later").append(nil))
		return
	}
	_ = s.protocols[l.Protocol]().refuse(c, request{}, Overloaded)
}

// words are those that open a conversation with a backend.
func (s *Server) words(protocol string) opening {
	if d, ok := s.protocols[protocol]; ok {
		return d()
	}
	return lmtpWords{s.options.Hostname}
}

// meetTries is how often a backend that does not accept or says BYE at once is
// tried, with meetPause in between: a server that restarts a process refuses
// for a moment. Nothing has been said yet, so trying again is safe.
const (
	meetTries = 3
	meetPause = 250 * time.Millisecond
)

// reach meets a backend, and tries again.
func (s *Server) reach(ctx context.Context, d opening, service string, backend *backendpool.Backend) (b *lineConn, announced []string, err error) {
	for try := range meetTries {
		if try > 0 {
			select {
			case <-ctx.Done():
				return nil, nil, context.Cause(ctx)
			case <-time.After(meetPause):
			}
		}
		if b, announced, err = s.meet(ctx, d, service, backend); err == nil {
			return b, announced, nil
		}
		if reasonOf(err).alarms() || ctx.Err() != nil {
			return nil, nil, err
		}
	}
	return nil, nil, err
}

// meet connects to a backend's service and returns what it announces before
// login. On an error the connection is closed.
func (s *Server) meet(ctx context.Context, d opening, service string, backend *backendpool.Backend) (*lineConn, []string, error) {
	conn, err := s.options.Backends.Dial(ctx, backend, service)
	if err != nil {
		return nil, nil, &Error{Op: "connect", Err: err}
	}
	b := newLineConn(ctx, conn, readAhead)
	b.provenByWords = !backend.EOFProves
	if backend.TLSOf(service) == backendpool.TLSStartTLS {
		b.mustStartTLS = true
		b.wrap = func(ctx context.Context, plain net.Conn) (*tls.Conn, error) {
			return s.options.Backends.Secure(ctx, backend, service, plain)
		}
	}
	stop := context.AfterFunc(ctx, func() { _ = conn.SetDeadline(time.Unix(1, 0)) })
	b.deadline(time.Now().Add(s.options.Limits.ConnectTimeout))
	announced, err := d.meet(b)
	if !stop() && err == nil {
		err = context.Cause(ctx)
	}
	if err != nil {
		b.close()
		return nil, nil, ofBackend("greeting of "+backend.Name, err)
	}
	return b, announced, nil
}

// finish is what has to happen when a spliced session has ended: the log line,
// counters, the session list.
func (s *Server) finish(listed *Session, log *zap.Logger, r splice.Result) {
	s.metrics.ended(listed.Protocol, r)
	s.forget(listed)
	level := zap.InfoLevel
	if !r.Proven {
		level = zap.WarnLevel // a residue
	}
	i := listed.info()
	log.Log(level, "session ended", zap.String("user", i.User), zap.String("backend", i.Backend),
		zap.String("cause", string(r.Cause)), zap.Bool("proven", r.Proven), zap.Duration("duration", time.Since(i.Since)),
		zap.Int64("octets_up", r.Up), zap.Int64("octets_down", r.Down), zap.Error(r.Err))
}

func (s *Server) forget(listed *Session) { s.sessions.remove(listed) }

// Sessions lists the connections that are served now, oldest first.
func (s *Server) Sessions() []SessionInfo { return s.sessions.list() }

// Check compares the gauges with what they count. It is nil if they agree.
func (s *Server) Check() error { return s.sessions.check() }

// Shutdown ends every session in good order (design §4): logins are refused,
// spliced sessions drained. It returns when all have ended or ctx has; then
// the error says how many have not. Serve must have returned.
func (s *Server) Shutdown(ctx context.Context) error {
	if s.cancel != nil {
		s.cancel()
	}
	s.sessions.endAll(splice.ShuttingDown)
	s.lmtp.reuse.Close()
	quiet := make(chan struct{})
	go func() {
		s.running.Wait()
		// A login that was let in while we began has been spliced since.
		s.sessions.endAll(splice.ShuttingDown)
		s.sessions.wait(ctx)
		close(quiet)
	}()
	select {
	case <-quiet:
	case <-ctx.Done():
	}
	if n := s.sessions.count(); n > 0 {
		return fmt.Errorf("%d sessions had not ended within shutdown_timeout", n)
	}
	return nil
}

// clientName is a client in the session list and the log.
func clientName(a netip.AddrPort) string {
	if !a.IsValid() {
		return "unix"
	}
	return a.String()
}

func addrPort(a net.Addr) netip.AddrPort {
	if t, ok := a.(*net.TCPAddr); ok {
		p := t.AddrPort()
		return netip.AddrPortFrom(p.Addr().Unmap(), p.Port())
	}
	return netip.AddrPort{}
}
