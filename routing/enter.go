package routing

import (
	"context"
	"errors"
	"fmt"
	"time"
)

// EnterOption changes how Enter waits.
type EnterOption func(*login)

// NoWait makes Enter answer ErrHeld at once where it would park.
func NoWait() EnterOption { return func(l *login) { l.noWait = true } }

// OnPark is called, from Enter, each time the login is parked at a role other
// than before.
func OnPark(f func(role string)) EnterOption { return func(l *login) { l.onPark = f } }

// login is one Enter on its way.
type login struct {
	name   string
	noWait bool
	client client
	onPark func(role string)

	gate   *gate       // where it is parked; Table.mu guards it
	slots  []slot      // that it has there
	window *time.Timer // since it was first parked
	at     string      // the role of the last OnPark
}

// resolved is the answer to one lookup.
type resolved struct {
	user, role   string
	isOverridden bool
}

// Enter looks up the user's role, waits while the role is between backends,
// and registers a session in the role's epoch: from then on no switch opens
// another backend before the stay has ended. The caller must call Leave.
//
// It returns ErrUnknownUser if the directory is sure; ErrHeld after HoldWindow;
// ErrInDoubt; ErrClosed; or another error if it could not tell.
func (t *Table) Enter(ctx context.Context, user string, opts ...EnterOption) (*Stay, error) {
	l := &login{name: user}
	for _, o := range opts {
		o(l)
	}
	defer t.unpark(l)
	for {
		// Anew after each wait: the user may have been moved meanwhile (27).
		who, err := t.resolve(ctx, user)
		if err != nil {
			return nil, err
		}
		stay, wake, err := t.tryEnter(l, who)
		if stay != nil || err != nil {
			return stay, err
		}
		if err := t.wait(ctx, l, who, wake); err != nil {
			return nil, err
		}
	}
}

// resolve finds the canonical user and the role: a move's override, else the
// role in which this frontend last saw the user, else the directory's.
func (t *Table) resolve(ctx context.Context, name string) (resolved, error) {
	entry, err := t.opt.Directory.Lookup(ctx, name)
	if err != nil {
		if errors.Is(err, ErrUnknownUser) {
			return resolved{}, err
		}
		return resolved{}, fmt.Errorf("looking up %s in the directory: %w", name, err)
	}
	s := t.Snapshot()
	if role, ok := s.Overrides[entry.User]; ok {
		return resolved{entry.User, role, true}, t.moved(entry.User, role)
	}
	if _, ok := s.Roles[entry.Role]; !ok {
		return resolved{}, unknownRole(entry.Role, entry.User)
	}
	role, err := t.opt.Local.Remember(entry.User, entry.Role)
	if err != nil {
		return resolved{}, fmt.Errorf("remembering the role of %s: %w", entry.User, err)
	}
	if role != entry.Role {
		t.disagree(entry, role)
	}
	return resolved{entry.User, role, false}, nil
}

// moved makes this frontend remember the role that an override gave.
func (t *Table) moved(user, role string) error {
	last, err := t.opt.Local.Recall(user)
	if err == nil && last != role {
		err = t.opt.Local.Replace(user, role)
	}
	if err != nil {
		return fmt.Errorf("remembering the role of %s: %w", user, err)
	}
	return nil
}

// disagree sounds the alarm of safety 26. The old role wins: the user may have
// sessions in it, here or elsewhere.
func (t *Table) disagree(entry Entry, old string) {
	t.disagreements.Add(1)
	t.emit(Event{Kind: EventDisagreement, User: entry.User, Role: old, Text: "the directory says " + entry.Role})
}

func unknownRole(role, user string) error {
	return fmt.Errorf("role %q of %s is not in the role table: add it with `posthouse roles init %s --active BACKEND`, or correct the directory", role, user, role)
}

// tryEnter decides under the lock: a stay, an error, or a channel to wait on.
func (t *Table) tryEnter(l *login, who resolved) (*Stay, <-chan struct{}, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.unparkLocked(l)
	if t.isClosed {
		return nil, nil, ErrClosed
	}
	v := t.view.Load()
	if role, ok := v.state.Overrides[who.user]; ok != who.isOverridden || ok && role != who.role {
		return nil, alreadyClosed, nil // moved since it was looked up: look again
	}
	row, ok := v.state.Roles[who.role]
	if !ok {
		return nil, nil, unknownRole(who.role, who.user)
	}
	if isUnknown(row) {
		return nil, nil, fmt.Errorf("%w: role %s: %s", ErrInDoubt, who.role, row.Doubt.Why)
	}
	g := t.gateLocked(who.role)
	in := t.rules.admit(row, t.presenceLocked(g, v, row))
	if in == "" && t.leaseLeft() <= 0 {
		in = leaseOver
	}
	switch {
	case in == "":
		return t.stayLocked(g, who.user, row, l.client), nil, nil
	case l.noWait:
		return nil, nil, fmt.Errorf("%w: role %s: %s", ErrHeld, who.role, in)
	}
	return nil, g.wake, t.parkLocked(l, g, who.user)
}

var alreadyClosed = func() chan struct{} { c := make(chan struct{}); close(c); return c }()

// wait blocks until the gate wakes its parked logins, or the window is over.
func (t *Table) wait(ctx context.Context, l *login, who resolved, wake <-chan struct{}) error {
	if wake == alreadyClosed {
		return ctx.Err()
	}
	if l.window == nil {
		l.window = time.NewTimer(t.opt.HoldWindow)
	}
	if l.at != who.role {
		l.at = who.role
		t.emit(Event{Kind: EventParked, Role: who.role, User: who.user})
		if l.onPark != nil {
			l.onPark(who.role)
		}
	}
	select {
	case <-wake:
		return t.takeTurn(ctx, l)
	case <-l.window.C:
		return fmt.Errorf("%w: role %s: parked for %v", ErrHeld, who.role, t.opt.HoldWindow)
	case <-t.closing:
		return ErrClosed
	case <-ctx.Done():
		return ctx.Err()
	}
}

func (t *Table) unpark(l *login) {
	if l.window != nil {
		l.window.Stop()
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	t.unparkLocked(l)
}

func (t *Table) gateLocked(role string) *gate {
	g, ok := t.gates[role]
	if !ok {
		g = newGate(role)
		t.gates[role] = g
	}
	return g
}

func (t *Table) presenceLocked(g *gate, v *view, row Row) presence {
	f, registered := v.state.Frontends[t.id]
	return g.presence(row, registered, f.Floors[g.role], t.disk[g.role])
}

// Stay is one session's right to be on one backend in one epoch. Its fields do
// not change.
type Stay struct {
	User    string // canonical: what the backend gets
	Role    string
	Backend string
	Epoch   uint64
	Since   time.Time

	table   *Table
	gate    *gate
	client  client
	revoked chan struct{}
	hasLeft bool // Table.mu guards it
}

// End says how a session ended.
type End struct {
	// Proven: the backend has shown that it does nothing any more for the
	// session (design §4), or the session never reached it.
	Proven bool
	// Why there is no proof; it goes into the residue.
	Why string
}

func (t *Table) stayLocked(g *gate, user string, row Row, from client) *Stay {
	s := &Stay{User: user, Role: g.role, Backend: row.Active, Epoch: row.Epoch, Since: time.Now(),
		table: t, gate: g, client: from, revoked: make(chan struct{})}
	g.stays[s] = struct{}{}
	g.see(user)
	g.places[place{s.Backend, s.Epoch}]++
	t.inside++
	return s
}

// Revoked is closed when the session must drain and leave.
func (s *Stay) Revoked() <-chan struct{} { return s.revoked }

// Check is for just before the client is admitted: nil, or ErrRevoked.
func (s *Stay) Check() error {
	if s.table.leaseLeft() <= 0 { // heedDeadline may not have come to run yet
		return fmt.Errorf("%w: %s", ErrRevoked, leaseOver)
	}
	select {
	case <-s.revoked:
		return fmt.Errorf("%w: role %s, backend %s", ErrRevoked, s.Role, s.Backend)
	default:
		return nil
	}
}

// Leave ends the stay; only the first call counts. Without proof of the end it
// leaves a residue. It does not block.
func (s *Stay) Leave(end End) {
	t := s.table
	t.mu.Lock()
	left := t.leaveLocked(s.gate, s, end)
	t.mu.Unlock()
	if !left {
		return
	}
	t.wakeKeeper()
	if !end.Proven {
		t.emit(Event{Kind: EventResidue, Role: s.Role, User: s.User, Backend: s.Backend, Epoch: s.Epoch, Text: end.Why})
	}
}

func (t *Table) leaveLocked(g *gate, s *Stay, end End) bool {
	if s.hasLeft {
		return false
	}
	s.hasLeft = true
	delete(g.stays, s)
	at := place{s.Backend, s.Epoch}
	if g.places[at]--; g.places[at] == 0 {
		delete(g.places, at)
	}
	t.inside--
	if !end.Proven {
		g.add(Residue{Backend: s.Backend, User: s.User, Frontend: t.id, Since: time.Now(), Why: end.Why})
	}
	t.wakeParkedLocked(g, t.view.Load())
	return true
}

// wakeParkedLocked wakes a gate's parked logins if they would not park now.
func (t *Table) wakeParkedLocked(g *gate, v *view) {
	if len(g.parked) == 0 {
		return
	}
	row, ok := v.state.Roles[g.role]
	if !ok || isUnknown(row) || t.rules.admit(row, t.presenceLocked(g, v, row)) == "" {
		g.wakeAll()
	}
}

func (s *Stay) revokeLocked() bool {
	select {
	case <-s.revoked:
		return false
	default:
		close(s.revoked)
		return true
	}
}
