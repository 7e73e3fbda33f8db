package routing

import (
	"context"
	"math"
	"time"

	"go.uber.org/zap"
)

// leaseOver is why a frontend serves nobody that cannot renew its lease.
const leaseOver = "this frontend cannot renew its lease in the store, and may be counted as ended soon"

// leaseCheck is how often a lease is looked at that is over, or has no end.
const leaseCheck = 100 * time.Millisecond

// leaseLeft is for how long sessions may go on before they have to end, so that
// nobody is inside when others may count this frontend as ended (safety 10). A
// process that was stopped, or whose machine was, finds it over only when it
// runs again: a fence hook sees to what its sockets did meanwhile.
func (t *Table) leaseLeft() time.Duration {
	deadline := t.opt.Store.Deadline()
	if deadline.IsZero() {
		return math.MaxInt64
	}
	return time.Until(deadline) - t.opt.DrainTimeout
}

// heedDeadline revokes all stays when the lease cannot be renewed, and wakes
// those who wait when it is, until ctx ends.
func (t *Table) heedDeadline(ctx context.Context) {
	if t.opt.Store.Deadline().IsZero() {
		return // by the kind of store
	}
	isOver := false
	for ctx.Err() == nil {
		left := t.leaseLeft()
		switch {
		case left <= 0 && !isOver:
			isOver = true
			t.log.Error("the lease in the store cannot be renewed: all sessions end, new logins wait", zap.Int("sessions", t.revokeAll()))
		case left > 0 && isOver:
			isOver = false
			t.log.Warn("the lease in the store is renewed: logins go on")
			t.wakeAll()
		}
		pause(ctx, min(max(left, leaseCheck), time.Second))
	}
}

// revokeAll ends all stays and returns how many there were.
func (t *Table) revokeAll() int {
	t.mu.Lock()
	defer t.mu.Unlock()
	n := 0
	for _, g := range t.gates {
		for s := range g.stays {
			if s.revokeLocked() {
				t.emitLocked(Event{Kind: EventRevoked, Role: s.Role, User: s.User, Backend: s.Backend, Epoch: s.Epoch, Text: leaseOver})
				n++
			}
		}
	}
	t.wakeAnnouncer()
	return n
}

func (t *Table) wakeAll() {
	t.mu.Lock()
	defer t.mu.Unlock()
	for _, g := range t.gates {
		g.wakeAll()
	}
}
