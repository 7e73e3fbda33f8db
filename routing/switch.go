package routing

import (
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"
)

// Hook names a site's program that a switch runs in one of its phases.
type Hook string

const (
	HookDemote      Hook = "demote"
	HookProve       Hook = "prove" // in HOLD, if residues are in the way
	HookCatchUp     Hook = "catch_up"
	HookPromote     Hook = "promote"
	HookUndoDemote  Hook = "undo_demote"
	HookUndoPromote Hook = "undo_promote"
	HookFence       Hook = "fence"  // in a failover, in DEMOTE's place
	HookRejoin      Hook = "rejoin" // outside of switches
)

// AllHooks are the hooks that there are.
var AllHooks = []Hook{HookDemote, HookProve, HookCatchUp, HookPromote, HookUndoDemote, HookUndoPromote, HookFence, HookRejoin}

// hookPhase is a phase between HOLD and OPEN with its hooks.
type hookPhase struct {
	phase    Phase
	do, undo Hook
}

// The phases of a switchover and of a failover, in order.
var (
	switchoverPhases = []hookPhase{
		{PhaseDemote, HookDemote, HookUndoDemote},
		{PhaseCatchUp, HookCatchUp, ""},
		{PhasePromote, HookPromote, HookUndoPromote},
	}
	failoverPhases = []hookPhase{
		{PhaseDemote, HookFence, HookUndoDemote},
		{PhasePromote, HookPromote, HookUndoPromote},
	}
)

func (sw *Switch) phases() []hookPhase {
	if sw.Failover {
		return failoverPhases
	}
	return switchoverPhases
}

// hooks returns the hooks of a phase; both empty if it has none.
func (sw *Switch) hooks(p Phase) (do, undo Hook) {
	for _, h := range sw.phases() {
		if h.phase == p {
			return h.do, h.undo
		}
	}
	return "", ""
}

// undoes returns the phase that a hook undoes.
func (sw *Switch) undoes(hook Hook) Phase {
	for _, h := range sw.phases() {
		if h.undo == hook {
			return h.phase
		}
	}
	return ""
}

// has says whether the switch has a hook to run.
func (sw *Switch) has(h Hook) bool {
	return h != "" && slices.Contains(sw.Hooks, h) && (h != HookFence || !sw.AcceptLoss)
}

func (sw *Switch) begun(p Phase) bool { return slices.Contains(sw.Begun, p) }

// begin notes that a phase begins. A failover may have taken over a switch that
// was further: whatever came first, the promotion is undone before the demotion.
func (sw *Switch) begin(p Phase) {
	if sw.begun(p) {
		return
	}
	inOrder := func(p Phase) int {
		return slices.IndexFunc(switchoverPhases, func(h hookPhase) bool { return h.phase == p })
	}
	sw.Begun = append(sw.Begun, p)
	slices.SortFunc(sw.Begun, func(a, b Phase) int { return inOrder(a) - inOrder(b) })
}

// next is where the switch goes from p; phases without a hook are skipped.
func (sw *Switch) next(p Phase) Phase {
	past := p == PhaseHold
	for _, h := range sw.phases() {
		if past && sw.has(h.do) {
			return h.phase
		}
		past = past || h.phase == p
	}
	return PhaseOpen
}

// canAbort says whether the switch of this row can be turned back: "" if so,
// else why not.
func (row Row) canAbort() string {
	switch {
	case row.Active == "":
		return "there is no earlier active to go back to: settle what keeps it from " + row.Switch.To
	case row.Switch.begun(PhasePromote) && !row.Switch.has(HookUndoPromote):
		return fmt.Sprintf("the promotion of %s has begun and there is no undo_promote hook: resume the switch", row.Switch.To)
	}
	return ""
}

// order is what a switch is asked to do.
type order struct {
	number       uint64 // that a request has already; 0 for the next one
	to, who, why string
	hooks        []Hook
	scope        Scope
	driver       string // who begins it, and has it in hand; may be empty
	acceptLoss   bool   // for a failover
	acceptStale  bool   // for a failover, or a decision
	// confirmedClean is the operator's word that clears the roles' residues; for
	// a request.
	confirmedClean bool
	acceptRefusals bool // for a request
}

// hold begins a switch of all these roles: from now on nobody enters below
// their new epochs.
func (r rules) hold(s *State, roles []string, o order, now time.Time) error {
	if o.number == 0 {
		s.Switches++
		o.number = s.Switches
	}
	beside := s.beside(roles)
	for _, role := range roles {
		row, err := s.row(role)
		if err != nil {
			return err
		}
		proves := slices.Contains(o.hooks, HookProve) || slices.Contains(o.hooks, HookDemote)
		if err := r.check(change{s: s, role: role, row: row, to: o.to, number: o.number, proves: proves, touches: touchesBackend(o.hooks, o.scope)}, holdGuards); err != nil {
			return err
		}
		row.Epoch++
		row.Phase = PhaseHold
		sw := &Switch{Number: o.number, To: o.to, Who: o.who, Why: o.why, Started: now,
			Roles: slices.Clone(roles), Hooks: slices.Clone(o.hooks), Scope: o.scope, Beside: beside, Driver: o.driver}
		if o.driver != "" {
			sw.Attempt = 1
		}
		if q := row.Request; q != nil {
			sw.Steps = []Step{{PhasePreflight, q.Asked}}
			if q.Comparison != nil {
				sw.Compared = q.Comparison.Found
			}
		}
		sw.Steps = append(sw.Steps, Step{PhaseHold, now})
		row.endComparison()
		row.Request, row.Switch = nil, sw
		s.Roles[role] = row
	}
	return nil
}

// beside counts the roles that the first one's active serves besides these.
func (s *State) beside(roles []string) int {
	n := 0
	for role, row := range s.Roles {
		if active := s.Roles[roles[0]].Active; active != "" && row.Active == active && !slices.Contains(roles, role) {
			n++
		}
	}
	return n
}

// group are the roles that a switch of role takes with it: all that its backend
// serves, if a hook may restart that. The first is role.
func (r rules) group(s *State, role, to string, config RoleConfig) ([]string, error) {
	row, err := s.row(role)
	if err != nil {
		return nil, err
	}
	if !touchesBackend(config.Hooks, config.Scope) {
		return []string{role}, nil
	}
	group := []string{role}
	for _, other := range sortedKeys(s.Roles) {
		with := s.Roles[other]
		switch {
		case other == role:
		case with.Active == row.Active && !slices.Contains(with.Members, to):
			return nil, fmt.Errorf("%w: role %s: %s serves role %s too, which has no copy on %s, and the hooks may restart it: "+
				"make %s a member there, or state that the hooks touch nothing else (scope: role)", ErrConflict, role, row.Active, other, to, to)
		case with.Active == row.Active:
			group = append(group, other)
		case with.Active == to:
			return nil, fmt.Errorf("%w: role %s: %s serves role %s, and the hooks may restart it: "+
				"state that they touch nothing else (scope: role)", ErrConflict, role, to, other)
		}
	}
	return group, nil
}

// ack raises a frontend's floor: nobody is inside it below epoch, and never
// will be.
func (r rules) ack(s *State, id, role string, epoch uint64, hand handed) error {
	row, err := s.row(role)
	if err != nil {
		return err
	}
	f, ok := s.Frontends[id]
	switch {
	case !ok:
		return fmt.Errorf("%w: frontend %s is not registered", ErrConflict, id)
	case row.Phase == PhaseOpen || row.Epoch != epoch:
		return fmt.Errorf("%w: role %s is %s in epoch %d, no ack of %d is wanted", ErrConflict, role, row.Phase, row.Epoch, epoch)
	case row.Doubt != nil:
		return r.check(change{s: s, role: role, row: row}, []guard{inNoDoubt})
	}
	if f.Floors == nil {
		f.Floors = make(map[string]uint64)
	}
	f.Floors[role] = epoch
	s.Frontends[id] = f
	if row.Switch != nil {
		row.Switch.Unclean += len(hand.residues)
	}
	row.take(hand)
	s.Roles[role] = row
	return nil
}

// inSwitch looks up a role that the switch with this number has in hand.
func (s *State) inSwitch(role string, number uint64) (Row, error) {
	row, err := s.row(role)
	if err == nil && (row.Switch == nil || row.Switch.Number != number) {
		err = fmt.Errorf("%w: switch %d of %s has ended", ErrConflict, number, role)
	}
	return row, err
}

// takeUp puts the switch with this number into the hands of one more driver, and
// counts him. Hooks get the count, so that an orphan of an earlier driver does no
// harm.
func (r rules) takeUp(s *State, role string, number uint64, driver string) error {
	row, err := s.inSwitch(role, number)
	if err != nil {
		return err
	}
	row.Switch.Driver = driver
	row.Switch.Attempt++
	s.Roles[role] = row
	return nil
}

// ran records how a hook of the switch has ended. One that succeeded in
// stopping the old active, or in showing that nothing runs there, clears the
// residues there: nobody is inside any more, so that none comes again.
func (r rules) ran(s *State, role string, number uint64, run HookRun) error {
	row, err := s.inSwitch(role, number)
	if err != nil {
		return err
	}
	stops := run.Hook == HookDemote || run.Hook == HookFence
	proves := run.Hook == HookProve && row.Phase == PhaseHold || stops && row.Phase == PhaseDemote
	if run.Error == "" && proves {
		if err := r.check(change{s: s, role: role, row: row}, openGuards[:1]); err != nil {
			return err
		}
		row.Residues = slices.DeleteFunc(row.Residues, func(res Residue) bool { return res.Backend == row.Active })
	}
	row.Switch.Runs = append(row.Switch.Runs, run)
	if n := len(row.Switch.Runs) - runsKept; n > 0 {
		row.Switch.Runs = slices.Delete(row.Switch.Runs, 0, n)
	}
	s.Roles[role] = row
	return nil
}

// runsKept bounds Switch.Runs: a hook may be tried again for hours.
const runsKept = 20

// advance takes the switch from phase `from` to the next one, before that
// one's hook runs. The step to PhaseOpen is open.
func (r rules) advance(s *State, role string, from Phase, now time.Time) error {
	row, err := s.row(role)
	if err != nil {
		return err
	}
	c := change{s: s, role: role, row: row}
	if err := r.check(c, advanceGuards); err != nil {
		return err
	}
	if row.Phase != from {
		return fmt.Errorf("%w: role %s is in phase %s, not %s any more", ErrConflict, role, row.Phase, from)
	}
	next := row.Switch.next(row.Phase)
	if next == PhaseOpen {
		return r.open(s, role, now)
	}
	// The old active is touched only when nobody is inside, and the new one
	// compared with it or promoted only when the old one is done.
	c.to = row.Switch.To
	guards := openGuards
	if next == PhaseDemote {
		guards = openGuards[:1]
	}
	if err := r.check(c, guards); err != nil {
		return err
	}
	row.Phase = next
	row.Switch.begin(next)
	row.Switch.Steps = append(row.Switch.Steps, Step{next, now})
	s.Roles[role] = row
	return nil
}

// open lets everybody in to the new active, in the epoch that HOLD announced.
func (r rules) open(s *State, role string, now time.Time) error {
	row, err := s.row(role)
	if err != nil {
		return err
	}
	if row.Switch == nil {
		return r.check(change{s: s, role: role, row: row}, advanceGuards)
	}
	c := change{s: s, role: role, row: row, to: row.Switch.To}
	if err := r.check(c, advanceGuards); err != nil {
		return err
	}
	if next := row.Switch.next(row.Phase); next != PhaseOpen {
		return fmt.Errorf("%w: role %s goes to %s first", ErrConflict, role, next)
	}
	if err := r.check(c, openGuards); err != nil {
		return err
	}
	s.end(role, row, row.Switch.To, row.Epoch, true, now)
	return nil
}

// abort turns a switch back. It comes before anything is undone.
func (r rules) abort(s *State, role, why string, now time.Time) error {
	row, err := s.row(role)
	if err != nil {
		return err
	}
	switch {
	case row.Switch == nil || row.Phase == PhaseOpen:
		return fmt.Errorf("%w: role %s is open: switch it back instead", ErrConflict, role)
	case row.Phase == PhaseAbort:
		return fmt.Errorf("%w: role %s is being aborted already", ErrConflict, role)
	}
	if in := row.canAbort(); in != "" {
		return fmt.Errorf("%w: role %s: %s", ErrConflict, role, in)
	}
	row.Phase = PhaseAbort
	row.Switch.AbortWhy, row.Switch.Stuck = why, ""
	row.Switch.Steps = append(row.Switch.Steps, Step{PhaseAbort, now})
	s.Roles[role] = row
	return nil
}

// abandon turns a switch back on the operator's word that its new active, which
// has begun to be promoted, is down: nothing there needs to be undone. Nobody was
// let in, but it may be a master if it comes back, so that it is stale.
func (r rules) abandon(s *State, role, why string, now time.Time) error {
	row, err := s.row(role)
	sw := row.Switch
	switch {
	case err != nil:
		return err
	case sw == nil:
		return fmt.Errorf("%w: role %s is open: there is no switch to turn back", ErrConflict, role)
	case !sw.begun(PhasePromote):
		return fmt.Errorf("%w: role %s: nothing has begun at %s: abort without --confirmed-down", ErrConflict, role, sw.To)
	case row.Active == "":
		return fmt.Errorf("%w: role %s: %s", ErrConflict, role, row.canAbort())
	}
	sw.Begun = slices.DeleteFunc(sw.Begun, func(p Phase) bool { return p == PhasePromote })
	sw.Stuck = ""
	if row.Phase != PhaseAbort {
		row.Phase, sw.AbortWhy = PhaseAbort, why
		sw.Steps = append(sw.Steps, Step{PhaseAbort, now})
	}
	row.leaveBehind(sw.To, sw.Number, now)
	s.Roles[role] = row
	return nil
}

// leaveBehind marks a member as stale.
func (row *Row) leaveBehind(member string, number uint64, now time.Time) {
	row.Stale = maps.Clone(row.Stale)
	if row.Stale == nil {
		row.Stale = make(map[string]Stale)
	}
	row.Stale[member] = Stale{Number: number, Since: now}
}

// stick stops a switch that can neither go on nor back; resume lets whoever
// drives it try again.
func (r rules) stick(s *State, role string, number uint64, why string) error {
	row, err := s.inSwitch(role, number)
	if err != nil {
		return err
	}
	row.Switch.Stuck = why
	s.Roles[role] = row
	return nil
}

func (r rules) resume(s *State, role string) error {
	row, err := s.row(role)
	switch {
	case err != nil:
		return err
	case row.Switch == nil:
		return fmt.Errorf("%w: role %s is %s: there is no switch to resume", ErrConflict, role, row.Phase)
	case row.Switch.Stuck == "":
		return fmt.Errorf("%w: role %s: switch %d to %s goes on in phase %s by itself", ErrConflict, role, row.Switch.Number, row.Switch.To, row.Phase)
	}
	row.Switch.Stuck = ""
	s.Roles[role] = row
	return nil
}

// undone records that the phase begun last has been undone.
func (r rules) undone(s *State, role string, phase Phase) error {
	row, err := s.row(role)
	if err != nil {
		return err
	}
	if row.Phase != PhaseAbort || len(row.Switch.Begun) == 0 || row.Switch.Begun[len(row.Switch.Begun)-1] != phase {
		return fmt.Errorf("%w: role %s: %s is not what is to be undone now", ErrConflict, role, phase)
	}
	row.Switch.Begun = row.Switch.Begun[:len(row.Switch.Begun)-1]
	s.Roles[role] = row
	return nil
}

// reopen ends an abort: the old active serves on, in a new epoch, so that
// nothing of the aborted switch fits it any more.
func (r rules) reopen(s *State, role string, now time.Time) error {
	row, err := s.row(role)
	if err != nil {
		return err
	}
	if row.Phase != PhaseAbort || len(row.Switch.Begun) > 0 {
		return fmt.Errorf("%w: role %s: nothing to reopen: its phase is %s", ErrConflict, role, row.Phase)
	}
	s.end(role, row, row.Active, row.Epoch+1, false, now)
	return nil
}

// end opens a role and puts its switch into the history. Residues stay.
func (s *State) end(role string, row Row, active string, epoch uint64, done bool, now time.Time) {
	rec, from := *row.Switch, row.Active
	rec.Steps = append(rec.Steps, Step{PhaseOpen, now})
	s.record(SwitchRecord{Switch: rec, Role: role, From: from, Epochs: map[string]uint64{role: epoch}, Ended: now, Done: done})
	for _, f := range s.Frontends {
		delete(f.Floors, role) // the next epoch is above all of them
	}
	row.Active, row.Epoch, row.Phase, row.Switch = active, epoch, PhaseOpen, nil
	switch {
	case len(row.Members) > 2, done && rec.Failover, done && !slices.Contains(rec.Hooks, HookCatchUp):
		row.Seen = Seen{All: true} // nobody has looked at a third member, or at any
	case done:
		row.Seen = Seen{} // the catch-up has looked at them
	}
	if done && rec.AcceptStale {
		row.Stale = maps.Clone(row.Stale)
		delete(row.Stale, rec.To)
	}
	if done && rec.Failover && from != "" {
		row.leaveBehind(from, rec.Number, now)
		row.Residues = slices.DeleteFunc(row.Residues, func(res Residue) bool { return res.Backend == from && rec.AcceptLoss })
	}
	s.Roles[role] = row
}

// record puts a switch that has ended for one of its roles into the history:
// once for all of them.
func (s *State) record(rec SwitchRecord) {
	for n, of := range s.History {
		if of.Number != rec.Number || of.Done != rec.Done || of.AbortWhy != rec.AbortWhy {
			continue
		}
		of.Epochs = maps.Clone(of.Epochs)
		maps.Copy(of.Epochs, rec.Epochs)
		of.Unclean += rec.Unclean
		s.History[n] = of
		return
	}
	s.History = append(s.History, rec)
	if n := len(s.History) - historyLimit; n > 0 {
		s.History = slices.Delete(s.History, 0, n)
	}
}

// together are the roles that the switch of this one has in hand, in its order;
// none if there is no switch.
func (s *State) together(role string) []string {
	sw := s.Roles[role].Switch
	if sw == nil {
		return nil
	}
	if len(sw.Roles) == 0 {
		return []string{role} // written by an earlier version
	}
	return slices.DeleteFunc(slices.Clone(sw.Roles), func(other string) bool {
		with := s.Roles[other].Switch
		return with == nil || with.Number != sw.Number
	})
}

// each applies a rule to roles that are switched together: to all or to none.
func each(roles []string, rule func(role string) error) error {
	for _, role := range roles {
		if err := rule(role); err != nil {
			return err
		}
	}
	return nil
}

func listed(roles []string) string { return strings.Join(roles, ", ") }

// confirmClean clears a role's residues on the operator's word.
func (r rules) confirmClean(s *State, role string) error {
	return r.ageOut(s, func(in string, _ Residue) bool { return in == role })
}

// ageOut drops the residues that are old enough; errNothing if none is.
func (r rules) ageOut(s *State, aged func(role string, res Residue) bool) error {
	found := false
	for role, row := range s.Roles {
		n := len(row.Residues)
		row.Residues = slices.DeleteFunc(row.Residues, func(res Residue) bool { return aged(role, res) })
		if len(row.Residues) < n {
			found = true
			s.Roles[role] = row
		}
	}
	if !found {
		return errNothing
	}
	return nil
}
