package routing

import (
	"fmt"
	"maps"
	"slices"
	"time"
)

// wentBack says how the store's row is older than a snapshot's, "" if it is
// not. known is false if the store has no such row.
func wentBack(kept, fresh Row, known bool) string {
	switch {
	case !known:
		return "the store has lost the role"
	case fresh.Epoch < kept.Epoch:
		return fmt.Sprintf("the store has epoch %d, a snapshot had %d", fresh.Epoch, kept.Epoch)
	case kept.Doubt != nil && fresh.Doubt == nil && fresh.Epoch <= kept.Doubt.Known:
		return kept.Doubt.Why // not yet marked in the store
	case fresh.Epoch > kept.Epoch:
		return ""
	case kept.Phase == PhaseOpen && fresh.Phase != PhaseOpen:
		return fmt.Sprintf("epoch %d was open and the store has it in %s", kept.Epoch, fresh.Phase)
	case kept.Phase == PhaseOpen && fresh.Active != kept.Active:
		return fmt.Sprintf("epoch %d was open on %s and the store has it on %s", kept.Epoch, kept.Active, fresh.Active)
	}
	return ""
}

// merge decides what a frontend goes by when it has kept one State and reads a
// fresh one (safety 14). Roles in which the store went back keep the snapshot's
// row; doubts says which and why, so that they are marked in the store. kept
// may be nil: a frontend that knows nothing.
func merge(kept, fresh *State) (view *State, doubts map[string]string) {
	doubts = make(map[string]string)
	view = fresh
	replace := func(role string, row Row) {
		if view == fresh { // others have it too
			own := *fresh
			own.Roles = maps.Clone(fresh.Roles)
			view = &own
		}
		view.Roles[role] = row
	}
	older := kept != nil && fresh.Revision < kept.Revision
	if kept != nil {
		for role, row := range kept.Roles {
			now, known := fresh.Roles[role]
			why := wentBack(row, now, known)
			if why == "" && older && now.Epoch == row.Epoch { // above it somebody has decided since
				why = fmt.Sprintf("the store has revision %d, a snapshot had %d", fresh.Revision, kept.Revision)
			}
			if why == "" {
				continue
			}
			marked := known && now.Doubt != nil && now.Doubt.Known >= row.Epoch
			if !marked {
				doubts[role] = why
			}
			d := Doubt{Known: row.Epoch, Why: why}
			if known && now.Doubt != nil {
				d = *now.Doubt
				d.Known = max(d.Known, row.Epoch)
			}
			row = row.clone()
			row.Doubt = &d
			replace(role, row)
		}
	}
	for role, row := range view.Roles {
		if row.Doubt == nil {
			continue
		}
		if kept != nil {
			if mine, ok := kept.Roles[role]; ok && mine.Epoch >= row.Doubt.Known && mine.Active != "" {
				mine = mine.clone()
				mine.Doubt = row.Doubt
				replace(role, mine)
				continue
			}
		}
		// Somebody knows better, and we do not know what.
		row.Active, row.Phase, row.Switch = "", PhaseHold, nil
		replace(role, row)
	}
	return view, doubts
}

// floorsOf returns the roles in which a frontend that registers is, or will let
// sessions in, below the store's epoch, with its epoch there: where stays still
// drain (inside), and where it goes by the row that it kept.
func floorsOf(kept, fresh *State, inside map[string]uint64) map[string]uint64 {
	floors := maps.Clone(inside)
	if floors == nil {
		floors = make(map[string]uint64)
	}
	view, _ := merge(kept, fresh)
	for role, row := range view.Roles {
		if epoch, ok := floors[role]; row.Doubt != nil && (!ok || row.Epoch < epoch) {
			floors[role] = row.Epoch
		}
	}
	return floors
}

// markDoubt writes into the store that a role went back: who has no snapshot
// of the highest epoch known serves nobody, until the operator decides.
func (r rules) markDoubt(s *State, role string, kept Row, by, why string, now time.Time) error {
	row, known := s.Roles[role]
	if !known {
		row = Row{Members: slices.Clone(kept.Members), Phase: PhaseHold}
	}
	switch {
	case row.Doubt == nil:
		row.Doubt = &Doubt{Known: max(kept.Epoch, row.Epoch), By: by, Why: why, Since: now}
	case row.Doubt.Known >= kept.Epoch:
		return errNothing
	default:
		row.Doubt.Known = kept.Epoch
	}
	row.Residues = mergeResidues(row.Residues, kept.Residues)
	s.Roles[role] = row
	return nil
}

// initRole is the operator's decision for a role that is in doubt, or that is
// not in the table. The role is held in an epoch above everything that is
// known, and opens on active when every registered frontend has acked, so that
// no frontend is still inside elsewhere. known is the highest epoch that the
// caller's own snapshot has. Residues stay and keep the role from opening, as in a switch.
func (r rules) initRole(s *State, role string, o order, members []string, known uint64, now time.Time) error {
	row, ok := s.Roles[role]
	if ok && row.Doubt == nil {
		return fmt.Errorf("%w: role %s is %s on %s and not in doubt: use `posthouse switch %s --to %s`",
			ErrConflict, role, row.Phase, row.Active, role, o.to)
	}
	if !ok || len(row.Members) == 0 {
		row.Members = slices.Sorted(slices.Values(members))
	}
	c := change{s: s, role: role, row: row, to: o.to, acceptStale: o.acceptStale}
	if err := r.check(c, initGuards); err != nil {
		return err
	}
	if row.Doubt != nil {
		known = max(known, row.Doubt.Known)
	}
	for _, f := range s.Frontends {
		known = max(known, f.Floors[role])
	}
	if q := row.Request; q != nil { // the other roles that it asks for go free
		if err := r.refuse(s, role, q.Number, "role "+role+" is decided anew", now); err != nil {
			return err
		}
	}
	s.Switches++
	s.Roles[role] = Row{Members: row.Members, Epoch: max(known, row.Epoch) + 1, Phase: PhaseHold, Residues: row.Residues, Seen: Seen{All: true}, Stale: row.Stale,
		Switch: &Switch{Number: s.Switches, To: o.to, Who: o.who, Why: o.why, AcceptStale: o.acceptStale, Started: now, Roles: []string{role}, Steps: []Step{{PhaseHold, now}}}}
	return nil
}

var initGuards = []guard{
	guardNamed("the new active is a member"),
	guardNamed("the new active is not stale"),
	guardNamed("every registered frontend knows the new active"),
	guardNamed("no other switch is under way there"),
	noRejoin,
}
