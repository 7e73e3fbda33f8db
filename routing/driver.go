package routing

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"time"

	"go.uber.org/zap"
)

// driving is what a driver remembers of a switch that it has taken up.
type driving struct {
	number uint64
	roles  []string
	// isMine: this driver had it in hand; who has it now otherwise came later.
	isMine bool
	// since counts the budget on the driver's own monotonic clock.
	since  time.Time
	ran    Phase // the phase whose hook it has run to the end
	undone Phase // the phase whose undo hook it has run to the end
	proved bool  // the prove hook has run to the end
	failed string

	// A hook at work: which, in which phase of the row, and how to end it.
	hook   Hook
	in     Phase
	cancel context.CancelFunc
	// A hook that is to be tried again: not before, and since when.
	notBefore, retrying time.Time
}

// move is the driver's next step with a switch.
type move int

const (
	moveWait    move = iota
	moveAdvance      // to the next phase, at last OPEN
	moveRun          // a hook on the way forward
	moveAbort
	moveUndo   // run the undo hook of what was begun last
	moveUndone // write down that it is undone
	moveReopen
)

// decide says what comes next for roles that are switched together, and why.
// isOver says that the budget is spent; agesOut, whether the residues in the way
// will be old enough before that.
func decide(s *State, d driving, isOver, agesOut bool) (move, string) {
	row := s.Roles[d.roles[0]]
	for _, role := range d.roles {
		if s.Roles[role].Doubt != nil {
			return moveWait, "role " + role + " is in doubt"
		}
	}
	if row.Switch.Stuck != "" {
		return moveWait, row.Switch.Stuck
	}
	if row.Phase == PhaseAbort {
		return decideUndo(row, d)
	}
	missing, rest := obstacles(s, d.roles)
	next := row.Switch.next(row.Phase)
	needsProof := next != PhaseDemote // which may be what gives it
	blocked := ""
	switch {
	case d.failed != "":
		blocked = d.failed
	case len(missing) > 0:
		blocked = "no ack from frontend " + strings.Join(missing, ", ")
	case rest != "" && needsProof:
		blocked = "residue: " + rest
	}
	canAbort := row.canAbort() == ""
	hook, _ := row.Switch.hooks(row.Phase)
	switch {
	case canAbort && d.failed != "":
		return moveAbort, blocked
	case canAbort && isOver:
		if blocked == "" {
			blocked = "phase " + string(row.Phase) + " took too long"
		}
		return moveAbort, blocked
	case rest != "" && len(missing) == 0 && row.Phase == PhaseHold && row.Active != "" && row.Switch.has(HookProve) && !d.proved:
		return moveRun, string(HookProve)
	case row.Switch.has(hook) && d.ran != row.Phase:
		return moveRun, string(hook)
	case blocked == "":
		return moveAdvance, ""
	case canAbort && len(missing) == 0 && !agesOut:
		return moveAbort, blocked // waiting would only keep the logins parked
	}
	return moveWait, blocked
}

// obstacles are what keeps roles from opening on another backend: the frontends
// whose ack is missing, and in words the residues.
func obstacles(s *State, roles []string) (missing []string, rest string) {
	var texts []string
	for _, role := range roles {
		row := s.Roles[role]
		missing = append(missing, s.missingAcks(role)...)
		if residues := residuesElsewhere(row, row.Switch.To); len(residues) > 0 {
			texts = append(texts, residueText(role, residues))
		}
	}
	slices.Sort(missing)
	return slices.Compact(missing), strings.Join(texts, "; ")
}

func decideUndo(row Row, d driving) (move, string) {
	if len(row.Switch.Begun) == 0 {
		return moveReopen, ""
	}
	last := row.Switch.Begun[len(row.Switch.Begun)-1]
	if _, undo := row.Switch.hooks(last); row.Switch.has(undo) && d.undone != last {
		return moveUndo, string(undo)
	}
	return moveUndone, string(last)
}

// driver drives all switches while this process is the one that does.
type driver struct {
	t        *Table
	token    string // of this term of office
	switches map[uint64]*driving
	requests map[uint64]*asking
	seen     map[string]time.Time // residues, by when this process saw them first

	running     sync.WaitGroup
	ended       chan hookEnd // of hooks, one for each at work
	comparisons chan compareEnd
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
		driving, stop := context.WithCancel(ctx)
		stopWithOffice := context.AfterFunc(office, stop)
		newDriver(t).run(driving)
		if ctx.Err() == nil {
			t.log.Warn("this frontend does not drive switches any more: the store has not renewed its office")
		}
		stopWithOffice()
		stop()
		resign()
	}
}

func newDriver(t *Table) *driver {
	return &driver{t: t, token: rand.Text(), switches: make(map[uint64]*driving), requests: make(map[uint64]*asking), seen: make(map[string]time.Time),
		ended: make(chan hookEnd), comparisons: make(chan compareEnd)}
}

// errDeposed: another driver has taken a switch out of this one's hands. Whoever of
// them is in office will be elected again, and take it up anew.
var errDeposed = errors.New("another frontend drives, too")

// run drives until ctx ends, or another drives; no hook of its own runs any more
// then.
func (d *driver) run(office context.Context) {
	defer d.running.Wait()
	ctx, stop := context.WithCancel(office)
	defer stop()
	for ctx.Err() == nil {
		changed := d.t.Changed()
		progressed, err := d.step(ctx)
		if errors.Is(err, errDeposed) {
			d.t.log.Warn("driving switches: standing for election again", zap.Error(err))
			stop()                    // the other one's hook comes next
			pause(office, retryAfter) // who is not in office stands behind
			return
		}
		if progressed && err == nil {
			continue
		}
		patience := d.patience()
		if err != nil && ctx.Err() == nil {
			d.t.log.Error("driving switches; trying again", zap.Error(err))
			patience = retryAfter
		}
		timer := time.NewTimer(patience)
		select {
		case <-ctx.Done():
		case <-changed:
		case end := <-d.ended:
			d.hookEnded(ctx, end)
		case end := <-d.comparisons:
			d.comparisonEnded(ctx, end)
		case <-timer.C:
		}
		timer.Stop()
	}
}

// step does what is due now. progressed says that there may be more.
func (d *driver) step(ctx context.Context) (progressed bool, err error) {
	if err := d.ageOut(ctx); err != nil {
		return false, err
	}
	s := d.t.Snapshot()
	d.forget(s)
	var errs []error
	for _, role := range s.inMotion() {
		row := s.Roles[role]
		if row.Request != nil && row.Request.Roles[0] == role && row.Doubt == nil {
			p, err := d.stepRequest(ctx, s, role, row)
			progressed = progressed || p
			errs = append(errs, err)
			continue
		}
		roles := s.together(role)
		if row.Switch == nil || len(roles) == 0 || roles[0] != role {
			continue
		}
		p, err := d.stepSwitch(ctx, s, roles, row)
		progressed = progressed || p
		errs = append(errs, err)
	}
	return progressed, errors.Join(errs...)
}

// forget drops the switches that have ended.
func (d *driver) forget(s *State) {
	open := make(map[uint64]bool)
	for _, row := range s.Roles {
		if row.Switch != nil {
			open[row.Switch.Number] = true
		}
		if row.Request != nil {
			open[row.Request.Number] = true
		}
	}
	d.forgetRequests(open)
	for number, mine := range d.switches {
		if open[number] {
			continue
		}
		if mine.hook != "" {
			mine.cancel() // hookEnded forgets it: nothing else runs for its roles before
			continue
		}
		delete(d.switches, number)
	}
}

// isBusy says whether a hook of another switch still runs for one of the roles:
// a failover has taken over.
func (d *driver) isBusy(number uint64, roles []string) bool {
	for other, theirs := range d.switches {
		if other != number && theirs.hook != "" && slices.ContainsFunc(roles, func(role string) bool { return slices.Contains(theirs.roles, role) }) {
			return true
		}
	}
	return false
}

// stepSwitch does the next step of one switch. row is that of its first role.
func (d *driver) stepSwitch(ctx context.Context, s *State, roles []string, row Row) (bool, error) {
	t, now := d.t, time.Now()
	mine := d.switches[row.Switch.Number]
	if mine == nil {
		mine = &driving{number: row.Switch.Number, since: now}
		if row.Switch.Driver != "" && row.Switch.Driver != d.token { // another's time counts too, by the clocks of two machines
			mine.since = now.Add(-min(max(now.Sub(row.Switch.Started), 0), t.opt.SwitchBudget))
		}
		d.switches[mine.number] = mine
	}
	mine.roles = roles
	switch {
	case row.Switch.Driver == d.token:
		mine.isMine = true
	case mine.isMine:
		return false, errDeposed
	default:
		return d.commit(ctx, roles, "taking up the switch", func(s *State, role string) error { return t.rules.takeUp(s, role, mine.number, d.token) })
	}
	if d.isBusy(mine.number, roles) {
		return false, nil
	}
	if mine.hook != "" {
		undoes := row.Switch.undoes(mine.hook)
		if row.Phase != mine.in || undoes != "" && !row.Switch.begun(undoes) {
			mine.cancel() // the switch was aborted under it, or what it undoes was given up
		}
		return false, nil
	}
	left := d.left(mine, row, now)
	do, why := decide(s, *mine, left <= 0, d.agesOut(s, mine, left))
	switch do {
	case moveAdvance:
		return d.commitStep(ctx, mine, "the next phase", func(s *State, role string) error { return t.rules.advance(s, role, row.Phase, now) })
	case moveAbort:
		mine.failed = ""
		return d.commitStep(ctx, mine, "aborting", func(s *State, role string) error { return t.rules.abort(s, role, why, now) })
	case moveUndone:
		return d.commitStep(ctx, mine, "undoing", func(s *State, role string) error { return t.rules.undone(s, role, Phase(why)) })
	case moveReopen:
		return d.commitStep(ctx, mine, "reopening", func(s *State, role string) error { return t.rules.reopen(s, role, now) })
	case moveRun, moveUndo:
		d.runHook(ctx, s, Hook(why), row, mine, left)
	}
	return false, nil
}

// left is what is left of the budget for going forward: what was begun has to
// be undone within it, or what cannot be undone be done.
func (d *driver) left(mine *driving, row Row, now time.Time) time.Duration {
	left := d.t.opt.SwitchBudget - now.Sub(mine.since)
	if sw := row.Switch; sw.has(HookUndoDemote) || sw.has(HookUndoPromote) || sw.has(HookPromote) {
		left -= d.t.opt.UndoReserve
	}
	return left
}

// commitStep is commit for one switch, as long as it is in the hands of this
// driver: a step that was long on its way may find another switch in the same
// phase, or another driver's hook at work.
func (d *driver) commitStep(ctx context.Context, mine *driving, what string, rule func(s *State, role string) error) (bool, error) {
	return d.commit(ctx, mine.roles, what, d.own(mine, rule))
}

// own is the rule for a switch that is in the hands of this driver, and refuses for
// others.
func (d *driver) own(mine *driving, rule func(s *State, role string) error) func(s *State, role string) error {
	return func(s *State, role string) error {
		row, err := s.inSwitch(role, mine.number)
		if err != nil {
			return err
		}
		if row.Switch.Driver != d.token {
			return fmt.Errorf("%w: another driver has taken switch %d of %s up", ErrConflict, mine.number, role)
		}
		return rule(s, role)
	}
}

// commit writes one step for all the roles. A refusal means that the snapshot is
// behind: the next one tells more.
func (d *driver) commit(ctx context.Context, roles []string, what string, rule func(s *State, role string) error) (bool, error) {
	return d.commitAll(ctx, listed(roles)+": "+what, func(s *State) error {
		return each(roles, func(role string) error { return rule(s, role) })
	})
}

func (d *driver) commitAll(ctx context.Context, what string, change func(*State) error) (bool, error) {
	_, err := d.t.update(ctx, change)
	switch {
	case errors.Is(err, ErrConflict), errors.Is(err, errNothing):
		d.t.log.Debug("driving: "+what, zap.Error(err))
		return false, nil
	case err != nil:
		return false, fmt.Errorf("%s: %w", what, err)
	}
	return true, nil
}

// patience is how long the driver may sleep if nothing changes.
func (d *driver) patience() time.Duration {
	now, s := time.Now(), d.t.Snapshot()
	wait := d.t.askEvery()
	for _, mine := range d.switches {
		if len(mine.roles) == 0 || s.Roles[mine.roles[0]].Switch == nil {
			continue
		}
		if left := d.left(mine, s.Roles[mine.roles[0]], now); left > 0 {
			wait = min(wait, left)
		}
		if again := mine.notBefore.Sub(now); again > 0 {
			wait = min(wait, again)
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
	_, err := d.commitAll(ctx, "ageing residues out", func(s *State) error {
		return d.t.rules.ageOut(s, func(role string, r Residue) bool {
			_, known := d.seen[residueID(role, r)]
			return known && d.age(role, r, now) >= limit
		})
	})
	return err
}

// agesOut says whether all residues in the way will be old enough in time.
func (d *driver) agesOut(s *State, mine *driving, left time.Duration) bool {
	limit := d.t.opt.ResidueMaxAge
	for _, role := range mine.roles {
		row := s.Roles[role]
		for _, r := range residuesElsewhere(row, row.Switch.To) {
			if limit <= 0 || limit-d.age(role, r, time.Now()) >= left {
				return false
			}
		}
	}
	return true
}
