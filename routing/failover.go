package routing

import (
	"context"
	"fmt"
	"maps"
	"slices"
	"time"

	"go.uber.org/zap"
)

// FailoverRequest asks for another active because the present one is dead.
type FailoverRequest struct {
	Role, To string
	Who, Why string
	// AcceptLoss: go on without proof that the old active is off. What it still
	// does, and what it has not replicated, is lost.
	AcceptLoss bool
	// AcceptStale: To may be stale itself, because the active has died before To
	// could rejoin. What the active took since is lost.
	AcceptStale bool
	// ConfirmedClean is a SwitchRequest's: for members other than the active.
	ConfirmedClean bool
}

// Failover opens To without the old active's help, and waits for the outcome as
// Switch does. It needs every frontend's ack, and the fence hook's proof that
// the old active is off, or AcceptLoss. A switch in progress is taken over,
// with the acks that it has (safety 20). Afterwards the old active is stale.
func (t *Table) Failover(ctx context.Context, req FailoverRequest, progress func(Event)) (SwitchRecord, error) {
	return t.begin(ctx, req.Role, progress, func(s *State, now time.Time) error {
		config, err := t.config(req.Role)
		if err != nil {
			return err
		}
		roles, err := t.rules.group(s, req.Role, req.To, config)
		if err != nil {
			return err
		}
		o := order{to: req.To, who: req.Who, why: req.Why, hooks: config.Hooks, scope: config.Scope, acceptLoss: req.AcceptLoss, acceptStale: req.AcceptStale,
			confirmedClean: req.ConfirmedClean}
		return t.rules.failover(s, roles, o, now)
	})
}

// failover holds roles whose active is dead.
func (r rules) failover(s *State, roles []string, o order, now time.Time) error {
	s.Switches++
	if o.confirmedClean {
		s.clean(roles)
	}
	// What was begun for one role was begun on the backend of all: it is undone
	// for all.
	var begun []Phase
	for _, role := range roles {
		if old := s.Roles[role].Switch; old != nil && len(old.Begun) > len(begun) {
			begun = old.Begun
		}
	}
	for _, role := range roles {
		row, err := s.row(role)
		if err != nil {
			return err
		}
		c := change{s: s, role: role, row: row, to: o.to, isFenced: o.acceptLoss || slices.Contains(o.hooks, HookFence), acceptStale: o.acceptStale,
			with: roles, touches: touchesBackend(o.hooks, o.scope)}
		if err := r.check(c, failoverGuards); err != nil {
			return err
		}
		if q := row.Request; q != nil {
			if err := r.refuse(s, role, q.Number, fmt.Sprintf("failover %d takes over", s.Switches), now); err != nil {
				return err
			}
			row = s.Roles[role]
		}
		if old := row.Switch; old != nil {
			rec := SwitchRecord{Switch: *old, Role: role, From: row.Active, Epochs: map[string]uint64{role: row.Epoch}, Ended: now}
			rec.AbortWhy = fmt.Sprintf("failover %d takes over in phase %s", s.Switches, row.Phase)
			s.record(rec)
		} else {
			row.Epoch++
		}
		row.Phase = PhaseHold
		row.Switch = &Switch{Number: s.Switches, To: o.to, Who: o.who, Why: o.why, Started: now, Failover: true, AcceptLoss: o.acceptLoss, AcceptStale: o.acceptStale,
			Roles: slices.Clone(roles), Hooks: slices.Clone(o.hooks), Scope: o.scope, Begun: slices.Clone(begun), Steps: []Step{{PhaseHold, now}}}
		s.Roles[role] = row
	}
	return nil
}

// The guards of a failover: those of a switch, but for what it takes over.
var failoverGuards = []guard{
	inNoDoubt,
	{"no other backend is being promoted", func(c change) string {
		if sw := c.row.Switch; sw != nil && sw.begun(PhasePromote) && sw.To != c.to {
			return fmt.Sprintf("switch %d has begun to promote %s: fail over to that, or resume it", sw.Number, sw.To)
		}
		return ""
	}},
	guardNamed("the new active is a member"),
	guardNamed("the new active is another one"),
	guardNamed("the new active is not stale"),
	noRejoin,
	guardNamed("no other switch is under way there"),
	guardNamed("every registered frontend knows the new active"),
	{"the old active is off, or the loss accepted", func(c change) string {
		if c.row.Active != "" && !c.isFenced {
			return fmt.Sprintf("there is no fence hook to prove that %s is off: make sure that it is, then --accept-loss", c.row.Active)
		}
		return ""
	}},
}

func guardNamed(name string) guard {
	return holdGuards[slices.IndexFunc(holdGuards, func(g guard) bool { return g.name == name })]
}

// Rejoined is what a rejoin has done.
type Rejoined struct {
	// Roles whose copy the member is again, the one that was asked for first.
	Roles []string `json:"roles"`
	// Output is the end of what the hook wrote.
	Output string `json:"output"`
}

// RejoinRequest asks for a stale member to become a copy of the active again.
type RejoinRequest struct {
	Role, Member string
	Who, Why     string
}

// Rejoin makes a stale member a copy of the role's active again: the rejoin hook
// does it (with the active as From and the member as To), then the member is
// stale no more. Where the hook may restart the member it is for all roles that
// were left behind there and have the same active. It blocks until the hook has
// ended, and may be repeated.
func (t *Table) Rejoin(ctx context.Context, req RejoinRequest) (Rejoined, error) {
	config, err := t.config(req.Role)
	if err != nil {
		return Rejoined{}, err
	}
	// The hook overwrites the member: not by what this frontend believes, which
	// may be cut off.
	var roles []string
	by := t.ID()
	s, err := t.update(ctx, func(s *State) (err error) {
		row, err := t.rules.rejoining(s, req.Role, req.Member, by, config.Scope)
		if err != nil {
			return err
		}
		if !slices.Contains(config.Hooks, HookRejoin) || t.opt.Hooks == nil {
			return fmt.Errorf("%w: role %s has no rejoin hook: %s cannot be proven to be a copy of %s", ErrConflict, req.Role, req.Member, row.Active)
		}
		if roles, err = t.rules.leftBehind(s, req.Role, req.Member, config); err != nil {
			return err
		}
		return each(roles[1:], func(other string) error {
			_, err := t.rules.rejoining(s, other, req.Member, by, config.Scope)
			return err
		})
	})
	if err != nil {
		return Rejoined{}, err
	}
	row := s.Roles[req.Role]
	stale := row.Stale[req.Member]
	log := t.log.With(zap.Strings("roles", roles), zap.String("member", req.Member), zap.String("active", row.Active),
		zap.Int("attempt", stale.Attempt), zap.String("by", req.Who), zap.String("reason", req.Why))
	log.Info("rejoin begins")
	done := Rejoined{Roles: roles}
	done.Output, err = t.opt.Hooks.Run(ctx, HookCall{Hook: HookRejoin, Roles: roles, From: row.Active, To: req.Member,
		Number: stale.Number, Epoch: row.Epoch, Attempt: stale.Attempt, Seen: Seen{All: true}})
	isCopy := err == nil
	if err != nil {
		log.Error("rejoin failed", zap.Error(err))
		err = fmt.Errorf("hook rejoin: %w", err)
	} else {
		log.Info("rejoin done")
	}
	_, unwritten := t.update(context.WithoutCancel(ctx), func(now *State) error {
		return each(roles, func(role string) error {
			return t.rules.rejoined(now, role, req.Member, row.Active, s.Roles[role].Stale[req.Member], isCopy)
		})
	})
	switch {
	case unwritten == nil:
	case isCopy:
		err = fmt.Errorf("role %s: %s has rejoined and is still marked as stale, run it again: %w", req.Role, req.Member, unwritten)
	default:
		log.Error("writing down that a rejoin has ended", zap.Error(unwritten)) // it counts until this frontend is gone
	}
	return done, err
}

// leftBehind are the roles that rejoin at member together, by what their hook may
// restart there. The first is role.
func (r rules) leftBehind(s *State, role, member string, config RoleConfig) ([]string, error) {
	group := []string{role}
	if config.Scope == ScopeRole {
		return group, nil
	}
	for _, other := range sortedKeys(s.Roles) {
		with := s.Roles[other]
		_, stale := with.Stale[member]
		switch {
		case other == role:
		case with.Active == member || with.to() == member:
			return nil, fmt.Errorf("%w: role %s: %s serves role %s, or is to serve it, and the hook may restart it: "+
				"state that it touches nothing else (scope: role)", ErrConflict, role, member, other)
		case stale && with.Active == s.Roles[role].Active:
			group = append(group, other)
		}
	}
	return group, nil
}

// rejoining counts a rejoin that is about to begin, by frontend by, and returns
// the row.
func (r rules) rejoining(s *State, role, member, by string, scope Scope) (Row, error) {
	row, err := s.row(role)
	if err != nil {
		return Row{}, err
	}
	stale, ok := row.Stale[member]
	_, isAtWork := s.Frontends[stale.RejoinBy]
	switch {
	case !ok:
		return Row{}, fmt.Errorf("%w: role %s: %s is not stale: see `posthouse roles`", ErrConflict, role, member)
	case row.Phase != PhaseOpen:
		return Row{}, fmt.Errorf("%w: role %s is in phase %s: try again when it is open", ErrConflict, role, row.Phase)
	case row.Active == member:
		return Row{}, fmt.Errorf("%w: role %s: %s serves it: there is nobody whose copy it could be", ErrConflict, role, member)
	case isAtWork:
		return Row{}, fmt.Errorf("%w: role %s: frontend %s is at it already", ErrConflict, role, stale.RejoinBy)
	}
	stale.Attempt++
	stale.RejoinBy, stale.RejoinScope = by, scope
	row.Stale = maps.Clone(row.Stale)
	row.Stale[member] = stale
	s.Roles[role] = row
	return row, r.check(change{s: s, role: role, row: row}, []guard{inNoDoubt})
}

// rejoined ends a rejoin, which mark is of. It takes the member's mark away if it
// is a copy of what is active still.
func (r rules) rejoined(s *State, role, member, from string, mark Stale, isCopy bool) error {
	row, err := s.row(role)
	if err != nil {
		return err
	}
	stale, ok := row.Stale[member]
	if !ok || stale.Number != mark.Number || stale.Attempt != mark.Attempt || isCopy && (row.Active != from || row.Phase != PhaseOpen) {
		return fmt.Errorf("%w: role %s has moved on meanwhile", ErrConflict, role)
	}
	row.Stale = maps.Clone(row.Stale)
	stale.RejoinBy, stale.RejoinScope = "", ""
	row.Stale[member] = stale
	if isCopy {
		delete(row.Stale, member)
	}
	s.Roles[role] = row
	return nil
}
