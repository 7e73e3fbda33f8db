package proxy

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"time"

	"go.uber.org/zap"

	"github.com/posthouse/posthouse/backendpool"
	"github.com/posthouse/posthouse/proxy/spool"
	"github.com/posthouse/posthouse/routing"
)

// transaction is one message on its way from an MTA to the backends of its
// recipients, from MAIL until the last reply. The session's goroutine drives
// it; a leg passes the body on and collects replies by a goroutine of its own.
type transaction struct {
	server *Server
	s      *lmtpSession
	log    *zap.Logger

	sender   mailbox
	params   mailParams
	began    time.Time
	holdLeft time.Duration // of hold.lmtp, for all recipients together

	legs []*lmtpLeg
	// recipients are the RCPTs that get a reply after the message, in their
	// order; asked those whose own reply is still due.
	recipients, asked []*recipient
	rcpts             int // RCPTs so far, refused ones too

	body    *spool.Spool // from the first octet on
	octets  int64        // of the message, as the MTA counts them
	running sync.WaitGroup
}

// recipient is one RCPT of the MTA. at is shared by those that come to one
// address at one backend.
type recipient struct {
	address string // as the MTA gave it, normalised
	leg     *lmtpLeg
	at      *delivery
}

// begin starts a transaction.
func (s *lmtpSession) begin(sender mailbox, params mailParams) *transaction {
	s.transactions++
	return &transaction{
		server: s.server, s: s, sender: sender, params: params, began: time.Now(),
		holdLeft: s.server.lmtp.options.Hold,
		log:      s.log.With(zap.Int("transaction", s.transactions), zap.String("sender", sender.String())),
	}
}

// origin is whom the backends are told that we ask for.
func (t *transaction) origin() clientAttributes { return t.s.origin() }

// rcpt finds a recipient's place. A reply that does not need the backend's comes
// back at once; else the recipient is asked, and settle brings its reply.
func (t *transaction) rcpt(ctx context.Context, to mailbox, params rcptParams) *reply {
	if t.rcpts++; t.rcpts > t.server.lmtp.options.MaxRecipients {
		r := newReply(452, "4.5.3 Too many recipients")
		return &r
	}
	stay, target, err := t.enter(ctx, to)
	if err != nil {
		return t.refuse(to, t.placeless(ctx, err), err)
	}
	g, err := t.legFor(ctx, stay)
	over := g.isOver()
	if over == nil && t.params.utf8 && !g.conn.has("SMTPUTF8") {
		over = &replyOurFault // what we announced holds no more; at its next LHLO the MTA will see
	}
	if over != nil {
		stay.Leave(routing.End{Proven: true})
		return t.refuse(to, *over, err)
	}
	r := &recipient{address: to.String(), leg: g, at: g.find(target)}
	if r.at != nil {
		stay.Leave(routing.End{Proven: true}) // the delivery has one
		t.asked = append(t.asked, r)
		return nil
	}
	r.at = &delivery{to: target, params: params, stay: stay, done: make(chan struct{})}
	if !g.add(r.at) {
		stay.Leave(routing.End{Proven: true})
		return t.refuse(to, *g.isOver(), nil)
	}
	if t.asked = append(t.asked, r); len(t.asked) >= mostAsked {
		t.settle()
	}
	return nil
}

// refuse answers a recipient who gets no further than us.
func (t *transaction) refuse(to mailbox, r reply, err error) *reply {
	t.server.metrics.lmtp.recipients.WithLabelValues(outcomeOf(r)).Inc()
	t.log.Info("lmtp: recipient "+outcomeOf(r), zap.Stringer("recipient", to), zap.Stringer("reply", r), zap.Error(err))
	return &r
}

// mostAsked bounds the commands that a backend has before we read: it may stop
// reading while nobody takes its replies.
const mostAsked = 100

// legFor is the transaction's leg for a stay, opened if it is the first. One that
// is over stays so, and a backend that is down is tried once, for whatever role:
// the others' recipients have no time for more.
func (t *transaction) legFor(ctx context.Context, stay *routing.Stay) (*lmtpLeg, error) {
	for _, g := range t.legs {
		if g.backend.Name == stay.Backend && (g.isDown || g.role == stay.Role && g.epoch == stay.Epoch) {
			return g, nil
		}
	}
	backend, ok := t.server.options.Backends.Backend(stay.Backend)
	if !ok {
		backend = &backendpool.Backend{Name: stay.Backend}
	}
	g := newLeg(ctx, t, backend, stay)
	t.legs = append(t.legs, g)
	var err error
	if ok {
		t.s.do("connecting to " + stay.Backend)
		err = g.open()
	} else {
		err = failf(Misconfigured, "find the backend", "backend %s is in the role table and not in this frontend's configuration", stay.Backend)
	}
	if err != nil {
		g.isDown = true
		final := replyNotThere
		switch {
		case reasonOf(err).alarms():
			final = replyOurFault
		case errors.Is(err, errBusy):
			final = replyBusy
		}
		g.log.Warn("lmtp: no way to the backend", zap.Error(err))
		g.end(final, routing.End{Proven: true}, false)
	}
	return g, err
}

// enter gets a recipient a stay, under the first of its names that the
// directory knows, and the address that the backend gets.
func (t *transaction) enter(ctx context.Context, to mailbox) (*routing.Stay, mailbox, error) {
	t.s.do("looking up a recipient")
	candidates := t.server.lmtp.candidates(to)
	if len(candidates) == 0 {
		return nil, mailbox{}, fmt.Errorf("%w: no name that `usernames` allows, the directory was not asked", routing.ErrUnknownUser)
	}
	for _, c := range candidates {
		stay, err := t.wait(ctx, c.user)
		if errors.Is(err, routing.ErrUnknownUser) {
			continue
		}
		if err != nil {
			return nil, mailbox{}, err
		}
		return stay, t.server.lmtp.address(stay.User, c.detail), nil
	}
	return nil, mailbox{}, routing.ErrUnknownUser
}

var errHoldOver = errors.New("hold.lmtp is over")

// wait enters the user's role. All waits for roles on hold together may take
// hold.lmtp.
func (t *transaction) wait(ctx context.Context, user string) (*routing.Stay, error) {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	var since time.Time
	var over *time.Timer
	options := []routing.EnterOption{routing.OnPark(func(role string) {
		// Nothing may be under way while we wait: a leg whose backend is at
		// a RCPT could not be cut.
		t.settle()
		t.s.do("waiting for role " + role)
		if since.IsZero() {
			since = time.Now()
			over = time.AfterFunc(t.holdLeft, func() { cancel(errHoldOver) })
		}
	})}
	if t.holdLeft <= 0 {
		options = append(options, routing.NoWait())
	}
	stay, err := t.server.options.Table.Enter(ctx, user, options...)
	if over != nil {
		over.Stop()
		t.holdLeft -= time.Since(since)
	}
	if err != nil && errors.Is(context.Cause(ctx), errHoldOver) {
		return nil, routing.ErrHeld
	}
	return stay, err
}

// placeless is the answer to a recipient who could not be placed. Only a
// directory that is sure makes it permanent.
func (t *transaction) placeless(ctx context.Context, err error) reply {
	switch {
	case errors.Is(err, routing.ErrUnknownUser):
		return newReply(550, "5.1.1 No such user here")
	case ctx.Err() != nil || errors.Is(err, routing.ErrClosed):
		return replyStopping
	case errors.Is(err, routing.ErrHeld):
		return replyMoved
	}
	return replyTryAgain
}

// settle brings the replies to all RCPTs that are asked, in their order: to the
// MTA's buffer, and to recipients who gets another after the message.
func (t *transaction) settle() {
	if len(t.asked) == 0 {
		return
	}
	t.s.do("waiting for replies to RCPT")
	// All at a time: a slow backend must not keep another's switch waiting.
	var asking sync.WaitGroup
	for _, g := range t.legs[1:] {
		asking.Go(g.answers)
	}
	t.legs[0].answers()
	asking.Wait()
	for _, r := range t.asked {
		answer := r.at.answer
		if answer.code == 0 {
			<-r.at.done // its leg has ended
			answer = r.at.final
		}
		t.s.reply(answer)
		if r.at.isAccepted() {
			t.recipients = append(t.recipients, r)
		} else {
			t.outcome(r, answer)
		}
	}
	t.asked = t.asked[:0]
}

// start readies the legs for the body: those that have nobody to deliver to
// end. The reply is nil if the body can come; else it answers DATA or BDAT.
func (t *transaction) start() *reply {
	if len(t.recipients) == 0 {
		r := newReply(503, "5.5.1 No valid recipients")
		return &r
	}
	t.body = spool.New(spool.Options{
		Dir: t.server.lmtp.options.SpoolDir, MaxLag: t.server.lmtp.options.MaxLag, Disk: t.server.lmtp.disk, OnSpill: t.spilled,
	})
	n := 0
	for _, g := range t.legs {
		if g.begin(t.body) {
			n++
			t.running.Go(g.deliver)
		} else {
			t.running.Go(g.release)
		}
	}
	t.server.metrics.lmtp.width.Observe(float64(n))
	if n > 0 {
		t.s.do("passing a message on")
		return nil
	}
	first := t.recipients[0].at // all have been cut
	<-first.done
	return &first.final
}

func (t *transaction) spilled() {
	t.server.metrics.lmtp.spilled.Inc()
	t.log.Info("lmtp: a backend is slow, the message goes to disk", zap.Duration("max_lag", t.server.lmtp.options.MaxLag))
}

// finish answers every recipient after the complete message, in the order of
// their RCPTs, each as soon as it is known (RFC 2033 §4.2). verdict, if not
// nil, is ours on the message: then no backend gets the final dot.
func (t *transaction) finish(verdict *reply) {
	if verdict != nil {
		t.drop()
	} else {
		t.body.Commit(finalDot)
	}
	t.s.do("waiting for replies to the message")
	delivered := 0
	for _, r := range t.recipients {
		select {
		case <-r.at.done:
		default:
			if t.s.flush() != nil {
				t.drop() // who has not got the dot yet gets the message again
			}
			<-r.at.done
		}
		final := r.at.final
		if verdict != nil {
			final = *verdict
		}
		if final.code/100 == 2 {
			delivered++
		}
		t.outcome(r, final)
		t.s.reply(final)
	}
	_ = t.s.flush() // before the next message is waited for; what fails shows when it is read
	result := "complete"
	if delivered < len(t.recipients) {
		result = "incomplete"
	}
	t.end(result)
}

// finalDot ends the DATA (RFC 5321 §4.5.2). The body before it ends by CRLF.
var finalDot = []byte(".\r\n")

// drop takes the message back from every backend that has not got its final
// dot.
func (t *transaction) drop() {
	for _, g := range t.legs {
		g.cut(replyNotPassed, true)
	}
}

// abandon ends a transaction whose message did not come to its end: RSET, a new
// LHLO, or the MTA has gone.
func (t *transaction) abandon() {
	t.settle()
	if t.body == nil {
		for _, g := range t.legs {
			t.running.Go(g.release)
		}
	} else {
		t.drop()
	}
	t.end("abandoned")
}

// end waits until all legs have ended.
func (t *transaction) end(result string) {
	t.running.Wait()
	if t.body != nil {
		t.body.Close()
	}
	took := time.Since(t.began)
	t.server.metrics.lmtp.ended(result, took)
	t.log.Info("lmtp: transaction ended", zap.String("result", result), zap.Int("recipients", len(t.recipients)),
		zap.Int("backends", len(t.legs)), zap.Int64("octets", t.octets), zap.Duration("took", took))
}

// outcome records what a recipient was told last.
func (t *transaction) outcome(r *recipient, final reply) {
	outcome := outcomeOf(final)
	t.server.metrics.lmtp.recipients.WithLabelValues(outcome).Inc()
	t.log.Info("lmtp: "+outcome, zap.String("recipient", r.address), zap.String("user", r.at.stay.User),
		zap.String("role", r.leg.role), zap.String("backend", r.leg.backend.Name), zap.Uint64("epoch", r.leg.epoch), zap.Stringer("reply", final))
}

func outcomeOf(r reply) string {
	switch r.code / 100 {
	case 2:
		return "delivered"
	case 4:
		return "deferred"
	}
	return "refused"
}

// candidate is a name under which the directory may know a recipient, and what
// stays for the backend to see to.
type candidate struct{ user, detail string }

// candidates are a recipient's names, the most exact first, in canonical
// spelling. What cannot be a user's name is none of them.
func (l *lmtpTarget) candidates(to mailbox) []candidate {
	var list []candidate
	try := func(name, detail string) {
		if name, err := l.options.Names.Normalize(name); err == nil && !slices.ContainsFunc(list, func(c candidate) bool { return c.user == name }) {
			list = append(list, candidate{name, detail})
		}
	}
	base, detail := to.local, ""
	if d := l.options.Delimiter; d != "" {
		if before, after, found := strings.Cut(to.local, d); found && before != "" {
			base, detail = before, after
		}
	}
	if to.domain != "" {
		try(to.local+"@"+to.domain, "")
		try(base+"@"+to.domain, detail)
	}
	if to.domain == "" || l.isLocal(to.domain) {
		try(to.local, "")
		try(base, detail)
	}
	if l.options.Postmaster != "" && strings.EqualFold(base, "postmaster") {
		try(l.options.Postmaster, "")
	}
	if l.options.CatchAll != "" {
		try(l.options.CatchAll, "")
	}
	return list
}

// RecipientNames returns the names under which a delivery to address looks for its
// user in the directory, the first first; none if it is no address.
func (s *Server) RecipientNames(address string) []string {
	to, _, fault := parseForward("TO:<" + address + ">")
	if fault != nil {
		return nil
	}
	var names []string
	for _, c := range s.lmtp.candidates(to) {
		names = append(names, c.user)
	}
	return names
}

func (l *lmtpTarget) isLocal(domain string) bool {
	return slices.Contains(l.options.LocalDomains, "*") || slices.Contains(l.options.LocalDomains, domain)
}

// address is what a backend gets: the canonical user (safety 29), with the
// detail that the MTA gave.
func (l *lmtpTarget) address(user, detail string) mailbox {
	m := mailbox{local: user}
	if at := strings.LastIndexByte(user, '@'); at >= 0 {
		m.local, m.domain = user[:at], user[at+1:]
	}
	if detail != "" {
		m.local += l.options.Delimiter + detail
	}
	return m
}
