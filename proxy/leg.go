package proxy

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	"go.uber.org/zap"

	"github.com/posthouse/posthouse/backendpool"
	"github.com/posthouse/posthouse/proxy/spool"
	"github.com/posthouse/posthouse/routing"
)

// lmtpLeg is what one transaction has at one backend for one role: a
// connection, and the deliveries with their stays. It goes
//
//	MAIL, RCPT …    by the transaction's goroutine: add, answers
//	DATA, the body  by a goroutine of its own: deliver
//	the final dot
//	replies
//
// and ends once, by that goroutine or because a switch has revoked the stays:
// cut. Before the final dot it is cut at once, and the backend throws away what
// has no end. After the dot the backend's replies are awaited for drain_timeout:
// what it has answered has happened, what it has not leaves a residue.
type lmtpLeg struct {
	t       *transaction
	backend *backendpool.Backend
	role    string
	epoch   uint64
	log     *zap.Logger

	ctx    context.Context // ends with the leg
	cancel context.CancelFunc
	reader *spool.Reader // of the body; set before deliver

	// Of the goroutine that is at work.
	unsent []byte // commands not yet written
	mailed bool   // MAIL was accepted
	reused bool   // conn has served another transaction
	isDown bool   // there was no way to the backend

	mu         sync.Mutex
	phase      legPhase
	conn       *lmtpConn // nil, or the leg has a right of Reuse with it
	deliveries []*delivery
	why        *reply // the leg has ended, or is to end early: what its recipients are told
}

// legPhase says what a leg has to do when it is cut.
type legPhase int

const (
	legOpen    legPhase = iota // nothing is under way that could have an effect
	legAsking                  // the backend works on a RCPT: it may create a mailbox
	legPassing                 // the body is on its way: without the dot it counts for nothing
	legDotted                  // the final dot may be there: the replies decide
	legEnded
)

// newLeg makes a leg for the role and epoch of stay and watches the stay: those
// of a leg are in one role and one epoch, so they are revoked together.
func newLeg(ctx context.Context, t *transaction, backend *backendpool.Backend, stay *routing.Stay) *lmtpLeg {
	g := &lmtpLeg{t: t, backend: backend, role: stay.Role, epoch: stay.Epoch,
		log: t.log.With(zap.String("backend", stay.Backend), zap.String("role", stay.Role))}
	g.ctx, g.cancel = context.WithCancel(context.WithoutCancel(ctx))
	t.running.Go(func() { g.watch(ctx, stay) })
	return g
}

// watch cuts the leg when its stays are revoked or the frontend stops, and
// returns when the leg has ended.
func (g *lmtpLeg) watch(ctx context.Context, stay *routing.Stay) {
	defer g.survive()
	select {
	case <-stay.Revoked():
		g.cut(replyMoved, false)
	case <-ctx.Done():
		g.cut(replyStopping, false)
	case <-g.ctx.Done():
	}
	<-g.ctx.Done()
}

// cut ends the leg as early as it can be: at once, or when the backend has
// answered what it is at. Where spareDotted is set, a backend that may have the
// whole message keeps its time to answer.
func (g *lmtpLeg) cut(why reply, spareDotted bool) {
	g.mu.Lock()
	if g.phase == legEnded || g.why != nil || spareDotted && g.phase == legDotted {
		g.mu.Unlock()
		return
	}
	if g.conn != nil && (g.phase == legAsking || g.phase == legDotted) {
		g.why = &why
		g.conn.deadline(time.Now().Add(g.t.server.options.Limits.DrainTimeout))
		g.mu.Unlock()
		return
	}
	// In the same moment: nobody may send the dot any more. Without a
	// connection while asking, ask has one replaced that took nothing.
	last := g.endLocked(why, routing.End{Proven: true}, false)
	g.mu.Unlock()
	last()
}

// end ends the leg; only the first call counts. Whoever has no last reply yet
// gets this one, and its stay this end. isClean: every reply has been read, so
// that the connection may serve the next message (safety 33).
func (g *lmtpLeg) end(final reply, end routing.End, isClean bool) {
	g.mu.Lock()
	if g.phase == legEnded {
		g.mu.Unlock()
		return
	}
	last := g.endLocked(final, end, isClean)
	g.mu.Unlock()
	last()
}

// endLocked makes the leg an ended one. What it returns has to be called without
// the lock, and does the rest.
func (g *lmtpLeg) endLocked(final reply, end routing.End, isClean bool) (last func()) {
	isAsking := g.phase == legAsking
	g.phase = legEnded
	if g.why == nil {
		g.why = &final
	}
	final = *g.why
	conn, deliveries := g.conn, g.deliveries
	return func() { g.part(conn, deliveries, isAsking, final, end, isClean) }
}

// part closes or gives back an ended leg's connection, then ends its stays.
func (g *lmtpLeg) part(conn *lmtpConn, deliveries []*delivery, isAsking bool, final reply, end routing.End, isClean bool) {
	reuse := g.t.server.lmtp.reuse
	switch {
	case conn == nil:
	case isClean && !conn.pipelined():
		reuse.Put(g.backend.Name, conn)
	default:
		conn.abort()
		reuse.Drop(g.backend.Name)
	}
	if g.reader != nil {
		g.reader.Close()
	}
	for _, d := range deliveries {
		select {
		case <-d.done:
		default:
			end := end
			if isAsking && d.answer.code != 0 { // its RCPT is done
				end = routing.End{Proven: true}
			}
			if !end.Proven {
				g.log.Warn("a delivery may still run on the backend", zap.String("user", d.stay.User), zap.String("why", end.Why))
			}
			d.finish(final, end)
		}
	}
	g.cancel()
}

// enter begins a phase, in which nothing may take longer than timeout; where the
// leg is being cut already, drain_timeout goes on. false: the leg has ended.
func (g *lmtpLeg) enter(phase legPhase, timeout time.Duration) bool {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.phase == legEnded || g.conn == nil {
		return false
	}
	g.phase = phase
	if g.why == nil {
		g.conn.deadline(time.Now().Add(timeout))
	}
	return true
}

// add puts a delivery on the leg; its RCPT goes out with the next answers.
// false: the leg has ended, and the stay is still the caller's.
func (g *lmtpLeg) add(d *delivery) bool {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.why != nil {
		return false
	}
	g.deliveries = append(g.deliveries, d)
	if !g.mailed && len(g.unsent) == 0 {
		g.unsent = g.mail(g.unsent)
	}
	g.unsent = g.rcpt(g.unsent, d)
	g.t.running.Go(func() { g.follow(d) })
	return true
}

// follow cuts the leg when this delivery's stay is revoked: the one that watch
// knows may have left before.
func (g *lmtpLeg) follow(d *delivery) {
	defer g.survive()
	select {
	case <-d.stay.Revoked():
		g.cut(replyMoved, false)
	case <-d.done:
	}
}

// isOver is what recipients are told who come when the leg has ended, or is about
// to; nil while it has not.
func (g *lmtpLeg) isOver() *reply {
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.why
}

// find is the delivery to that address that still stands.
func (g *lmtpLeg) find(to mailbox) *delivery {
	g.mu.Lock()
	defer g.mu.Unlock()
	for _, d := range g.deliveries {
		if d.to == to && (d.answer.code == 0 || d.isAccepted()) {
			return d
		}
	}
	return nil
}

// mail appends the MAIL command, rcpt a RCPT: from their parts, with what this
// backend understands.
func (g *lmtpLeg) mail(p []byte) []byte {
	p = append(append(append(p, "MAIL FROM:<"...), g.t.sender.String()...), '>')
	return append(g.t.params.write(p, g.conn.has), "\r\n"...)
}

func (g *lmtpLeg) rcpt(p []byte, d *delivery) []byte {
	p = append(append(append(p, "RCPT TO:<"...), d.to.String()...), '>')
	return append(d.params.write(p, g.conn.has), "\r\n"...)
}

// open gets a connection, an idle one if there is one. On an error the leg has
// none, and is the caller's to end.
func (g *lmtpLeg) open() error {
	limits := g.t.server.options.Limits
	waiting, enough := context.WithTimeout(g.ctx, limits.ConnectTimeout)
	defer enough()
	conn, reused, err := g.t.server.lmtp.reuse.Get(waiting, g.backend.Name)
	if err != nil {
		return fmt.Errorf("%w: %w", errBusy, err)
	}
	if !reused {
		return g.openFresh()
	}
	if conn.stirs() {
		conn.abort()
		g.t.server.lmtp.reuse.Fresh(g.backend.Name)
		return g.openFresh()
	}
	if err = g.take(conn, true); err != nil {
		return g.replace(err)
	}
	return nil
}

// openFresh connects, with a right of Reuse that it gives back on an error.
func (g *lmtpLeg) openFresh() error {
	conn, err := g.t.server.openLMTP(g.ctx, g.backend)
	if err != nil {
		g.t.server.lmtp.reuse.Drop(g.backend.Name)
		return err
	}
	return g.take(conn, false)
}

// take makes conn the leg's. Nothing has been said on it yet for this
// transaction, so that an ended leg gives it back as it is.
func (g *lmtpLeg) take(conn *lmtpConn, reused bool) error {
	g.mu.Lock()
	if g.phase == legEnded || g.why != nil {
		g.mu.Unlock()
		g.t.server.lmtp.reuse.Put(g.backend.Name, conn)
		return errLegEnded
	}
	g.conn, g.reused = conn, reused
	g.mu.Unlock()
	conn.deadline(time.Now().Add(g.t.server.options.Limits.BackendLoginTimeout))
	return conn.introduce(g.t.server, g.backend, g.t.origin())
}

// replace connects anew for a reused connection that is of no use. If it turned
// out dead, so will the others that are idle.
func (g *lmtpLeg) replace(why error) error {
	g.mu.Lock()
	if g.phase == legEnded || g.conn == nil {
		g.mu.Unlock()
		return errLegEnded
	}
	old := g.conn
	g.conn = nil
	g.mu.Unlock()
	if errors.Is(why, errToldMore) {
		_ = old.Close()
	} else {
		old.abort()
		g.t.server.lmtp.reuse.Fresh(g.backend.Name)
	}
	return g.openFresh()
}

// begin says whether the leg has somebody to deliver to, and readies it.
func (g *lmtpLeg) begin(body *spool.Spool) bool {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.phase == legEnded || g.why != nil {
		return false
	}
	for _, d := range g.deliveries {
		if d.isAccepted() {
			g.phase = legPassing
			g.reader = body.NewReader()
			return true
		}
	}
	return false
}

// release ends a leg that shall not deliver. Its connection forgets the
// transaction and may serve another.
func (g *lmtpLeg) release() {
	defer g.survive()
	if !g.enter(legOpen, quitTimeout) {
		g.end(replyNotPassed, routing.End{Proven: true}, false)
		return
	}
	isClean := true
	if g.mailed {
		r, err := ask(g.conn.lineConn, "RSET")
		isClean = err == nil && r.code == 250
	}
	g.end(replyNotPassed, routing.End{Proven: true}, isClean)
}

// survive keeps a fault in one delivery from ending all: nothing is known of
// what its backend does.
func (g *lmtpLeg) survive() {
	if fault := recover(); fault != nil {
		g.log.Error("internal fault in a delivery", zap.Any("fault", fault), zap.Stack("stack"))
		g.end(replyTryAgain, routing.End{Why: "internal fault"}, false)
	}
}
