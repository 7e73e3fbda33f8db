package proxy

import (
	"errors"
	"fmt"
	"io"
	"os"
	"sync"

	"go.uber.org/zap"

	"github.com/posthouse/posthouse/routing"
)

// delivery is one RCPT at a backend. Recipients that come to the same address
// there share it.
type delivery struct {
	to     mailbox
	params rcptParams
	stay   *routing.Stay

	// answer is the backend's reply to RCPT; its code is 0 before.
	answer reply
	// final is what the recipients are told after the final dot, once done is
	// closed.
	final reply
	done  chan struct{}
	once  sync.Once
}

// finish sets the last reply and ends the stay; only the first call counts.
func (d *delivery) finish(final reply, end routing.End) {
	d.once.Do(func() {
		d.final = final
		d.stay.Leave(end)
		close(d.done)
	})
}

// isAccepted says whether the backend has said yes to RCPT.
func (d *delivery) isAccepted() bool { return d.answer.code/100 == 2 }

// What recipients are told when the backend does not say it. Never a 5xx: that
// would bounce the message for a fault of ours.
var (
	replyMoved     = newReply(451, "4.3.2 Mailbox is being moved, try again later")
	replyStopping  = newReply(451, "4.3.2 The service is shutting down, try again later")
	replyBusy      = newReply(451, "4.3.2 The mail server is busy, try again later")
	replyNotThere  = newReply(451, "4.4.1 The mail server cannot be reached, try again later")
	replyNoAnswer  = newReply(451, "4.4.2 The mail server does not answer, try again later")
	replyLost      = newReply(451, "4.4.2 The connection to the mail server was lost, try again later")
	replyOurFault  = newReply(451, "4.3.5 The mail system is not configured for this, try again later")
	replyTryAgain  = newReply(451, "4.3.0 Temporary failure, try again later")
	replyNotPassed = newReply(451, "4.3.0 The message was not passed on, try again later")
)

var (
	errLegEnded  = errors.New("the delivery was cut off")
	errUnreached = errors.New("no way to the backend")
	errBusy      = errors.New("no connection is free")
)

// answers sends what is unsent and reads the backend's replies to it. A failure
// ends the leg.
func (g *lmtpLeg) answers() {
	defer g.survive()
	if len(g.unsent) == 0 || !g.enter(legAsking, g.t.server.options.Limits.BackendLoginTimeout) {
		return
	}
	err := g.ask()
	if err != nil {
		g.log.Warn("lmtp: a backend failed before the message", zap.Error(err))
		g.end(replyFor(err), routing.End{Proven: g.provesNoRCPT(err), Why: "lmtp: no reply to RCPT"}, false)
		return
	}
	g.mu.Lock()
	why := g.why
	if g.phase == legAsking {
		g.phase = legOpen
	}
	g.mu.Unlock()
	if why != nil {
		g.end(*why, routing.End{Proven: true}, false)
	}
}

// provesNoRCPT says that after this failure no RCPT runs at the backend: it has
// answered, or got none of them. That it ended before it had answered MAIL is
// none: it may run both commands and answer both at once.
func (g *lmtpLeg) provesNoRCPT(err error) bool {
	var r *refusal
	return errors.As(err, &r) || errors.Is(err, errUnreached) || g.backend.EOFProves && errors.Is(err, errClientLeft)
}

// ask writes the unsent commands and reads a reply for each. All of them go out
// in one write: RFC 2033 §4.2 demands PIPELINING of every LMTP server. A reused
// connection on which the backend says that it leaves (an idle timeout that we
// have just missed) is replaced: it has run nothing.
func (g *lmtpLeg) ask() error {
	asksMail := !g.mailed
	r, err := g.send(asksMail)
	if asksMail && g.reused && r.code == 421 {
		if err = g.replace(nil); err != nil {
			return fmt.Errorf("%w: %w", errUnreached, err)
		}
		g.unsent = g.mail(g.unsent[:0])
		for _, d := range g.unanswered() {
			g.unsent = g.rcpt(g.unsent, d)
		}
		r, err = g.send(true)
	}
	g.unsent = g.unsent[:0]
	if err != nil {
		return err
	}
	if asksMail {
		g.mailed = r.code/100 == 2
	}
	if asksMail && r.code == 421 {
		return &refusal{g.passable(r)}
	}
	for _, d := range g.unanswered() {
		answer := r // to MAIL: where it is refused, RCPT is out of sequence
		next, err := readReply(g.conn.lineConn)
		if err != nil {
			return err
		}
		if g.mailed {
			answer = next
		}
		if answer.code == 421 { // it closes the connection
			return &refusal{g.passable(answer)}
		}
		g.answered(d, g.passable(answer))
	}
	return nil
}

// send writes the unsent commands and, if MAIL is among them, reads its reply.
func (g *lmtpLeg) send(asksMail bool) (r reply, err error) {
	if err := g.conn.write(g.unsent); err != nil || !asksMail {
		return r, err
	}
	return readReply(g.conn.lineConn)
}

// unanswered are the deliveries whose RCPT has no answer yet.
func (g *lmtpLeg) unanswered() []*delivery {
	g.mu.Lock()
	defer g.mu.Unlock()
	for n, d := range g.deliveries {
		if d.answer.code == 0 {
			return g.deliveries[n:] // they are answered in order
		}
	}
	return nil
}

// answered records the backend's answer to a RCPT. Who is refused has no
// business there any more.
func (g *lmtpLeg) answered(d *delivery, answer reply) {
	g.mu.Lock()
	defer g.mu.Unlock()
	d.answer = answer
	if !d.isAccepted() && g.phase != legEnded {
		d.finish(answer, routing.End{Proven: true})
	}
}

// deliver passes the body on and collects the replies; then the leg has ended.
func (g *lmtpLeg) deliver() {
	defer g.survive()
	isDotted, err := g.pass()
	switch {
	case err == nil:
		err = g.collect()
		if err != nil {
			break
		}
		g.end(replyTryAgain, routing.End{Proven: true}, true)
		return
	case !isDotted:
		if g.isOver() == nil { // else it is we who have cut it
			g.log.Warn("lmtp: a backend failed during the message", zap.Error(err))
		}
		g.end(replyFor(err), routing.End{Proven: true}, false)
		return
	}
	g.log.Warn("lmtp: a backend failed after the message", zap.Error(err))
	g.end(replyFor(err), routing.End{Proven: g.backend.EOFProves && errors.Is(err, errClientLeft), Why: "lmtp: no reply after the final dot"}, false)
}

// pass sends DATA and the body. isDotted: the backend may have seen the end.
func (g *lmtpLeg) pass() (isDotted bool, err error) {
	limits := g.t.server.options.Limits
	if !g.enter(legPassing, limits.BackendLoginTimeout) {
		return false, errLegEnded
	}
	r, err := ask(g.conn.lineConn, "DATA")
	if err != nil {
		return false, err
	}
	if r.code != 354 {
		return false, &refusal{g.passable(r)}
	}
	for {
		p, last, err := g.reader.Next()
		if errors.Is(err, io.EOF) {
			return true, nil
		}
		if err != nil {
			return isDotted, err
		}
		if last && !isDotted && g.conn.stirs() {
			// Its end, or words that would be taken for its verdict on a
			// message that it has not got.
			return false, failf(Unavailable, "DATA", "the backend speaks or leaves before the end of the message")
		}
		phase := legPassing
		if last {
			phase, isDotted = legDotted, true
		}
		if !g.enter(phase, limits.WriteTimeout) {
			return false, errLegEnded
		}
		if err := g.conn.write(p); err != nil {
			return isDotted, err
		}
	}
}

// refusal is a backend's reply that ends its part of the transaction.
type refusal struct{ reply reply }

func (r *refusal) Error() string { return "the backend refuses: " + r.reply.String() }

// collect reads one reply for each RCPT that the backend has accepted, in their
// order (RFC 2033 §4.2). Each ends a stay.
func (g *lmtpLeg) collect() error {
	if !g.enter(legDotted, g.t.server.lmtp.options.ReplyTimeout) {
		return errLegEnded
	}
	for _, d := range g.deliveries {
		if !d.isAccepted() {
			continue
		}
		r, err := readReply(g.conn.lineConn)
		if err == nil && r.code/100 == 3 {
			err = failf(Unavailable, "read the replies", "out of step: %s", r)
		}
		if err != nil {
			return err
		}
		d.finish(g.passable(r), routing.End{Proven: true})
	}
	return nil
}

// passable is what the MTA may be told of a backend's reply. Its verdicts on
// the mailbox and the message are passed on in its own words; what it says of
// our commands is our fault, and so temporary.
func (g *lmtpLeg) passable(r reply) reply {
	switch {
	case r.code/100 == 2, r.code/100 == 4 && r.code != 421:
		return r
	case r.code == 421: // it closes its connection, we do not close ours
		return reply{code: 451, lines: r.lines}
	case r.code >= 550 && r.code <= 554:
		return r
	}
	g.log.Error("lmtp: a backend does not take our commands", zap.Stringer("reply", r))
	return replyOurFault
}

// replyFor is what recipients are told of a failure on the way to a backend.
func replyFor(err error) reply {
	var r *refusal
	switch {
	case errors.As(err, &r) && r.reply.code/100 != 2: // yes to DATA is no yes to the message
		return r.reply
	case reasonOf(err).alarms():
		return replyOurFault
	case errors.Is(err, errUnreached):
		return replyNotThere
	case errors.Is(err, os.ErrDeadlineExceeded) || reasonOf(err) == TimedOut:
		return replyNoAnswer
	}
	return replyLost
}
