package proxy

import (
	"context"
	"errors"
	"io"
	"net"
	"os"
	"slices"
	"syscall"
	"time"

	"go.uber.org/zap"

	"github.com/posthouse/posthouse/backendpool"
	"github.com/posthouse/posthouse/proxy/auth"
	"github.com/posthouse/posthouse/proxy/splice"
	"github.com/posthouse/posthouse/routing"
)

// answerTimeout bounds the writing of one answer to a client, and of a polite
// goodbye to a backend that was only asked what it announces.
const answerTimeout = 10 * time.Second

// session is one client connection until the splice; what the splice keeps of
// it is its Session in the list.
type session struct {
	server *Server
	listed *Session
	d      dialect
	c      *lineConn
	from   origin
	log    *zap.Logger

	stay     *routing.Stay // the last that was entered
	implicit bool
	tries    int
	until    time.Time // the end of preauth_timeout
}

// leg is the way to a backend: the connection and the stay that allows it.
type leg struct {
	stay    *routing.Stay
	backend *backendpool.Backend
	b       *lineConn
}

// run is the story of one connection. It returns when the client is gone or
// the splice has taken over.
func (s *session) run(ctx context.Context) {
	err := s.greet(ctx)
	var req request
	for err == nil || s.answer(ctx, req, err) {
		s.do("reading commands")
		s.c.await(s.until)
		if req, err = s.d.next(s.c, s.offer()); err != nil {
			continue
		}
		if req.startTLS {
			err = s.startTLS(ctx, req)
			continue
		}
		var l *leg
		var w welcome
		if l, w, err = s.logIn(ctx, req); err != nil {
			continue
		}
		s.c.deadline(time.Now().Add(answerTimeout))
		if err = s.d.admit(s.c, req, w); err != nil {
			s.part(l)
			continue
		}
		s.splice(l)
		return
	}
	splice.Close(s.c.conn)
	s.server.forget(s.listed)
}

// survive keeps a fault in one login from ending all sessions. Where a stay is
// open nothing is known of its backend session: it leaves a residue.
func (s *session) survive() {
	fault := recover()
	if fault == nil {
		return
	}
	s.log.Error("internal fault in a login", zap.Any("fault", fault), zap.Stack("stack"), zap.String("action", s.listed.Action()))
	s.c.close()
	if s.stay != nil {
		s.stay.Leave(routing.End{Why: "internal fault"})
	}
	s.server.forget(s.listed)
}

// greet begins the conversation, under implicit TLS after the handshake.
func (s *session) greet(ctx context.Context) error {
	s.c.deadline(s.until)
	if s.implicit {
		s.do("waiting for TLS")
		if err := s.handshake(); err != nil {
			return err
		}
	}
	return s.d.greet(s.c, s.offer(), false)
}

// startTLS upgrades the client's connection. Everything said before is
// forgotten, but for its failures (G4).
func (s *session) startTLS(ctx context.Context, req request) error {
	s.do("waiting for TLS")
	if s.c.pipelined() {
		return failf(Pipelined, "start TLS", "%d octets of plaintext followed the command", s.c.r.Buffered())
	}
	if err := s.d.proceed(s.c, req); err != nil {
		return err
	}
	if err := s.handshake(); err != nil {
		return err
	}
	s.d = s.server.protocols[s.listed.Protocol]()
	return s.d.greet(s.c, s.offer(), true)
}

// handshake secures the client's connection. After a failure nothing can be
// answered any more.
func (s *session) handshake() error {
	err := s.c.startTLS()
	if err == nil {
		s.from.secure = true
		return nil
	}
	s.c.dead = true
	if errors.Is(err, os.ErrDeadlineExceeded) {
		return &Error{Reason: TimedOut, Op: "wait for TLS", Err: err}
	}
	return &Error{Reason: Malformed, Op: "negotiate TLS", Err: err}
}

// isGone says that the peer has ended the connection, in whatever manner.
func isGone(err error) bool {
	return slices.ContainsFunc([]error{io.EOF, io.ErrUnexpectedEOF, io.ErrClosedPipe, net.ErrClosed, syscall.ECONNRESET, syscall.EPIPE},
		func(end error) bool { return errors.Is(err, end) })
}

// offer is what this client may be told before its login.
func (s *session) offer() offer {
	o := offer{
		hostname: s.server.options.Hostname,
		startTLS: s.c.wrap != nil,
		shared:   s.server.offers.shared(s.listed.Protocol),
	}
	if s.c.secure() {
		o.mechanisms = auth.Names()
	}
	return o
}

// logIn takes a client from its credentials to a backend that has let it in.
// A stay that is revoked meanwhile is no failure: the client waits for the
// role like everybody else and enters again.
func (s *session) logIn(ctx context.Context, req request) (*leg, welcome, error) {
	began := time.Now()
	id, err := s.authenticate(ctx, req)
	if err != nil {
		return nil, welcome{}, err
	}
	s.listed.set(func(l *Session) { l.User = id.User })
	for {
		l, err := s.enter(ctx, id)
		if err != nil {
			return nil, welcome{}, err
		}
		w, err := s.connect(ctx, l, id)
		if err == nil {
			err = l.stay.Check()
		}
		if err == nil {
			s.server.metrics.loggedIn(s.listed.Protocol, time.Since(began))
			s.log.Info("login", zap.String("user", l.stay.User), zap.String("role", l.stay.Role),
				zap.String("backend", l.stay.Backend), zap.Uint64("epoch", l.stay.Epoch),
				zap.String("mechanism", req.mechanism), zap.String("as", id.Authcid), zap.Duration("took", time.Since(began)))
			return l, w, nil
		}
		revoked := l.stay.Check() != nil
		s.part(l)
		if !revoked || ctx.Err() != nil {
			return nil, welcome{}, err
		}
		s.log.Debug("the role moves during a login, entering again", zap.Error(err))
	}
}

// authenticate collects the credentials of one SASL exchange and has them
// judged.
func (s *session) authenticate(ctx context.Context, req request) (auth.Identity, error) {
	s.do("authenticating")
	if !s.c.secure() {
		return auth.Identity{}, &Error{Reason: PrivacyRequired, Op: "authenticate"}
	}
	mechanism, ok := auth.New(req.mechanism)
	if !ok {
		return auth.Identity{}, failf(UnknownMechanism, "authenticate", "mechanism %q", req.mechanism)
	}
	response := req.initial
	for {
		challenge, done, err := mechanism.Next(response)
		if err != nil {
			return auth.Identity{}, &Error{Reason: Malformed, Op: "authenticate", Err: err}
		}
		if done {
			break
		}
		if response, err = s.d.challenge(s.c, challenge); err != nil {
			return auth.Identity{}, err
		}
		if response == nil {
			response = []byte{}
		}
	}
	id, err := s.server.options.Verifier.Verify(ctx, mechanism.Credentials())
	switch {
	case err == nil:
		return id, nil
	case errors.Is(err, auth.ErrCredentials):
		return id, &Error{Reason: WrongCredentials, Op: "authenticate", Err: err}
	case errors.Is(err, auth.ErrNotAuthorized):
		return id, &Error{Reason: NotAuthorized, Op: "authenticate", Err: err}
	}
	return id, &Error{Reason: Unavailable, Op: "authenticate", Err: err}
}

// enter gets the user a stay on its role's active backend. Who is not verified
// yet, because only the backend can do it, does not park.
func (s *session) enter(ctx context.Context, id auth.Identity) (*leg, error) {
	s.do("looking up the role")
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	var stop func()
	parked := func(role string) {
		s.do("waiting for role " + role)
		s.log.Info("parked", zap.String("user", id.User), zap.String("role", role))
		if stop == nil {
			stop = s.c.watch(func() { cancel(errClientLeft) })
		}
	}
	options := []routing.EnterOption{routing.OnPark(parked), routing.From(s.from.client.Addr())}
	if !id.Verified {
		options = append(options, routing.Unverified())
	}
	stay, err := s.server.options.Table.Enter(ctx, id.User, options...)
	if stop != nil {
		stop()
		s.c.await(s.until)
	}
	if err != nil && errors.Is(context.Cause(ctx), errClientLeft) {
		return nil, errClientLeft
	}
	if errors.Is(err, routing.ErrUnknownUser) && !id.Verified {
		// Nobody has checked the password: whether the user exists is not
		// this client's to know.
		return nil, &Error{Reason: WrongCredentials, Op: "look up the role", Err: err}
	}
	if err != nil {
		return nil, &Error{Reason: Unavailable, Op: "look up the role", Err: err}
	}
	s.stay = stay
	s.listed.set(func(l *Session) { l.User, l.Role, l.Backend, l.Epoch = stay.User, stay.Role, stay.Backend, stay.Epoch })
	return &leg{stay: stay}, nil
}

// connect dials the stay's backend and logs in there. It gives up as soon as
// the stay is revoked.
func (s *session) connect(ctx context.Context, l *leg, id auth.Identity) (w welcome, err error) {
	pool := s.server.options.Backends
	var ok bool
	if l.backend, ok = pool.Backend(l.stay.Backend); !ok {
		return w, failf(Misconfigured, "find the backend", "backend %s is in the role table and not in this frontend's configuration", l.stay.Backend)
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	go func() {
		select {
		case <-l.stay.Revoked():
			cancel()
		case <-ctx.Done():
		}
	}()
	s.do("waiting for a login slot of " + l.backend.Name)
	waiting, enough := context.WithTimeout(ctx, s.server.options.Limits.BackendLoginTimeout)
	release, err := l.backend.Slot(waiting)
	enough()
	if err != nil {
		return w, err
	}
	defer release()

	s.do("connecting to " + l.backend.Name)
	var announced []string
	if l.b, announced, err = s.server.reach(ctx, s.d, s.listed.Protocol, l.backend); err != nil {
		return w, err
	}
	s.server.offers.learn(s.listed.Protocol, l.backend.Name, announced)

	s.do("logging in to " + l.backend.Name)
	l.b.deadline(time.Now().Add(s.server.options.Limits.BackendLoginTimeout))
	stopped := make(chan struct{})
	stop := context.AfterFunc(ctx, func() {
		l.b.deadline(time.Unix(1, 0))
		close(stopped)
	})
	w, err = s.d.logIn(l.b, announced, credentialsFor(l.backend, id, l.stay.User), s.from)
	if !stop() {
		<-stopped // its deadline must not come after those of the end
		if err == nil {
			err = context.Cause(ctx)
		}
	}
	if err == nil {
		l.b.deadline(time.Time{})
		return w, nil
	}
	if reasonOf(err) == WrongCredentials && id.Verified {
		// The password was right; what the backend refuses is posthouse.
		return w, failf(Misconfigured, "log in to "+l.backend.Name,
			"the backend refused a verified user, check login.user, password_file and style: %w", err)
	}
	return w, ofBackend("log in to "+l.backend.Name, err)
}

// credentialsFor are those that a backend gets for user, by the style of its
// configuration.
func credentialsFor(b *backendpool.Backend, id auth.Identity, user string) auth.Credentials {
	switch b.Style {
	case backendpool.StyleAuthzid:
		return auth.Credentials{Authzid: user, Authcid: b.User, Password: b.Password()}
	case backendpool.StyleMasterUser:
		return auth.Credentials{Authcid: user + "*" + b.User, Password: b.Password()}
	}
	return auth.Credentials{Authcid: user, Password: id.Credentials.Password}
}

// answer is the one place that tells a client of a failure. It returns whether
// the conversation goes on.
func (s *session) answer(ctx context.Context, req request, err error) bool {
	if errors.Is(err, errClientLeft) || s.c.dead && isGone(err) && s.tries == 0 && s.listed.user() == "" {
		// Health checks and port scanners come and go by the thousand.
		s.log.Debug("client left before login", zap.Error(err))
		s.server.metrics.refused(s.listed.Protocol, "client_left")
		return false
	}
	why := reasonOf(err)
	if ctx.Err() != nil {
		why = ShuttingDown
	}
	if why != Cancelled && why != PrivacyRequired {
		s.tries++
	} else if s.c.strike() != nil {
		why = TooMany
	}
	s.server.metrics.refused(s.listed.Protocol, why.String())
	level := zap.InfoLevel
	if why.alarms() {
		level = zap.ErrorLevel
	}
	s.log.Log(level, "login refused", zap.String("reason", why.String()), zap.String("user", s.listed.user()),
		zap.String("action", s.listed.Action()), zap.Error(err))
	if s.c.dead {
		return false
	}
	if why == WrongCredentials || why == NotAuthorized {
		s.do("delaying a refusal")
		select {
		case <-time.After(s.server.options.Limits.AuthFailureDelay):
		case <-ctx.Done():
		}
	}
	s.c.deadline(time.Now().Add(answerTimeout))
	if s.d.refuse(s.c, req, why) != nil || why.closes() {
		return false
	}
	if s.tries >= s.server.options.Limits.AuthTries {
		_ = s.d.refuse(s.c, request{}, TooMany)
		return false
	}
	return true
}

// splice hands the two connections over. What must happen at the end hangs on
// its Done, because the login's goroutine ends here.
func (s *session) splice(l *leg) {
	s.do("spliced")
	client, backend := s.c, l.b
	client.deadline(time.Time{})
	limits := s.server.options.Limits
	server, listed, stay, log := s.server, s.listed, l.stay, s.log
	s.listed.spliced(splice.Start(splice.Config{
		Client: client.conn, ClientAhead: client.ahead(),
		Backend: backend.conn, BackendAhead: backend.ahead(),
		Tracker: s.d.tracker(backend), Revoked: l.stay.Revoked(), EOFProves: l.backend.EOFProves,
		Idle: limits.IdleTimeout, Write: limits.WriteTimeout, Drain: limits.DrainTimeout,
		Left: func(r splice.Result) {
			leave(stay)(r)
			listed.setAction("closing")
		},
		Done: func(r splice.Result) { server.finish(listed, log, r) },
	}))
}

// part ends a backend session that no client will have. Once credentials were
// sent it may exist, and may be creating the user's mailboxes: it is ended
// like every other.
func (s *session) part(l *leg) {
	if l.b == nil {
		l.stay.Leave(routing.End{Proven: true})
		return
	}
	if !l.b.claimed {
		l.b.close()
		l.stay.Leave(routing.End{Proven: true})
		return
	}
	l.b.deadline(time.Time{})
	log := s.log.With(zap.String("user", l.stay.User), zap.String("backend", l.stay.Backend))
	s.server.running.Add(1) // Shutdown waits for it; we run under running ourselves
	splice.Start(splice.Config{
		Done:    func(splice.Result) { s.server.running.Done() },
		Backend: l.b.conn, BackendAhead: l.b.ahead(),
		Tracker: s.d.tracker(l.b), Revoked: l.stay.Revoked(), EOFProves: l.backend.EOFProves,
		Drain: s.server.options.Limits.DrainTimeout,
		Left: func(r splice.Result) {
			s.server.metrics.ended(s.listed.Protocol, r)
			if !r.Proven {
				log.Warn("a login that was cut off may still run on the backend", zap.Error(r.Err))
			}
			leave(l.stay)(r)
		},
	})
}

// leave ends a stay with the proof that its session came to, or with none.
func leave(stay *routing.Stay) func(splice.Result) {
	return func(r splice.Result) { stay.Leave(routing.End{Proven: r.Proven, Why: string(r.Cause)}) }
}

// do records what the session is doing, for the session list and error lines.
func (s *session) do(action string) { s.listed.setAction(action) }
