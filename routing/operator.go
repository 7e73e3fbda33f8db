package routing

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"go.uber.org/zap"
)

// SwitchRequest asks for another active.
type SwitchRequest struct {
	Role, To string
	Who, Why string
	// ConfirmedClean is the operator's word that nothing of the past runs on
	// the role's backends any more: it clears the residues recorded so far.
	ConfirmedClean bool
	// AcceptRefusals: the switch may begin though some logins would find no place
	// to wait and be told to try again.
	AcceptRefusals bool
}

// Switch holds the role, with those that it shares a backend with where its hooks
// restart that, and waits for the outcome, which whoever drives
// switches brings about: it goes on if ctx ends. progress, if not nil, is told
// what happens, in order. An error says what refused or blocked the switch.
func (t *Table) Switch(ctx context.Context, req SwitchRequest, progress func(Event)) (SwitchRecord, error) {
	return t.begin(ctx, req.Role, progress, func(s *State, now time.Time) error {
		return t.requests(s, req, false, now)
	})
}

// requests asks for a switch of a role and of what it takes with it.
func (t *Table) requests(s *State, req SwitchRequest, planOnly bool, now time.Time) error {
	config, err := t.config(req.Role)
	if err != nil {
		return err
	}
	roles, err := t.rules.group(s, req.Role, req.To, config)
	if err != nil {
		return err
	}
	o := order{to: req.To, who: req.Who, why: req.Why, hooks: config.Hooks, scope: config.Scope, confirmedClean: req.ConfirmedClean, acceptRefusals: req.AcceptRefusals}
	return t.rules.request(s, roles, o, planOnly, now)
}

// config is what this frontend's configuration has of a role of the table. One that
// it does not have may have hooks elsewhere.
func (t *Table) config(role string) (RoleConfig, error) {
	config, known := t.opt.Roles[role]
	if _, inTable := t.Snapshot().Roles[role]; inTable && !known {
		return config, fmt.Errorf("%w: role %s is not in the configuration of frontend %s: ask one that has it, or add it", ErrConflict, role, t.ID())
	}
	return config, nil
}

// AbortRequest asks for the way back from a switch.
type AbortRequest struct {
	Role     string
	Who, Why string
	// ConfirmedDown: the new active is down, and stays down, after its promotion
	// had begun: without any undo_promote it is left behind, and stale.
	ConfirmedDown bool
}

// Abort turns the switch of a role back, with all roles that are switched with
// it. It returns when that is written; whoever drives switches undoes what was
// begun. It fails if there is no switch, or no way back.
func (t *Table) Abort(ctx context.Context, req AbortRequest) error {
	why := "aborted by " + req.Who + ": " + req.Why
	if req.Who == "" {
		why = "aborted by the operator"
	}
	return t.steer(ctx, req.Role, "aborting", func(s *State, role string) error {
		if req.ConfirmedDown {
			return t.rules.abandon(s, role, why, time.Now())
		}
		if q := s.Roles[role].Request; q != nil {
			return t.rules.refuse(s, role, q.Number, why, time.Now())
		}
		return t.rules.abort(s, role, why, time.Now())
	})
}

// Resume lets the switch of a role go on that waits for the operator.
func (t *Table) Resume(ctx context.Context, role, who, why string) error {
	err := t.steer(ctx, role, "resuming", func(s *State, role string) error { return t.rules.resume(s, role) })
	if err == nil {
		t.log.Info("switch resumed", zap.String("role", role), zap.String("by", who), zap.String("reason", why))
	}
	return err
}

func (t *Table) steer(ctx context.Context, role, what string, rule func(s *State, role string) error) error {
	_, err := t.update(ctx, func(s *State) error {
		roles := s.together(role)
		if len(roles) == 0 {
			roles = []string{role} // the rule says what is wrong
		}
		return each(roles, func(role string) error { return rule(s, role) })
	})
	if err != nil {
		return fmt.Errorf("%s the switch of %s: %w", what, role, err)
	}
	return nil
}

// InitRole is the operator's decision which backend serves a role that is in
// doubt or not yet in the table, and waits until it is open there. Unlike a
// switch it has no way back: it waits for every ack, and until no residue is in
// the way. acceptStale: active may be stale.
func (t *Table) InitRole(ctx context.Context, role, active, who string, acceptStale bool) (SwitchRecord, error) {
	members := t.opt.Roles[role].Members
	kept := t.Snapshot().Roles[role]
	return t.begin(ctx, role, nil, func(s *State, now time.Time) error {
		o := order{to: active, who: who, why: "roles init", acceptStale: acceptStale}
		return t.rules.initRole(s, role, o, members, kept.Epoch, now)
	})
}

// ConfirmClean is the operator's word that nothing of the past runs on the
// role's backends any more.
func (t *Table) ConfirmClean(ctx context.Context, role string) error {
	_, err := t.update(ctx, func(s *State) error {
		if _, err := s.row(role); err != nil {
			return err
		}
		return t.rules.confirmClean(s, role)
	})
	if errors.Is(err, errNothing) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("clearing the residues of %s: %w", role, err)
	}
	return nil
}

// begin commits the start of a switch and waits for its end.
func (t *Table) begin(ctx context.Context, role string, progress func(Event), hold func(*State, time.Time) error) (SwitchRecord, error) {
	if progress == nil {
		progress = func(Event) {}
	}
	// Every view from here on is looked at, however quickly they follow.
	first, now := t.view.Load(), time.Now()
	v, before := first, first.state
	held, err := t.update(ctx, func(s *State) error {
		before = s.Clone()
		return hold(s, now)
	})
	if err != nil {
		return SwitchRecord{}, err
	}
	number := held.Roles[role].number()
	t.report(role, before, held, progress)
	last, isThere := held, false
	for {
		s := v.state
		isThere = isThere || s.Revision >= held.Revision || v.losses != first.losses
		if s.Revision > last.Revision {
			t.report(role, last, s, progress)
			last = s
		}
		if rec, ended, err := outcome(s, role, number); isThere && ended {
			return rec, err
		}
		select {
		case <-v.changed:
			v = v.next
		case <-t.closing:
			return SwitchRecord{}, fmt.Errorf("switch %d of %s: %w: another frontend drives it on; see `posthouse roles`", number, role, ErrClosed)
		case <-ctx.Done():
			return SwitchRecord{}, fmt.Errorf("switch %d of %s goes on in phase %s: %w: see `posthouse roles`",
				number, role, last.Roles[role].Phase, ctx.Err())
		}
	}
}

func (t *Table) report(role string, old, now *State, progress func(Event)) {
	for _, e := range changes(old, now) {
		if e.Role == role {
			e.At = time.Now()
			progress(e)
		}
	}
}

// number is that of the switch in progress or asked for; 0 if there is none.
func (row Row) number() uint64 {
	switch {
	case row.Switch != nil:
		return row.Switch.Number
	case row.Request != nil:
		return row.Request.Number
	}
	return 0
}

// outcome says how the switch with this number ended, if it has.
func outcome(s *State, role string, number uint64) (rec SwitchRecord, ended bool, err error) {
	for _, rec := range slices.Backward(s.History) {
		if _, with := rec.Epochs[role]; !with || rec.Number != number {
			continue
		}
		if !rec.Done {
			err = fmt.Errorf("switch %d of %s to %s was aborted, %s serves on: %s", number, role, rec.To, rec.From, rec.AbortWhy)
		}
		return rec, true, err
	}
	if s.Roles[role].number() != number {
		return SwitchRecord{}, true, fmt.Errorf("switch %d of %s is neither in progress nor in the history: the store went back; see `posthouse roles`", number, role)
	}
	return SwitchRecord{}, false, nil
}

// ActiveBackends returns the backends that serve some role now, sorted.
func (t *Table) ActiveBackends() []string {
	return slices.Clone(t.view.Load().actives)
}

// RoleStatus is one role as this frontend sees it.
type RoleStatus struct {
	Role string `json:"role"`
	Row
	// Inside is the number of stays in this frontend; Below, of those in an
	// epoch below the role's: they drain.
	Inside int `json:"inside"`
	Below  int `json:"below"`
	Parked int `json:"parked"`
	// Acked and Missing list the registered frontends while the role is held.
	Acked   []string `json:"acked,omitempty"`
	Missing []string `json:"missing,omitempty"`
	// Unhanded are residues that this frontend has not handed to the store yet.
	Unhanded []Residue `json:"unhanded,omitempty"`
	// Blocked says why a login would park now; empty if it would enter.
	Blocked string `json:"blocked,omitempty"`
}

// Roles returns all roles, sorted by name.
func (t *Table) Roles() []RoleStatus {
	t.mu.Lock()
	defer t.mu.Unlock()
	v := t.view.Load()
	list := make([]RoleStatus, 0, len(v.state.Roles))
	for _, role := range sortedKeys(v.state.Roles) {
		list = append(list, t.statusLocked(v, role))
	}
	return list
}

// Switched returns the roles that the switch of this one has in hand; none if
// there is no switch.
func (t *Table) Switched(role string) []RoleStatus {
	t.mu.Lock()
	defer t.mu.Unlock()
	v := t.view.Load()
	var list []RoleStatus
	for _, with := range v.state.together(role) {
		list = append(list, t.statusLocked(v, with))
	}
	return list
}

func (t *Table) statusLocked(v *view, role string) RoleStatus {
	row := v.state.Roles[role].clone()
	st := RoleStatus{Role: role, Row: row}
	if row.Phase != PhaseOpen {
		st.Missing = v.state.missingAcks(role)
		for _, id := range sortedKeys(v.state.Frontends) {
			if !slices.Contains(st.Missing, id) {
				st.Acked = append(st.Acked, id)
			}
		}
	}
	g := t.gates[role]
	if g == nil {
		g = newGate(role)
	}
	p := t.presenceLocked(g, v, row)
	st.Inside, st.Below, st.Parked, st.Unhanded = len(g.stays), p.below, len(g.parked), g.list()
	st.Blocked = t.blocked(row, p)
	return st
}

func (t *Table) blocked(row Row, p presence) string {
	if isUnknown(row) {
		return "in doubt: " + row.Doubt.Why
	}
	if in := t.rules.admit(row, p); in != "" {
		return in
	}
	if t.leaseLeft() <= 0 {
		return leaseOver
	}
	return ""
}

// Explanation is every step of a lookup.
type Explanation struct {
	Asked         string     `json:"asked"`
	User          string     `json:"user,omitempty"` // canonical
	DirectoryRole string     `json:"directory_role,omitempty"`
	OverrideRole  string     `json:"override_role,omitempty"`
	LastRole      string     `json:"last_role,omitempty"` // where this frontend saw the user last
	Role          string     `json:"role,omitempty"`      // what counts
	Disagrees     bool       `json:"disagrees,omitempty"` // the directory's role is not the last one, and no override says so
	Backend       string     `json:"backend,omitempty"`   // where a login would go
	Epoch         uint64     `json:"epoch,omitempty"`
	Parks         string     `json:"parks,omitempty"` // why a login would wait now
	Doubt         *Doubt     `json:"doubt,omitempty"`
	Residues      []Residue  `json:"residues,omitempty"` // the role's, in the store and here
	Sessions      []StayInfo `json:"sessions,omitempty"` // the user's stays in this frontend
	Error         string     `json:"error,omitempty"`    // what a login would fail with
	Unknown       bool       `json:"unknown,omitempty"`  // the directory is sure that there is no such user
}

// StayInfo is one stay of an Explanation.
type StayInfo struct {
	Role    string    `json:"role"`
	Backend string    `json:"backend"`
	Epoch   uint64    `json:"epoch"`
	Since   time.Time `json:"since"`
	Revoked bool      `json:"revoked,omitempty"`
}

// Explain goes through a login's lookup without any side effect.
func (t *Table) Explain(ctx context.Context, user string) Explanation {
	x := Explanation{Asked: user}
	entry, err := t.opt.Directory.Lookup(ctx, user)
	if err != nil {
		x.Error, x.Unknown = err.Error(), errors.Is(err, ErrUnknownUser)
		return x
	}
	x.User, x.DirectoryRole, x.Role = entry.User, entry.Role, entry.Role
	s := t.Snapshot()
	x.LastRole, err = t.opt.Local.Recall(entry.User)
	x.OverrideRole = s.Overrides[entry.User]
	switch {
	case x.OverrideRole != "":
		x.Role = x.OverrideRole
	case err != nil:
		x.Error = err.Error()
		return x
	case x.LastRole != "":
		x.Role, x.Disagrees = x.LastRole, x.LastRole != entry.Role
	}
	t.explainRole(&x)
	return x
}

func (t *Table) explainRole(x *Explanation) {
	t.mu.Lock()
	defer t.mu.Unlock()
	for _, role := range sortedKeys(t.gates) {
		for s := range t.gates[role].stays {
			if s.User == x.User {
				x.Sessions = append(x.Sessions, StayInfo{s.Role, s.Backend, s.Epoch, s.Since, s.Check() != nil})
			}
		}
	}
	v := t.view.Load()
	row, ok := v.state.Roles[x.Role]
	if !ok {
		x.Error = unknownRole(x.Role, x.User).Error()
		return
	}
	g := t.gates[x.Role]
	if g == nil {
		g = newGate(x.Role)
	}
	x.Backend, x.Epoch, x.Doubt = row.Active, row.Epoch, row.Doubt
	x.Residues = mergeResidues(row.Residues, g.list())
	x.Parks = t.blocked(row, t.presenceLocked(g, v, row))
}

// Counters are for metrics.
type Counters struct {
	Inside        int    // stays
	Parked        int    // logins
	Disagreements uint64 // logins whose directory role was not the last one, ever
}

// Counters returns this frontend's own.
func (t *Table) Counters() Counters {
	t.mu.Lock()
	defer t.mu.Unlock()
	return Counters{t.inside, t.slots[slot{slotTotal, ""}], t.disagreements.Load()}
}
