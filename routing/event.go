package routing

import (
	"context"
	"time"

	"go.uber.org/zap"
)

// EventKind says what happened.
type EventKind string

const (
	EventCompared     EventKind = "compared"     // a comparison before HOLD has begun, or ended; Text says which
	EventHeld         EventKind = "held"         // a role stops admitting
	EventParked       EventKind = "parked"       // a login waits
	EventRevoked      EventKind = "revoked"      // a stay must end
	EventResidue      EventKind = "residue"      // a stay ended without proof
	EventAcked        EventKind = "acked"        // a frontend has nobody inside below the epoch
	EventPhase        EventKind = "phase"        // a hook phase was entered
	EventHook         EventKind = "hook"         // a hook has ended; Text says how
	EventStuck        EventKind = "stuck"        // a switch waits for the operator
	EventOpened       EventKind = "opened"       // the new active serves
	EventAborted      EventKind = "aborted"      // the old active serves again
	EventDoubt        EventKind = "doubt"        // the store went back
	EventDisagreement EventKind = "disagreement" // the directory names another role than before
	EventBuried       EventKind = "buried"       // a frontend ended without a goodbye
	EventLost         EventKind = "lost"         // this frontend's registration is gone
)

// Event is something an operator may want to see as it happens. Which fields
// are set depends on the kind.
type Event struct {
	At       time.Time `json:"at"`
	Kind     EventKind `json:"kind"`
	Role     string    `json:"role,omitempty"`
	Backend  string    `json:"backend,omitempty"`
	To       string    `json:"to,omitempty"`
	User     string    `json:"user,omitempty"`
	Frontend string    `json:"frontend,omitempty"`
	Epoch    uint64    `json:"epoch,omitempty"`
	Number   uint64    `json:"number,omitempty"` // of the switch
	Text     string    `json:"text,omitempty"`
	// Steps are the phases of a switch that has ended: with the role that was
	// asked for, of those that were switched together.
	Steps []Step `json:"steps,omitempty"`
}

// emit queues an event: announce logs it and passes it on.
func (t *Table) emit(e Event) {
	t.mu.Lock()
	t.emitLocked(e)
	t.mu.Unlock()
	t.wakeAnnouncer()
}

func (t *Table) emitLocked(e Event) {
	e.At = time.Now()
	t.events = append(t.events, e)
}

func (t *Table) wakeAnnouncer() {
	select {
	case t.news <- struct{}{}:
	default:
	}
}

// announce tells the log and OnEvent what happens, in order, until ctx ends.
func (t *Table) announce(ctx context.Context) {
	for {
		select {
		case <-ctx.Done():
			return
		case <-t.news:
			t.tellAll()
		}
	}
}

func (t *Table) tellAll() {
	t.mu.Lock()
	events := t.events
	t.events = nil
	t.mu.Unlock()
	for _, e := range events {
		t.logEvent(e)
		if t.opt.OnEvent != nil {
			t.opt.OnEvent(e)
		}
	}
}

func (t *Table) logEvent(e Event) {
	fields := []zap.Field{zap.String("role", e.Role), zap.Uint64("epoch", e.Epoch), zap.Uint64("switch", e.Number),
		zap.String("backend", e.Backend), zap.String("to", e.To), zap.String("user", e.User), zap.String("frontend", e.Frontend),
		zap.String("text", e.Text)}
	switch e.Kind {
	case EventDoubt:
		t.log.Error("role is in doubt: the store went back; decide with `posthouse roles init`", fields...)
	case EventLost:
		t.log.Error("this frontend's registration is gone: draining everything, then registering anew", fields...)
	case EventDisagreement:
		t.log.Error("role disagreement: the directory has another role than the user was last in, which stays: correct the directory", fields...)
	case EventBuried:
		t.log.Warn("frontend ended without a goodbye: unknown work of its users may still run", fields...)
	case EventStuck:
		t.log.Error("role is held by a switch that goes neither on nor back", fields...)
	case EventCompared, EventHeld, EventPhase, EventHook, EventOpened, EventAborted:
		t.log.Info("role "+string(e.Kind), fields...)
	default:
		t.log.Debug("role "+string(e.Kind), fields...)
	}
}

// changes tells what happened to the roles between two States.
func changes(old, now *State) []Event {
	var events []Event
	for _, role := range now.inMotion() {
		events = append(events, roleChanges(role, old.Roles[role], now.Roles[role])...)
	}
	for _, id := range sortedKeys(now.Frontends) {
		o, known := old.Frontends[id]
		floors := now.Frontends[id].Floors
		for _, role := range sortedKeys(floors) {
			if known && floors[role] > o.Floors[role] {
				events = append(events, Event{Kind: EventAcked, Role: role, Frontend: id, Epoch: floors[role]})
			}
		}
	}
	for _, rec := range now.History {
		row := old.Roles[rec.Role]
		if row.Switch != nil && row.Switch.Number == rec.Number {
			row.Switch, row.Epoch = &rec.Switch, rec.Epochs[rec.Role]
			events = append(events, hookChanges(rec.Role, old.Roles[rec.Role].Switch, row)...)
		}
		events = append(events, endOf(rec, old.History)...)
	}
	return events
}

// endOf tells of the roles for which a switch has ended since before.
func endOf(rec SwitchRecord, before []SwitchRecord) []Event {
	told := make(map[string]bool)
	for _, was := range before { // not the last ones: of two switches the later one may end first
		if was.Number == rec.Number {
			for role := range was.Epochs {
				told[role] = true
			}
		}
	}
	var events []Event
	for _, role := range sortedKeys(rec.Epochs) {
		if told[role] {
			continue
		}
		e := Event{Kind: EventOpened, Role: role, Backend: rec.To, To: rec.To, Epoch: rec.Epochs[role], Number: rec.Number, Text: rec.AbortWhy}
		if !rec.Done {
			e.Kind, e.Backend = EventAborted, rec.From
		}
		if role == rec.Role {
			e.Steps = rec.Steps
		}
		events = append(events, e)
	}
	return events
}

// hookChanges tells of hooks that have ended within one switch, once for all its
// roles.
func hookChanges(role string, was *Switch, is Row) []Event {
	sw := is.Switch
	if len(sw.Roles) > 0 && sw.Roles[0] != role {
		return nil
	}
	e := Event{Role: role, Backend: is.Active, To: sw.To, Epoch: is.Epoch, Number: sw.Number}
	var events []Event
	for _, run := range sw.Runs {
		if len(was.Runs) == 0 || run.Began.After(was.Runs[len(was.Runs)-1].Began) {
			e.Kind, e.Text = EventHook, run.String()
			events = append(events, e)
		}
	}
	if sw.Stuck != "" && was.Stuck == "" {
		e.Kind, e.Text = EventStuck, sw.Stuck
		events = append(events, e)
	}
	return events
}

// comparisonChange tells of a comparison before HOLD, once for all its roles.
func comparisonChange(role string, was *Request, is Row) (Event, bool) {
	q := is.Request
	if q == nil || q.Comparison == nil || q.Roles[0] != role {
		return Event{}, false
	}
	text := "begins"
	if q.Comparison.Found != "" {
		text = q.Comparison.Found
	}
	if was != nil && was.Comparison != nil && was.Comparison.Found == q.Comparison.Found {
		return Event{}, false
	}
	return Event{Kind: EventCompared, Role: role, Backend: is.Active, To: q.To, Epoch: is.Epoch, Number: q.Number, Text: text}, true
}

func roleChanges(role string, was, is Row) []Event {
	var events []Event
	if is.Doubt != nil && was.Doubt == nil {
		events = append(events, Event{Kind: EventDoubt, Role: role, Epoch: is.Doubt.Known, Text: is.Doubt.Why})
	}
	if e, ok := comparisonChange(role, was.Request, is); ok {
		events = append(events, e)
	}
	if is.Switch != nil && was.Switch != nil && was.Switch.Number == is.Switch.Number {
		events = append(events, hookChanges(role, was.Switch, is)...)
	}
	if is.Switch == nil || was.Switch != nil && was.Switch.Number == is.Switch.Number && was.Phase == is.Phase {
		return events
	}
	e := Event{Role: role, Backend: is.Active, To: is.Switch.To, Epoch: is.Epoch, Number: is.Switch.Number}
	if was.Switch == nil || was.Switch.Number != is.Switch.Number {
		e.Kind, e.Text = EventHeld, is.Switch.Why
		events = append(events, e)
	}
	if is.Phase != PhaseHold {
		e.Kind, e.Text = EventPhase, string(is.Phase)
		events = append(events, e)
	}
	return events
}
