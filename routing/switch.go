package routing

import (
	"fmt"
	"slices"
	"time"
)

// Hook names a site's program that a switch runs in one of its phases.
type Hook string

const (
	HookDemote      Hook = "demote"
	HookCatchUp     Hook = "catch_up"
	HookPromote     Hook = "promote"
	HookUndoDemote  Hook = "undo_demote"
	HookUndoPromote Hook = "undo_promote"
)

// hookPhases are the phases between HOLD and OPEN, in order, with their hooks.
var hookPhases = []struct {
	phase    Phase
	do, undo Hook
}{
	{PhaseDemote, HookDemote, HookUndoDemote},
	{PhaseCatchUp, HookCatchUp, ""},
	{PhasePromote, HookPromote, HookUndoPromote},
}

// hookOf returns the hooks of a phase; both empty if it has none.
func hookOf(p Phase) (do, undo Hook) {
	for _, h := range hookPhases {
		if h.phase == p {
			return h.do, h.undo
		}
	}
	return "", ""
}

// hold begins a switch: from now on nobody enters below the new epoch.
// confirmedClean clears the role's residues on the operator's word.
func (r rules) hold(s *State, role, to, who, why string, now time.Time, confirmedClean bool) error {
	row, err := s.row(role)
	if err != nil {
		return err
	}
	if confirmedClean {
		row.Residues = nil
	}
	if err := r.check(change{s: s, role: role, row: row, to: to}, holdGuards); err != nil {
		return err
	}
	s.Switches++
	row.Epoch++
	row.Phase = PhaseHold
	row.Switch = &Switch{Number: s.Switches, To: to, Who: who, Why: why, Started: now,
		Steps: []Step{{PhaseHold, now}}}
	s.Roles[role] = row
	return nil
}

// ack raises a frontend's floor: nobody is inside it below epoch, and never
// will be. What may still run of the stays that ended comes with it.
func (r rules) ack(s *State, id, role string, epoch uint64, residues []Residue) error {
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
	f.Floors[role] = epoch
	s.Frontends[id] = f
	row.Residues = mergeResidues(row.Residues, residues)
	s.Roles[role] = row
	return nil
}

// takeUp counts one more driver of the switch with this number. Hooks get the
// count, so that an orphan of an earlier driver does no harm.
func (r rules) takeUp(s *State, role string, number uint64) error {
	row, err := s.row(role)
	if err != nil {
		return err
	}
	if row.Switch == nil || row.Switch.Number != number {
		return fmt.Errorf("%w: switch %d of %s has ended", ErrConflict, number, role)
	}
	row.Switch.Attempt++
	s.Roles[role] = row
	return nil
}

// nextPhase is where a switch goes from p; phases without a hook are skipped.
func nextPhase(p Phase, has func(Hook) bool) Phase {
	past := p == PhaseHold
	for _, h := range hookPhases {
		if past && has(h.do) {
			return h.phase
		}
		past = past || h.phase == p
	}
	return PhaseOpen
}

// advance takes the switch from phase `from` to the next one, before that
// one's hook runs. The step to PhaseOpen is open.
func (r rules) advance(s *State, role string, from Phase, now time.Time, has func(Hook) bool) error {
	row, err := s.row(role)
	if err != nil {
		return err
	}
	c := change{s: s, role: role, row: row, has: has}
	if err := r.check(c, advanceGuards); err != nil {
		return err
	}
	if row.Phase != from {
		return fmt.Errorf("%w: role %s is in phase %s, not %s any more", ErrConflict, role, row.Phase, from)
	}
	next := nextPhase(row.Phase, has)
	if next == PhaseOpen {
		return r.open(s, role, now, has)
	}
	// The old active is touched only when nobody is inside.
	if err := r.check(c, openGuards[:1]); err != nil {
		return err
	}
	row.Phase = next
	row.Switch.Begun = append(row.Switch.Begun, next)
	row.Switch.Steps = append(row.Switch.Steps, Step{next, now})
	s.Roles[role] = row
	return nil
}

// open lets everybody in to the new active, in the epoch that HOLD announced.
func (r rules) open(s *State, role string, now time.Time, has func(Hook) bool) error {
	row, err := s.row(role)
	if err != nil {
		return err
	}
	if row.Switch == nil {
		return r.check(change{s: s, role: role, row: row}, advanceGuards)
	}
	c := change{s: s, role: role, row: row, to: row.Switch.To, has: has}
	if err := r.check(c, advanceGuards); err != nil {
		return err
	}
	if next := nextPhase(row.Phase, has); next != PhaseOpen {
		return fmt.Errorf("%w: role %s goes to %s first", ErrConflict, role, next)
	}
	if err := r.check(c, openGuards); err != nil {
		return err
	}
	s.end(role, row, row.Switch.To, row.Epoch, true, now)
	return nil
}

// abort turns a switch back. It comes before anything is undone.
func (r rules) abort(s *State, role, why string, now time.Time, has func(Hook) bool) error {
	row, err := s.row(role)
	if err != nil {
		return err
	}
	switch {
	case row.Switch == nil || row.Phase == PhaseOpen:
		return fmt.Errorf("%w: role %s is open: switch it back instead", ErrConflict, role)
	case row.Phase == PhaseAbort:
		return fmt.Errorf("%w: role %s is being aborted already", ErrConflict, role)
	case row.Active == "":
		return fmt.Errorf("%w: role %s has no earlier active to go back to: settle what keeps it from %s", ErrConflict, role, row.Switch.To)
	case slices.Contains(row.Switch.Begun, PhasePromote) && !has(HookUndoPromote):
		return fmt.Errorf("%w: role %s: the promotion of %s has begun and there is no undo_promote hook: resume the switch",
			ErrConflict, role, row.Switch.To)
	}
	row.Phase = PhaseAbort
	row.Switch.AbortWhy = why
	row.Switch.Steps = append(row.Switch.Steps, Step{PhaseAbort, now})
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
	rec := SwitchRecord{Switch: *row.Switch, Role: role, From: row.Active, Epoch: epoch, Ended: now, Done: done}
	rec.Steps = append(rec.Steps, Step{PhaseOpen, now})
	s.History = append(s.History, rec)
	if n := len(s.History) - historyLimit; n > 0 {
		s.History = slices.Delete(s.History, 0, n)
	}
	row.Active, row.Epoch, row.Phase, row.Switch = active, epoch, PhaseOpen, nil
	s.Roles[role] = row
}

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
