package routing

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"time"

	"go.uber.org/zap"
)

// How often the driver asks the store which frontends have ended.
const (
	askOften  = time.Second     // while a role is held: a dead frontend's ack would be waited for
	askSeldom = 5 * time.Second // otherwise
)

// hooks are the site's programs that a switch runs. The zero value has none.
type hooks struct {
	has func(Hook) bool
	run func(ctx context.Context, h Hook, role string, row Row) error
}

func (h hooks) knows(hook Hook) bool { return hook != "" && h.has != nil && h.has(hook) }

// driving is what a driver remembers of a switch that it has taken up.
type driving struct {
	number uint64
	// since counts the budget on the driver's own monotonic clock, from when
	// it saw the hold.
	since  time.Time
	ran    Phase // the phase whose hook it has run to the end
	undone Phase // the phase whose undo hook it has run to the end
	failed string
}

// move is the driver's next step with a role.
type move int

const (
	moveWait    move = iota
	moveAdvance      // to the next phase, at last OPEN
	moveRun          // the hook of the phase
	moveAbort
	moveUndo   // run the undo hook of what was begun last
	moveUndone // write down that it is undone
	moveReopen
)

// decide says what comes next for a role that is not open, and why. isOver
// says that the budget is spent; agesOut, whether the residues in the way will
// be old enough before that.
func decide(s *State, role string, d driving, isOver, agesOut bool, has func(Hook) bool) (move, string) {
	row := s.Roles[role]
	if row.Switch == nil || row.Doubt != nil {
		return moveWait, "in doubt"
	}
	if row.Phase == PhaseAbort {
		return decideUndo(row, d, has)
	}
	missing, rest := s.missingAcks(role), residuesElsewhere(row, row.Switch.To)
	opensNext := nextPhase(row.Phase, has) == PhaseOpen
	blocked := ""
	switch {
	case d.failed != "":
		blocked = d.failed
	case len(missing) > 0:
		blocked = "no ack from frontend " + strings.Join(missing, ", ")
	case len(rest) > 0 && opensNext:
		blocked = "residue: " + residueText(role, rest)
	}
	canAbort := row.Active != "" && (!row.Switch.begun(PhasePromote) || has(HookUndoPromote))
	hook, _ := hookOf(row.Phase)
	switch {
	case canAbort && d.failed != "":
		return moveAbort, blocked
	case canAbort && isOver:
		if blocked == "" {
			blocked = "phase " + string(row.Phase) + " took too long"
		}
		return moveAbort, blocked
	case hook != "" && has(hook) && d.ran != row.Phase:
		return moveRun, string(hook)
	case blocked == "" || row.Phase != PhaseHold && !opensNext:
		return moveAdvance, ""
	case canAbort && len(missing) == 0 && !agesOut:
		return moveAbort, blocked // waiting would only keep the logins parked
	}
	return moveWait, blocked
}

func decideUndo(row Row, d driving, has func(Hook) bool) (move, string) {
	if len(row.Switch.Begun) == 0 {
		return moveReopen, ""
	}
	last := row.Switch.Begun[len(row.Switch.Begun)-1]
	if _, undo := hookOf(last); undo != "" && has(undo) && d.undone != last {
		return moveUndo, string(undo)
	}
	return moveUndone, string(last)
}

func (sw *Switch) begun(p Phase) bool {
	for _, b := range sw.Begun {
		if b == p {
			return true
		}
	}
	return false
}

// driver drives all switches while this process is the one that does.
type driver struct {
	t      *Table
	roles  map[string]*driving
	seen   map[string]time.Time // residues, by when this process saw them first
	nextGC time.Time            // when to ask for gone frontends again
}

// drive campaigns, and drives when elected, until ctx ends. Losing the
// election unnoticed does no harm: every step is a compare-and-swap.
func (t *Table) drive(ctx context.Context) {
	for ctx.Err() == nil {
		office, resign, err := t.opt.Store.Campaign(ctx)
		if err != nil {
			if ctx.Err() == nil {
				t.log.Error("campaigning to drive switches", zap.Error(err))
				pause(ctx, retryAfter)
			}
			continue
		}
		d := &driver{t: t, roles: make(map[string]*driving), seen: make(map[string]time.Time)}
		driving, stop := context.WithCancel(ctx)
		stopWithOffice := context.AfterFunc(office, stop)
		d.run(driving)
		stopWithOffice()
		stop()
		resign()
	}
}

func (d *driver) run(ctx context.Context) {
	for ctx.Err() == nil {
		changed := d.t.Changed()
		progressed, err := d.step(ctx)
		if err != nil && ctx.Err() == nil {
			d.t.log.Error("driving switches; trying again", zap.Error(err))
			pause(ctx, retryAfter)
			continue
		}
		if progressed {
			continue
		}
		timer := time.NewTimer(d.patience())
		select {
		case <-ctx.Done():
		case <-changed:
		case <-timer.C:
		}
		timer.Stop()
	}
}

// step does what is due now. progressed says that there may be more.
func (d *driver) step(ctx context.Context) (progressed bool, err error) {
	if err := d.bury(ctx); err != nil {
		return false, err
	}
	if err := d.ageOut(ctx); err != nil {
		return false, err
	}
	s := d.t.Snapshot()
	for role := range d.roles {
		if sw := s.Roles[role].Switch; sw == nil || sw.Number != d.roles[role].number {
			delete(d.roles, role)
		}
	}
	var errs []error
	for _, role := range sortedKeys(s.Roles) {
		row := s.Roles[role]
		if row.Switch == nil || row.Doubt != nil {
			continue
		}
		p, err := d.stepRole(ctx, s, role, row)
		progressed = progressed || p
		errs = append(errs, err)
	}
	return progressed, errors.Join(errs...)
}

func (d *driver) stepRole(ctx context.Context, s *State, role string, row Row) (bool, error) {
	t := d.t
	mine := d.roles[role]
	if mine == nil {
		mine = &driving{number: row.Switch.Number, since: time.Now()}
		d.roles[role] = mine
		return d.commit(ctx, role, "taking up the switch", func(s *State) error { return t.rules.takeUp(s, role, mine.number) })
	}
	now := time.Now()
	left := t.opt.SwitchBudget - now.Sub(mine.since)
	do, why := decide(s, role, *mine, left <= 0, d.ageOutWithin(role, row, left), t.hooks.knows)
	switch do {
	case moveAdvance:
		return d.commit(ctx, role, "the next phase", func(s *State) error { return t.rules.advance(s, role, row.Phase, now, t.hooks.knows) })
	case moveAbort:
		return d.commit(ctx, role, "aborting", func(s *State) error {
			mine.failed = ""
			return t.rules.abort(s, role, why, now, t.hooks.knows)
		})
	case moveUndone:
		return d.commit(ctx, role, "undoing", func(s *State) error { return t.rules.undone(s, role, Phase(why)) })
	case moveReopen:
		return d.commit(ctx, role, "reopening", func(s *State) error { return t.rules.reopen(s, role, now) })
	case moveRun, moveUndo:
		return d.runHook(ctx, do, Hook(why), role, row, mine, left)
	}
	return false, nil
}

// runHook runs a hook that the row announces already.
func (d *driver) runHook(ctx context.Context, do move, hook Hook, role string, row Row, mine *driving, left time.Duration) (bool, error) {
	if do == moveUndo {
		left = d.t.opt.SwitchBudget // an undo must be given its time
	}
	ctx, cancel := context.WithTimeout(ctx, left)
	defer cancel()
	err := d.t.hooks.run(ctx, hook, role, row)
	switch {
	case err != nil && do == moveUndo:
		return false, fmt.Errorf("role %s stays held: hook %s: %w", role, hook, err)
	case err != nil && row.Phase == PhasePromote && !d.t.hooks.knows(HookUndoPromote):
		return false, fmt.Errorf("role %s stays held, there is no way back: hook %s: %w", role, hook, err)
	case err != nil:
		mine.failed = fmt.Sprintf("hook %s failed: %v", hook, err)
	case do == moveUndo:
		mine.undone = row.Switch.Begun[len(row.Switch.Begun)-1]
	default:
		mine.ran = row.Phase
	}
	return true, nil
}

// commit writes one step. A refusal means that the snapshot is behind: the
// next one tells more.
func (d *driver) commit(ctx context.Context, role, what string, change func(*State) error) (bool, error) {
	s, err := d.t.opt.Store.Update(ctx, change)
	switch {
	case errors.Is(err, ErrConflict), errors.Is(err, errNothing):
		d.t.log.Debug("driving "+role+": "+what, zap.Error(err))
		return false, nil
	case err != nil:
		return false, fmt.Errorf("role %s: %s: %w", role, what, err)
	}
	d.t.install(s, false)
	return true, nil
}

// bury ends the registrations of frontends that are proven to have ended.
func (d *driver) bury(ctx context.Context) error {
	now := time.Now()
	if now.Before(d.nextGC) {
		return nil
	}
	d.nextGC = now.Add(d.askEvery())
	t, own := d.t, d.t.ID()
	var others []string
	for _, id := range sortedKeys(t.Snapshot().Frontends) {
		if id != own {
			others = append(others, id)
		}
	}
	if len(others) == 0 {
		return nil
	}
	gone, err := t.opt.Store.Gone(ctx, others)
	if err != nil {
		return fmt.Errorf("asking which frontends have ended: %w", err)
	}
	for _, id := range gone {
		did, err := d.commit(ctx, id, "burying", func(s *State) error { return t.rules.bury(s, id, now) })
		if err != nil {
			return err
		}
		if did {
			t.emit(Event{Kind: EventBuried, Frontend: id})
		}
	}
	return nil
}

func (d *driver) askEvery() time.Duration {
	for _, row := range d.t.Snapshot().Roles {
		if row.Switch != nil {
			return askOften
		}
	}
	return askSeldom
}

// patience is how long the driver may sleep if nothing changes.
func (d *driver) patience() time.Duration {
	wait := min(d.askEvery(), time.Until(d.nextGC))
	for _, mine := range d.roles {
		if left := d.t.opt.SwitchBudget - time.Since(mine.since); left > 0 {
			wait = min(wait, left)
		}
	}
	return max(wait, time.Millisecond)
}

func residueID(role string, r Residue) string {
	return role + "\x00" + r.Backend + "\x00" + r.User + "\x00" + r.Since.UTC().Format(time.RFC3339Nano)
}

// age counts from the later of when the residue began and when this process
// saw it first: a wrong clock elsewhere makes it older only in its own eyes.
func (d *driver) age(role string, r Residue, now time.Time) time.Duration {
	id := residueID(role, r)
	first, ok := d.seen[id]
	if !ok {
		first = now
		d.seen[id] = now
	}
	return min(now.Sub(first), now.Sub(r.Since))
}

// ageOut clears residues that are old enough, in all roles.
func (d *driver) ageOut(ctx context.Context) error {
	limit := d.t.opt.ResidueMaxAge
	now := time.Now()
	present, aged := make(map[string]bool), false
	for role, row := range d.t.Snapshot().Roles {
		for _, r := range row.Residues {
			present[residueID(role, r)] = true
			aged = d.age(role, r, now) >= limit && limit > 0 || aged
		}
	}
	for id := range d.seen {
		if !present[id] {
			delete(d.seen, id)
		}
	}
	if !aged {
		return nil
	}
	_, err := d.commit(ctx, "residues", "ageing out", func(s *State) error {
		return d.t.rules.ageOut(s, func(role string, r Residue) bool {
			_, known := d.seen[residueID(role, r)]
			return known && d.age(role, r, now) >= limit
		})
	})
	return err
}

// ageOutWithin says whether all residues in the way will be old enough in time.
func (d *driver) ageOutWithin(role string, row Row, left time.Duration) bool {
	limit := d.t.opt.ResidueMaxAge
	for _, r := range residuesElsewhere(row, row.Switch.To) {
		if limit <= 0 || limit-d.age(role, r, time.Now()) >= left {
			return false
		}
	}
	return true
}
