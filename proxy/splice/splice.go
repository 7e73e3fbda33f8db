// Package splice joins a client and a backend after the login: two
// connections, both directions, until one of them ends or the stay is revoked.
// Every end of a backend session goes through here, because closing a
// connection proves nothing: the backend goes on executing what it has read.
package splice

import (
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"runtime/debug"
	"sync"
	"sync/atomic"
	"time"
)

// bufferSize is what each direction holds while it waits: small, because most
// sessions are idle most of the time.
const bufferSize = 4096

// nudgeAfter: a DONE right behind IDLE lies in Dovecot's buffer until more
// bytes come (measured on 2.3); an empty line wakes it.
const nudgeAfter = 300 * time.Millisecond

// Tracker follows one session's protocol just enough to end it with proof. The
// splice never calls two of its methods at once.
type Tracker interface {
	// Up is shown what the client sent, before it goes to the backend, and may
	// change it in place. On an error nothing of p is passed on and the session
	// ends.
	Up(p []byte) error
	// Down is shown what the backend sent and returns what of it goes to the
	// client, valid until the next call.
	Down(p []byte) []byte
	// Farewell returns the words that make the backend end after all that it
	// was told before, or nil if now is no time for words (inside a command,
	// or under compression): then the splice half-closes, unless the client
	// has already said goodbye itself (Leaving).
	Farewell() []byte
	// Midway says that the client is inside a command, which it had better
	// finish before the session ends.
	Midway() bool
	// Leaving says that the client has ended the session in the protocol's
	// own words: the backend will close by itself.
	Leaving() bool
	// Nudge returns what to send if the backend does not react to Farewell.
	Nudge() []byte
	// Proven says that the backend has answered the last words: nothing of
	// this session runs there any more.
	Proven() bool
	// Ended is told that the backend's stream has ended; clean is false if it
	// broke. halfClosed says whether we half-closed before, eofProves whether
	// the operator states that an EOF is proof. It returns whether nothing of
	// this session can run there any more.
	Ended(clean, halfClosed, eofProves bool) bool
	// LastWords returns what the client must still hear before its connection
	// closes, nil where nothing fits.
	LastWords(why Cause) []byte
}

// Cause says which side ended a session, and why.
type Cause string

const (
	ClientClosed  Cause = "client closed"
	ClientLost    Cause = "client lost"
	BackendClosed Cause = "backend closed"
	BackendLost   Cause = "backend lost"
	Revoked       Cause = "stay revoked"
	Idle          Cause = "idle"
	Kicked        Cause = "kicked"
	ShuttingDown  Cause = "shutting down"
	Forbidden     Cause = "forbidden command"
	CutOff        Cause = "login cut off"
	Fault         Cause = "internal fault"
)

// Result is what a session has come to.
type Result struct {
	Cause Cause
	// Proven: nothing of the session can still run on the backend. Otherwise
	// it leaves a residue.
	Proven bool
	// Up and Down are octets client → backend and backend → client.
	Up, Down int64
	// Err is what broke, nil for an end in good order.
	Err error
}

// Config is what a splice needs. It owns both connections from Start on and
// closes them before Done is called.
type Config struct {
	// Client may be nil: then there is only a backend session to end.
	Client, Backend net.Conn
	// ClientAhead and BackendAhead were read ahead during the login and are
	// delivered first, once.
	ClientAhead, BackendAhead []byte
	Tracker                   Tracker
	// Revoked is closed when the session has to leave the backend.
	Revoked <-chan struct{}
	// EOFProves: the operator states for this backend (done: eof) that it
	// closes only when it has executed everything.
	EOFProves bool
	// Idle ends a session in which no octet moved; 0 is never. Drain bounds
	// the end of a session, from its cause until both connections are closed.
	Idle, Drain time.Duration
	// Write is how long one write may make no progress before its peer counts
	// as lost; 0 is for ever.
	Write time.Duration
	// Left is called once, from a goroutine of the splice, as soon as the
	// backend session is over; Done after it, when both connections are
	// closed. Done may be nil.
	Left func(Result)
	Done func(Result)
}

// Splice is a running session.
type Splice struct {
	cfg     Config
	end     chan Cause
	moved   atomic.Int64 // nanoseconds from began to the last octet moved
	began   time.Time
	up      atomic.Int64
	down    atomic.Int64
	mu      sync.Mutex // the tracker's
	discard atomic.Bool
	broken  atomic.Bool // a tracker has panicked: it proves nothing any more

	// finishBy, in Unix nanoseconds, is set when the session ends and the client
	// may still finish the command that it is inside of.
	finishBy atomic.Int64

	deadlines sync.Mutex
	draining  bool // write deadlines are drain's
}

// Start joins the two connections and returns at once.
func Start(cfg Config) *Splice {
	s := &Splice{cfg: cfg, end: make(chan Cause, 1), began: time.Now()}
	go s.run()
	return s
}

// End makes the session end in good order. It returns at once; Done tells.
func (s *Splice) End(why Cause) {
	select {
	case s.end <- why:
	default: // it is ending already
	}
}

// Octets returns how much has moved so far, client → backend and back.
func (s *Splice) Octets() (up, down int64) { return s.up.Load(), s.down.Load() }

type ended struct {
	err       error // nil: EOF
	forbidden bool
	fault     bool
	write     bool // err is of the write side
}

func (s *Splice) run() {
	var pumps sync.WaitGroup
	upDone, downDone := make(chan ended, 1), make(chan ended, 1)
	if s.cfg.Client == nil {
		s.discard.Store(true)
		upDone <- ended{}
	} else {
		pumps.Go(func() { upDone <- s.survive(s.pumpUp) })
	}
	proven := make(chan struct{})
	pumps.Go(func() { downDone <- s.survive(func() ended { return s.pumpDown(proven) }) })

	res := s.wait(&upDone, &downDone)
	s.drain(&res, upDone, downDone, proven)
	s.closeBackend(res.Proven)
	pumps.Wait()
	res.Up, res.Down = s.Octets()
	s.cfg.Left(res)
	s.closeClient(&res)
	if s.cfg.Done != nil {
		s.cfg.Done(res)
	}
}

// survive keeps a fault in following one session's stream from ending all the
// others: the session ends, without proof.
func (s *Splice) survive(pump func() ended) (e ended) {
	defer func() {
		if fault := recover(); fault != nil {
			s.broken.Store(true)
			e = ended{err: fmt.Errorf("fault in following the session: %v\n%s", fault, debug.Stack()), fault: true}
		}
	}()
	return pump()
}

// wait returns when something ends the session. The channel of a pump that has
// ended is set to nil.
func (s *Splice) wait(upDone, downDone *chan ended) Result {
	if s.cfg.Client == nil {
		<-*upDone
		*upDone = nil
		return Result{Cause: CutOff}
	}
	var idle <-chan time.Time
	var timer *time.Timer
	if s.cfg.Idle > 0 {
		timer = time.NewTimer(s.cfg.Idle)
		defer timer.Stop()
		idle = timer.C
	}
	for {
		select {
		case e := <-*upDone:
			*upDone = nil
			switch {
			case e.fault:
				return Result{Cause: Fault, Err: e.err}
			case e.forbidden:
				return Result{Cause: Forbidden, Err: e.err}
			case e.write:
				return Result{Cause: BackendLost, Err: e.err}
			case e.err != nil:
				return Result{Cause: ClientLost, Err: e.err}
			}
			return Result{Cause: ClientClosed}
		case e := <-*downDone:
			*downDone = nil
			return s.backendEnded(e)
		case <-s.cfg.Revoked:
			return Result{Cause: Revoked}
		case why := <-s.end:
			return Result{Cause: why}
		case <-idle:
			rest := s.cfg.Idle - (time.Since(s.began) - time.Duration(s.moved.Load()))
			if rest <= 0 {
				return Result{Cause: Idle}
			}
			timer.Reset(rest)
		}
	}
}

func (s *Splice) backendEnded(e ended) Result {
	if e.fault {
		return Result{Cause: Fault, Err: e.err}
	}
	res := Result{Cause: BackendClosed, Err: e.err}
	if e.err != nil {
		res.Cause = BackendLost
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.cfg.Tracker.Leaving() {
		res.Cause = ClientClosed
	}
	res.Proven = s.cfg.Tracker.Proven() || s.cfg.Tracker.Ended(e.err == nil, false, s.cfg.EOFProves)
	return res
}

// drain ends the session (design §4): stop reading the client, as soon as it is
// not inside a command, say farewell to the backend, go on copying to the client
// until the proof.
func (s *Splice) drain(res *Result, upDone, downDone chan ended, proven chan struct{}) {
	s.deadlines.Lock()
	s.draining = true
	s.deadlines.Unlock()
	deadline := time.Now().Add(s.cfg.Drain)
	_ = s.cfg.Backend.SetWriteDeadline(deadline)
	over := time.NewTimer(s.cfg.Drain)
	defer over.Stop()
	if s.cfg.Client != nil {
		if res.Cause == Revoked || res.Cause == ShuttingDown {
			// In the middle of an APPEND, Dovecot could not prove its end, and
			// Cyrus would refuse it: a third of the time is the client's.
			s.finishBy.Store(time.Now().Add(s.cfg.Drain / 3).UnixNano())
		}
		_ = s.cfg.Client.SetReadDeadline(time.Unix(1, 0))
		// A client that reads nothing must not keep us from the backend's
		// proof: it gets half of the time.
		_ = s.cfg.Client.SetWriteDeadline(time.Now().Add(s.cfg.Drain / 2))
	}
	if downDone != nil {
		_ = s.cfg.Backend.SetReadDeadline(deadline)
	}
	if upDone != nil {
		select {
		case <-upDone: // what it had read is with the backend now
		case e := <-downDone:
			downDone = nil
			*res = merge(*res, s.backendEnded(e))
		case <-over.C:
		}
	}
	if downDone != nil && time.Now().Before(deadline) && !s.broken.Load() {
		s.sayFarewell(res, downDone, proven, deadline)
	}
	if s.broken.Load() {
		res.Proven = false
		return
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	res.Proven = res.Proven || s.cfg.Tracker.Proven()
}

// sayFarewell returns when the backend has proven that it is done, has ended,
// or the deadline is over.
func (s *Splice) sayFarewell(res *Result, downDone chan ended, proven chan struct{}, deadline time.Time) {
	s.mu.Lock()
	leaving := s.cfg.Tracker.Leaving()
	words := s.cfg.Tracker.Farewell()
	nudge := s.cfg.Tracker.Nudge()
	res.Proven = s.cfg.Tracker.Proven()
	s.mu.Unlock()
	if res.Proven {
		return
	}
	halfClosed := false
	switch {
	case leaving:
	case words != nil:
		_, _ = s.cfg.Backend.Write(words) // a failure shows as the end of its stream
	default:
		halfClosed = true
		halfClose(s.cfg.Backend)
	}
	quiet := time.NewTimer(nudgeAfter)
	defer quiet.Stop()
	for {
		select {
		case <-proven:
			res.Proven = true
			return
		case e := <-downDone:
			s.mu.Lock()
			clean := e.err == nil
			res.Proven = s.cfg.Tracker.Proven() || s.cfg.Tracker.Ended(clean, halfClosed, s.cfg.EOFProves)
			s.mu.Unlock()
			if !res.Proven && res.Err == nil {
				res.Err = e.err
			}
			return
		case <-quiet.C:
			if nudge != nil {
				_, _ = s.cfg.Backend.Write(nudge)
			}
		}
	}
}

// halfClose says that nothing more will come: under TLS a close_notify and then
// a FIN. Cyrus, cut off inside a literal, takes the first for the literal's end
// and waits on the socket for the second.
func halfClose(conn net.Conn) {
	c, ok := conn.(interface{ CloseWrite() error })
	if !ok || c.CloseWrite() != nil {
		return
	}
	if t, ok := conn.(*tls.Conn); ok {
		halfClose(t.NetConn())
	}
}

// merge keeps the cause that came first and takes the proof of the second.
func merge(first, second Result) Result {
	first.Proven = second.Proven
	if first.Err == nil {
		first.Err = second.Err
	}
	return first
}

func (s *Splice) closeClient(res *Result) {
	if s.cfg.Client == nil {
		return
	}
	if s.discard.Load() {
		// A TLS connection whose write has failed has lost its place: whatever
		// came now, the client could not decipher.
		conn := s.cfg.Client
		if t, ok := conn.(*tls.Conn); ok {
			conn = t.NetConn()
		}
		_ = conn.Close()
		return
	}
	_ = s.cfg.Client.SetWriteDeadline(time.Now().Add(lingerTimeout))
	if !s.broken.Load() {
		s.mu.Lock()
		words := s.cfg.Tracker.LastWords(res.Cause)
		s.mu.Unlock()
		if len(words) > 0 {
			_, _ = s.cfg.Client.Write(words)
		}
	}
	Close(s.cfg.Client)
}

// lingerTimeout is how long a client has to take its last words.
const lingerTimeout = time.Second

// Close closes a client's connection so that it gets what was written last: a
// socket that is closed while octets of the client lie unread answers with a
// reset, which throws away what is on its way. So: close_notify, FIN, read on
// until the client ends, for at most a second.
func Close(conn net.Conn) {
	defer func() { _ = conn.Close() }()
	_ = conn.SetDeadline(time.Now().Add(lingerTimeout))
	raw := conn
	if t, ok := conn.(*tls.Conn); ok {
		if t.CloseWrite() != nil {
			return
		}
		raw = t.NetConn()
	}
	half, ok := raw.(interface{ CloseWrite() error })
	if !ok || half.CloseWrite() != nil {
		return
	}
	_, _ = io.CopyBuffer(io.Discard, struct{ io.Reader }{raw}, make([]byte, bufferSize))
}

// closeBackend resets a backend that has not proven its end: it shall not find
// an orderly end where there was none, and a close_notify could wait for one
// that reads nothing.
func (s *Splice) closeBackend(proven bool) {
	conn := s.cfg.Backend
	if !proven {
		if t, ok := conn.(interface{ NetConn() net.Conn }); ok {
			conn = t.NetConn()
		}
		if t, ok := conn.(*net.TCPConn); ok {
			_ = t.SetLinger(0)
		}
	}
	_ = conn.Close()
}

// pumpUp copies client → backend until the client ends.
func (s *Splice) pumpUp() ended {
	pass := func(p []byte) *ended {
		if err := s.seeUp(p); err != nil {
			return &ended{err: err, forbidden: true}
		}
		n, err := s.write(s.cfg.Backend, p)
		s.count(&s.up, n)
		if err != nil {
			return &ended{err: err, write: true}
		}
		return nil
	}
	if len(s.cfg.ClientAhead) > 0 {
		if e := pass(s.cfg.ClientAhead); e != nil {
			return *e
		}
		s.cfg.ClientAhead = nil
	}
	buf := make([]byte, bufferSize)
	for {
		n, err := s.cfg.Client.Read(buf)
		if n > 0 {
			if e := pass(buf[:n]); e != nil {
				return *e
			}
		}
		switch {
		case errors.Is(err, os.ErrDeadlineExceeded) && s.mayFinish():
		case errors.Is(err, io.EOF):
			return ended{}
		case err != nil:
			return ended{err: err}
		case s.finishBy.Load() != 0 && !s.midway():
			return ended{} // it has finished
		}
	}
}

// mayFinish gives a client that is inside a command the time to finish it.
func (s *Splice) mayFinish() bool {
	by := time.Unix(0, s.finishBy.Load())
	return time.Now().Before(by) && s.midway() && s.cfg.Client.SetReadDeadline(by) == nil
}

func (s *Splice) midway() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.cfg.Tracker.Midway()
}

// pumpDown copies backend → client until the backend ends or the tracker has
// its proof. A client that cannot be written to any more does not stop it: the
// backend's last answer is still the proof.
func (s *Splice) pumpDown(proven chan struct{}) ended {
	pass := func(p []byte) bool {
		out, done := s.seeDown(p)
		if len(out) > 0 && !s.discard.Load() {
			n, err := s.write(s.cfg.Client, out)
			s.count(&s.down, n)
			if err != nil {
				s.discard.Store(true)
				s.End(ClientLost)
			}
		}
		return done
	}
	told := false
	if len(s.cfg.BackendAhead) > 0 {
		if pass(s.cfg.BackendAhead) {
			told = true
			close(proven)
		}
		s.cfg.BackendAhead = nil
	}
	buf := make([]byte, bufferSize)
	for {
		n, err := s.cfg.Backend.Read(buf)
		if n > 0 && pass(buf[:n]) && !told {
			told = true
			close(proven)
		}
		if err != nil {
			if errors.Is(err, io.EOF) {
				err = nil
			}
			return ended{err: err}
		}
	}
}

func (s *Splice) seeUp(p []byte) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.cfg.Tracker.Up(p)
}

func (s *Splice) seeDown(p []byte) (pass []byte, proven bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.cfg.Tracker.Down(p), s.cfg.Tracker.Proven()
}

func (s *Splice) write(to net.Conn, p []byte) (int, error) {
	s.deadlines.Lock()
	if !s.draining && s.cfg.Write > 0 {
		_ = to.SetWriteDeadline(time.Now().Add(s.cfg.Write))
	}
	s.deadlines.Unlock()
	return to.Write(p)
}

func (s *Splice) count(octets *atomic.Int64, n int) {
	octets.Add(int64(n))
	s.moved.Store(int64(time.Since(s.began)))
}
