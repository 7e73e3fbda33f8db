package routing

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	"go.uber.org/zap"
)

// retryAfter is how long keep and drive wait after the store or the disk
// failed them.
const retryAfter = time.Second

// view is an immutable snapshot of the role table.
type view struct {
	state   *State
	doubts  map[string]string // roles to be marked in the store, and why
	actives []string          // backends that serve some role, sorted
	losses  int               // how often the store has gone back so far
	changed chan struct{}     // closed when next is there
	next    *view
}

func newView(s *State, doubts map[string]string, losses int) *view {
	actives := make(map[string]struct{})
	for _, row := range s.Roles {
		if row.Active != "" {
			actives[row.Active] = struct{}{}
		}
	}
	return &view{state: s, doubts: doubts, actives: slices.Sorted(maps.Keys(actives)), losses: losses, changed: make(chan struct{})}
}

// Snapshot returns the role table as this frontend goes by it. Nobody may
// edit it.
func (t *Table) Snapshot() *State { return t.view.Load().state }

// Changed is closed when the present Snapshot is not the newest any more. Take
// it before the Snapshot.
func (t *Table) Changed() <-chan struct{} { return t.view.Load().changed }

// follow installs what the store says has changed, until ctx ends.
func (t *Table) follow(ctx context.Context) {
	for s := range t.opt.Store.Watch(ctx) {
		if s.Revision >= t.Snapshot().Revision {
			t.install(s, t.view.Load(), false)
			continue
		}
		// Either the answer to an Update of ours has overtaken the watch, or
		// the store went back: only a read that begins now can tell.
		before := t.view.Load()
		s, err := t.load(ctx)
		if err != nil {
			return
		}
		t.install(s, before, s.Revision < before.state.Revision)
	}
}

// load reads the store, as often as it takes; it fails only with ctx.
func (t *Table) load(ctx context.Context) (*State, error) {
	for {
		s, err := t.opt.Store.Load(ctx)
		if err == nil {
			return s, nil
		}
		t.log.Error("reading the role table", zap.Error(err))
		if !pause(ctx, retryAfter) {
			return nil, ctx.Err()
		}
	}
}

// pause waits; false if ctx ended first.
func pause(ctx context.Context, d time.Duration) bool {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-ctx.Done():
		return false
	case <-timer.C:
		return true
	}
}

// update is Store.Update, and makes the answer the snapshot.
func (t *Table) update(ctx context.Context, change func(*State) error) (*State, error) {
	before := t.view.Load()
	s, err := t.opt.Store.Update(ctx, change)
	if err == nil {
		t.install(s, before, false)
	}
	return s, err
}

// install makes a State of the store the snapshot, revokes the stays that must
// end, and wakes the logins that may enter. before is the view at some time before
// the store was asked for it. A State that is not newer is ignored unless wentBack;
// so is one of before the store went back, and of after that the watch brings all.
func (t *Table) install(fresh *State, before *view, wentBack bool) {
	t.mu.Lock()
	old := t.view.Load()
	if fresh.Revision <= old.state.Revision && !wentBack || before.losses != old.losses {
		t.mu.Unlock()
		return
	}
	losses := old.losses
	if wentBack {
		losses++
	}
	state, doubts := merge(old.state, fresh)
	next := newView(state, doubts, losses)
	t.view.Store(next)
	old.next = next
	events := changes(old.state, next.state)
	_, was := old.state.Frontends[t.id]
	_, is := next.state.Frontends[t.id]
	if was && !is {
		events = append(events, Event{Kind: EventLost, Frontend: t.id})
	}
	for _, g := range t.gates {
		events = append(events, t.revokeLocked(g, next.state.Roles[g.role], is)...)
		if !maps.Equal(old.state.Overrides, next.state.Overrides) {
			g.wakeAll()
		} else {
			t.wakeParkedLocked(g, next)
		}
	}
	for _, e := range events {
		t.emitLocked(e)
	}
	t.mu.Unlock()

	close(old.changed)
	t.wakeKeeper()
	t.wakeAnnouncer()
}

// revokeLocked ends the stays that the row does not carry any more; all of
// them if nobody waits for this frontend's acks.
func (t *Table) revokeLocked(g *gate, row Row, isRegistered bool) []Event {
	goes := func(at place) bool { return !isRegistered || revokes(row, at.backend, at.epoch) }
	if !slices.ContainsFunc(slices.Collect(maps.Keys(g.places)), goes) {
		return nil // the rule: no need to look at each of thousands
	}
	var events []Event
	for s := range g.stays {
		if goes(place{s.Backend, s.Epoch}) && s.revokeLocked() {
			events = append(events, Event{Kind: EventRevoked, Role: s.Role, User: s.User, Backend: s.Backend, Epoch: s.Epoch})
		}
	}
	return events
}

func (t *Table) wakeKeeper() {
	select {
	case t.poke <- struct{}{}:
	default:
	}
}

// keep does what this frontend owes to others, until ctx ends: the snapshot on
// disk, then the acks; marks of doubt; a new registration if it was lost.
func (t *Table) keep(ctx context.Context) {
	retry := time.NewTimer(retryAfter)
	defer retry.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-retry.C:
		case <-t.poke:
		}
		retry.Stop()
		later, err := t.save()
		err = errors.Join(err, t.markDoubts(ctx), t.reenrol(ctx), t.ack(ctx))
		if err != nil && ctx.Err() == nil {
			t.log.Error("keeping up with the role table; trying again", zap.Error(err))
		}
		if err != nil || later {
			retry.Reset(retryAfter)
		}
	}
}

// save puts the snapshot on the disk. Acks come after it (safety 6). One that says
// the same of who serves whom may be saved later, once in a while: a large table
// is written for what counts only.
func (t *Table) save() (later bool, err error) {
	s := t.Snapshot()
	t.mu.Lock()
	saved := sameRows(t.disk, s.Roles)
	t.mu.Unlock()
	switch {
	case saved && s.Revision == t.highest:
		return false, nil
	case saved && s.Revision > t.highest && time.Since(t.saved) < retryAfter:
		return true, nil
	}
	data, err := json.Marshal(s)
	if err != nil {
		return false, fmt.Errorf("writing down the snapshot: %w", err)
	}
	write := t.opt.Local.SaveSnapshot
	if s.Revision < t.highest {
		write = t.opt.Local.ReplaceSnapshot
	}
	if err := write(s.Revision, data); err != nil {
		return false, fmt.Errorf("saving the snapshot of revision %d: %w: no switch can open until it is on disk", s.Revision, err)
	}
	t.highest, t.saved = s.Revision, time.Now()
	t.mu.Lock()
	t.disk = s.Roles
	t.mu.Unlock()
	return false, nil
}

func sameRows(a, b map[string]Row) bool {
	return maps.EqualFunc(a, b, func(a, b Row) bool {
		return a.Epoch == b.Epoch && a.Phase == b.Phase && a.Active == b.Active && (a.Doubt == nil) == (b.Doubt == nil)
	})
}

// markDoubts tells the other frontends in which roles the store went back.
func (t *Table) markDoubts(ctx context.Context) error {
	v := t.view.Load()
	if len(v.doubts) == 0 {
		return nil
	}
	id, now := t.ID(), time.Now()
	_, err := t.update(ctx, func(s *State) error {
		marked := false
		for role, why := range v.doubts {
			// Somebody may have decided meanwhile.
			if s.Roles[role].Epoch > v.state.Roles[role].Epoch {
				continue
			}
			switch err := t.rules.markDoubt(s, role, v.state.Roles[role], id, why, now); {
			case err == nil:
				marked = true
			case !errors.Is(err, errNothing):
				return err
			}
		}
		if !marked {
			return errNothing
		}
		return nil
	})
	if err != nil && !errors.Is(err, errNothing) {
		return fmt.Errorf("marking roles as in doubt: %w", err)
	}
	return nil
}

// reenrol registers this frontend anew if its registration is gone (safety 9).
// Its stays are revoked by then; those that still drain keep its floors down,
// so that switches wait for them.
func (t *Table) reenrol(ctx context.Context) error {
	v := t.view.Load()
	t.mu.Lock()
	old, floors := t.id, make(map[string]uint64)
	_, isRegistered := v.state.Frontends[old]
	for role, g := range t.gates {
		if floor, ok := g.floor(); ok {
			floors[role] = floor
		}
	}
	t.mu.Unlock()
	if isRegistered {
		return nil
	}
	name := old
	if i := strings.LastIndexByte(old, '.'); i > 0 {
		name = old[:i]
	}
	id := t.joined[len(t.joined)-1]
	if id == old {
		id = NewID(name)
	}
	s, err := t.enrol(ctx, id, v.state, floors)
	if err != nil {
		return err
	}
	t.log.Warn("registered anew", zap.String("frontend", id), zap.String("was", old))
	t.mu.Lock()
	t.id = id
	t.mu.Unlock()
	t.install(s, v, false)
	t.mu.Lock()
	for _, g := range t.gates {
		t.wakeParkedLocked(g, t.view.Load()) // the watch may have been faster
	}
	t.mu.Unlock()
	t.wakeKeeper()
	return nil
}

// ack raises this frontend's floors where the table waits for it and nobody is
// inside below any more. What may still run goes with it.
func (t *Table) ack(ctx context.Context) error {
	var errs []error
	v := t.view.Load()
	for _, role := range v.state.inMotion() {
		row := v.state.Roles[role]
		id, hand, due := t.ackDue(v, role, row)
		if !due {
			continue
		}
		_, err := t.update(ctx, func(s *State) error { return t.rules.ack(s, id, role, row.Epoch, hand) })
		t.settle(map[string]handed{role: hand}, err)
		if err != nil && !errors.Is(err, ErrConflict) { // the switch is over; the next view says more
			errs = append(errs, fmt.Errorf("acking epoch %d of role %s: %w", row.Epoch, role, err))
		}
	}
	return errors.Join(errs...)
}

// ackDue takes out of the gate what goes with an ack, if one can go out now.
func (t *Table) ackDue(v *view, role string, row Row) (id string, hand handed, due bool) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.view.Load() != v {
		return "", handed{}, false // a poke is on its way
	}
	g := t.gateLocked(role)
	p := t.presenceLocked(g, v, row)
	if !wantsAck(row, p) || t.rules.mayAck(row, p) != "" {
		return "", handed{}, false
	}
	t.pruneLocked(g)
	return t.id, g.handOver(), true
}

// ID is this frontend's ID. It changes only if the registration is lost.
func (t *Table) ID() string {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.id
}
