package proxy

import (
	"bytes"
	"context"
	"crypto/x509"
	"errors"
	"net"
	"net/netip"
	"os"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/emersion/go-smtp"
	"go.uber.org/zap"

	"github.com/posthouse/posthouse/backendpool"
	"github.com/posthouse/posthouse/proxy/auth"
	"github.com/posthouse/posthouse/proxy/splice"
	"github.com/posthouse/posthouse/proxy/spool"
	"github.com/posthouse/posthouse/routing"
)

// LMTP (RFC 2033), the MTA's target:
//
//	S: 220 mail.example.org LMTP ready
//	C: LHLO mx.example.org
//	S: 250-mail.example.org
//	S: 250-PIPELINING
//	S: 250 SIZE 104857600
//	C: MAIL FROM:<sender@example.net>
//	S: 250 2.1.0 Sender ok
//	C: RCPT TO:<alice+lists@example.org>   each goes to its role's active
//	S: 250 2.1.5 ok                        backend, in the backend's words
//	C: RCPT TO:<bob@example.org>
//	S: 250 2.1.5 ok
//	C: DATA
//	S: 354 Go ahead
//	C: … .
//	S: 250 2.0.0 Saved                     one reply for each RCPT, in order,
//	S: 451 4.4.2 …                         each as soon as it is known
//
// Both sides are written here; of go-smtp there are the words. Its server cannot
// hand RFC 2033 its due: it has no XCLIENT, XFORWARD, IGNOREQUOTA nor a
// <postmaster> without domain, announces CHUNKING and BODY=8BITMIME whatever
// the backends do, drops what follows STARTTLS, reads chunk octets as commands
// after a bad BDAT, and lets a lone CR through, in which a backend may see the
// end of a message. Its client writes a quoted local part without the quotes,
// sends one command at a time, and gives a recipient that stands twice one
// reply.

// LMTPOptions are those of the LMTP target. config documents each.
type LMTPOptions struct {
	MaxSize        int64 // octets of a message
	MaxRecipients  int   // of a transaction
	MaxHops        int   // Received fields
	MaxLine        int   // octets of a line that goes to a backend
	MaxConnections int   // to each backend
	IdleTimeout    time.Duration
	CommandTimeout time.Duration // an MTA's silence
	ReplyTimeout   time.Duration // a backend's, after the final dot
	Hold           time.Duration // for roles on hold, per transaction
	MaxLag         time.Duration // see spool.Options
	SpoolDir       string
	MaxSpool       int64 // octets there, of all messages together

	Delimiter    string   // before the detail of a local part; empty is none
	LocalDomains []string // whose users have no domain
	Postmaster   string   // user; empty is none
	CatchAll     string   // user; empty is none
	Names        auth.Normalizer
}

// LMTPListener is what only a Listener of LMTP has.
type LMTPListener struct {
	// Trusted are the peers who may say whom they speak for (XCLIENT,
	// XFORWARD). Who comes over a unix socket may.
	Trusted []netip.Prefix
	// BareNewline is "reject", "normalize", or empty: normalize what trusted
	// peers send, reject it from others.
	BareNewline string
	// StartTLS offers it; NeedsTLS refuses mail without TLS.
	StartTLS, NeedsTLS bool
	// ClientCAs, if not nil, must have signed a client's certificate.
	ClientCAs *x509.CertPool
}

// lmtpTarget is what all LMTP sessions of a Server share.
type lmtpTarget struct {
	options LMTPOptions
	reuse   *backendpool.Reuse[*lmtpConn]
	disk    *spool.Disk
}

// lmtpSession is one MTA's connection, from Accept to Close.
type lmtpSession struct {
	server   *Server
	listed   *Session
	listener Listener
	c        *lineConn
	from     origin
	log      *zap.Logger
	trusted  bool

	hello        string           // LHLO's argument; empty before
	peer         clientAttributes // whom the MTA speaks for: XCLIENT
	forwarded    clientAttributes // whose message the next one is: XFORWARD
	offered      announced        // in the last LHLO
	size         int64            // of a message: what all active backends take
	out          []byte           // replies on their way to the MTA
	work         []byte           // for the octets of a body on their way through
	t            *transaction     // nil without one
	chunks       *chunks          // of t, once BDAT has begun
	transactions int
}

// errQuit: the MTA has said QUIT, and has its reply.
var errQuit = errors.New("quit")

// run is the story of one connection.
func (s *lmtpSession) run(ctx context.Context) {
	defer s.server.forget(s.listed)
	err := s.greet()
	for err == nil {
		s.do("reading commands")
		var line []byte
		if line, err = s.readCommand(); err == nil {
			err = s.command(ctx, line)
		}
	}
	s.reset()
	s.part(ctx, err)
	splice.Close(s.c.conn)
}

// greet begins the conversation, under implicit TLS after the handshake.
func (s *lmtpSession) greet() error {
	if s.listener.Implicit {
		if err := s.handshake(); err != nil {
			return err
		}
	}
	s.say(220, s.server.options.Hostname+" LMTP ready")
	return nil
}

func (s *lmtpSession) handshake() error {
	s.do("waiting for TLS")
	s.c.deadline(time.Now().Add(s.server.options.Limits.PreauthTimeout))
	if err := s.c.startTLS(); err != nil {
		s.c.dead = true
		return &Error{Reason: Malformed, Op: "negotiate TLS", Err: err}
	}
	s.from.secure = true
	return nil
}

// part tells the MTA why we leave it, if it can still be told.
func (s *lmtpSession) part(ctx context.Context, err error) {
	why := reasonOf(err)
	switch {
	case errors.Is(err, errQuit):
	case errors.Is(err, errClientLeft) || s.c.dead:
		s.log.Debug("lmtp: the MTA is gone", zap.Error(err))
		return
	case ctx.Err() != nil:
		s.say(421, "4.3.2 The service is shutting down")
	case why == TimedOut:
		s.say(421, "4.4.2 Nothing was said for too long")
	case why == TooLong:
		s.say(500, "5.5.2 Line too long")
	case why == TooMany:
		s.say(421, "4.7.0 Too many commands made no sense")
	case why == Pipelined:
		s.say(501, "5.5.4 STARTTLS cannot be pipelined")
	case why == Malformed:
		s.say(501, "5.5.4 Not understood, and what follows cannot be found")
	default:
		s.say(421, "4.3.0 Temporary failure")
	}
	if !errors.Is(err, errQuit) {
		s.server.metrics.refused("lmtp", why.String())
		s.log.Info("lmtp: connection ended", zap.String("reason", why.String()), zap.Error(err))
	}
	_ = s.flush()
}

// mostCommand bounds a command line. RFC 5321 §4.5.3.1.4 has 512 octets for the
// command; its extensions add ORCPT (500, three octets each in xtext) and more.
const mostCommand = 4096

// readCommand reads a line. What the MTA is owed is written before we wait for
// it.
func (s *lmtpSession) readCommand() ([]byte, error) {
	ahead, _ := s.c.r.Peek(s.c.r.Buffered())
	if bytes.IndexByte(ahead, '\n') < 0 {
		if s.t != nil {
			s.t.settle()
		}
		if err := s.flush(); err != nil {
			return nil, err
		}
	}
	s.await()
	return s.c.readLine(mostCommand)
}

// await bounds the MTA's silence.
func (s *lmtpSession) await() { s.c.await(time.Now().Add(s.server.lmtp.options.CommandTimeout)) }

// say puts a reply on its way; reply does so with one that exists.
func (s *lmtpSession) say(code int, text ...string) { s.reply(newReply(code, text...)) }

func (s *lmtpSession) reply(r reply) { s.out = r.append(s.out) }

// flush writes the replies.
func (s *lmtpSession) flush() error {
	if s.c.dead { // half a reply may have gone out: nothing that follows would be in step
		return &Error{Op: "write", Err: net.ErrClosed}
	}
	if len(s.out) == 0 {
		return nil
	}
	s.c.deadline(time.Now().Add(s.server.options.Limits.WriteTimeout))
	err := s.c.write(s.out)
	s.out = s.out[:0]
	return err
}

// command is the table of contents. Replies are in the commands' order: before
// anything but another RCPT answers, those asked are waited for.
func (s *lmtpSession) command(ctx context.Context, line []byte) error {
	verb, arg := lmtpCommand(line)
	if s.t != nil && verb != "RCPT" {
		s.t.settle()
	}
	switch verb {
	case "LHLO":
		return s.lhlo(arg)
	case "EHLO", "HELO":
		s.say(500, "5.5.1 This is LMTP: say LHLO (RFC 2033)")
		return s.c.strike()
	case "NOOP":
		s.say(250, "2.0.0 OK")
	case "RSET":
		s.reset()
		s.say(250, "2.0.0 Reset")
	case "VRFY":
		s.say(252, "2.5.2 Send the message, then it will show")
	case "QUIT":
		s.reset()
		s.say(221, "2.0.0 Bye")
		return errQuit
	case "STARTTLS":
		return s.startTLS()
	case "XCLIENT", "XFORWARD":
		return s.introduce(verb, arg)
	case "BDAT":
		return s.bdat(arg)
	case "MAIL", "RCPT", "DATA":
		if why := s.notYet(verb); why != nil {
			s.reply(*why) // no strike: it may come from one refusal and many pipelined commands
			return nil
		}
		return s.mail(ctx, verb, arg)
	default:
		s.say(500, "5.5.2 Unknown command")
		return s.c.strike()
	}
	return nil
}

// notYet says why a command of a mail transaction is out of place.
func (s *lmtpSession) notYet(verb string) *reply {
	var r reply
	switch {
	case s.listener.LMTP.NeedsTLS && !s.c.secure():
		r = newReply(530, "5.7.0 Say STARTTLS first")
	case s.hello == "":
		r = newReply(503, "5.5.1 Say LHLO first")
	case verb == "MAIL" && s.t != nil:
		r = newReply(503, "5.5.1 A transaction is open")
	case verb != "MAIL" && s.t == nil:
		r = newReply(503, "5.5.1 Say MAIL first")
	case s.chunks != nil && verb != "BDAT":
		r = newReply(503, "5.5.1 BDAT has begun")
	default:
		return nil
	}
	return &r
}

// mail serves MAIL, RCPT and DATA.
func (s *lmtpSession) mail(ctx context.Context, verb, arg string) error {
	var fault *smtp.SMTPError
	switch verb {
	case "MAIL":
		fault = s.mailFrom(arg)
	case "RCPT":
		var to mailbox
		var params []param
		var p rcptParams
		if to, params, fault = parseForward(arg); fault == nil {
			p, fault = parseRcptParams(params, s.offered)
		}
		if fault == nil && to.isUTF8() && !s.t.params.utf8 {
			fault = &smtp.SMTPError{Code: 553, EnhancedCode: smtp.EnhancedCode{5, 6, 7}, Message: "Address needs SMTPUTF8"}
		}
		if fault == nil {
			if r := s.t.rcpt(ctx, to, p); r != nil {
				s.t.settle() // those before it come first
				s.reply(*r)
			}
			return nil
		}
		s.t.settle()
	case "DATA":
		return s.data(arg)
	}
	if fault == nil {
		return nil
	}
	s.reply(replyTo(fault))
	if fault.Code == 501 { // what is no syntax error is policy
		return s.c.strike()
	}
	return nil
}

// mailFrom begins a transaction.
func (s *lmtpSession) mailFrom(arg string) *smtp.SMTPError {
	sender, params, fault := parseReverse(arg)
	if fault != nil {
		return fault
	}
	p, fault := parseMailParams(params, s.offered)
	switch {
	case fault != nil:
		return fault
	case p.size > s.size:
		return &smtp.SMTPError{Code: 552, EnhancedCode: smtp.EnhancedCode{5, 3, 4}, Message: "Message too big"}
	case sender.isUTF8() && !p.utf8:
		return &smtp.SMTPError{Code: 553, EnhancedCode: smtp.EnhancedCode{5, 6, 7}, Message: "Address needs SMTPUTF8"}
	case s.peer.ttl == 0 || s.peer.ttl == 1: // as Dovecot counts: 1 is the last hop
		return &smtp.SMTPError{Code: 554, EnhancedCode: smtp.EnhancedCode{5, 4, 6}, Message: "The proxies form a loop"}
	}
	s.t = s.begin(sender, p)
	s.say(250, "2.1.0 Sender ok")
	return nil
}

// lhlo begins the session, or begins it anew (RFC 2033 §4.1, RFC 5321 §4.1.4).
func (s *lmtpSession) lhlo(arg string) error {
	name, fault := helloName(arg)
	if fault != nil {
		s.reply(replyTo(fault))
		return s.c.strike()
	}
	s.reset()
	s.hello = name
	var all []map[string]string
	for _, announced := range s.server.offers.all("lmtp") {
		all = append(all, keywords(announced))
	}
	shared := func(keyword string) bool {
		for _, backend := range all {
			if _, ok := backend[keyword]; !ok {
				return false
			}
		}
		return len(all) > 0
	}
	s.size = s.server.lmtp.options.MaxSize
	for _, backend := range all {
		if n, err := strconv.ParseInt(backend["SIZE"], 10, 64); err == nil && n > 0 {
			s.size = min(s.size, n)
		}
	}
	s.offered = announced{smtputf8: shared("SMTPUTF8"), dsn: shared("DSN"), ignoreQuota: shared("IGNOREQUOTA")}
	lines := []string{s.server.options.Hostname, "PIPELINING", "ENHANCEDSTATUSCODES", "8BITMIME", "CHUNKING",
		"SIZE " + strconv.FormatInt(s.size, 10)}
	add := func(yes bool, line string) {
		if yes {
			lines = append(lines, line)
		}
	}
	add(s.offered.smtputf8, "SMTPUTF8")
	add(s.offered.dsn, "DSN")
	add(s.offered.ignoreQuota, "IGNOREQUOTA")
	add(s.listener.LMTP.StartTLS && !s.c.secure(), "STARTTLS")
	add(s.trusted, "XCLIENT "+strings.Join(xclientNames, " "))
	add(s.trusted, "XFORWARD "+strings.Join(xforwardNames, " "))
	s.say(250, lines...)
	return nil
}

// startTLS upgrades the connection (RFC 3207): what was said before is
// forgotten.
func (s *lmtpSession) startTLS() error {
	switch {
	case !s.listener.LMTP.StartTLS || s.c.secure():
		s.say(503, "5.5.1 STARTTLS is not offered")
		return s.c.strike()
	case s.c.pipelined():
		return failf(Pipelined, "start TLS", "%d octets of plaintext followed the command", s.c.r.Buffered())
	}
	s.reset()
	s.hello, s.peer, s.forwarded = "", unknownPeer, unknownPeer
	s.say(220, "2.0.0 Go ahead")
	if err := s.flush(); err != nil {
		return err
	}
	return s.handshake()
}

// unknownPeer: the MTA speaks for itself.
var unknownPeer = clientAttributes{ttl: -1}

// introduce takes XCLIENT and XFORWARD from those who are trusted. XCLIENT
// begins the session anew.
func (s *lmtpSession) introduce(verb, arg string) error {
	names := xclientNames
	if verb == "XFORWARD" {
		names = xforwardNames
	}
	switch {
	case !s.trusted:
		s.say(550, "5.7.0 You are not trusted to say that")
		return s.c.strike()
	case s.t != nil:
		s.say(503, "5.5.1 A transaction is open")
		return s.c.strike()
	}
	who, fault := parseAttributes(arg, names)
	if fault != nil {
		s.reply(replyTo(fault))
		return s.c.strike()
	}
	if verb == "XFORWARD" { // in several commands, for one transaction (Postfix, XFORWARD_README)
		s.forwarded = s.forwarded.merge(who)
		s.say(250, "2.0.0 OK")
		return nil
	}
	s.peer = s.peer.merge(who)
	s.hello = ""
	s.say(220, s.server.options.Hostname+" LMTP ready")
	return nil
}

// mostHops is how many proxies a message may still pass (G7).
const mostHops = 7

// origin is whom backends are told that we ask for: without the port, which
// tells nothing and would have to be told anew for every connection.
func (s *lmtpSession) origin() clientAttributes {
	who := clientAttributes{addr: s.from.client.Addr(), ttl: mostHops}.merge(s.peer).merge(s.forwarded)
	if s.peer.ttl >= 0 {
		who.ttl = s.peer.ttl - 1
	}
	return who
}

// reset forgets the transaction.
func (s *lmtpSession) reset() {
	if s.t != nil {
		s.t.abandon()
		s.t, s.chunks, s.forwarded = nil, nil, unknownPeer
	}
}

func (s *lmtpSession) do(action string) { s.listed.setAction(action) }

// normalizes says what becomes of bare newlines and endless lines.
func (s *lmtpSession) normalizes() bool {
	switch s.listener.LMTP.BareNewline {
	case "normalize":
		return true
	case "reject":
		return false
	}
	return s.trusted
}

// isTrusted says whether a peer may speak for others.
func (l *LMTPListener) isTrusted(client netip.AddrPort) bool {
	if !client.IsValid() {
		return true // a unix socket: its mode says who comes
	}
	return slices.ContainsFunc(l.Trusted, func(p netip.Prefix) bool { return p.Contains(client.Addr()) })
}

// serveLMTP runs an LMTP session on an accepted connection.
func (s *Server) serveLMTP(ctx context.Context, l Listener, c *lineConn, listed *Session, from origin, log *zap.Logger) {
	session := &lmtpSession{
		server: s, listed: listed, listener: l, c: c, from: from, log: log,
		trusted: l.LMTP.isTrusted(from.client), peer: unknownPeer, forwarded: unknownPeer,
	}
	defer session.survive()
	session.run(ctx)
}

// survive keeps a fault in one session from ending all. Its legs leave as if the
// MTA had gone.
func (s *lmtpSession) survive() {
	fault := recover()
	if fault == nil {
		return
	}
	s.log.Error("internal fault in an LMTP session", zap.Any("fault", fault), zap.Stack("stack"), zap.String("action", s.listed.Action()))
	s.c.close()
	if s.t != nil {
		for _, g := range s.t.legs {
			g.end(replyTryAgain, routing.End{Why: "internal fault"}, false)
		}
		s.t.running.Wait()
	}
	s.server.forget(s.listed)
}

// fill returns octets of the body, waiting for at least one.
func (s *lmtpSession) fill() ([]byte, error) {
	if s.c.r.Buffered() == 0 {
		s.await()
		if _, err := s.c.r.Peek(1); err != nil {
			if errors.Is(err, os.ErrDeadlineExceeded) {
				return nil, &Error{Reason: TimedOut, Op: "read a message", Err: err}
			}
			s.c.dead = true
			return nil, &Error{Op: "read a message", Err: err}
		}
	}
	return s.c.r.Peek(s.c.r.Buffered())
}
