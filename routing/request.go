package routing

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	"go.uber.org/zap"
)

// Request is a switch that has been asked for and has not begun: its roles are
// open, and every frontend reports whether it is ready (preflight). Then the
// driver holds them, or refuses. Each of the roles has it in its row, the first
// one with the reports.
type Request struct {
	Number uint64    `json:"number"` // the switch's
	To     string    `json:"to"`
	Who    string    `json:"who"`
	Why    string    `json:"why,omitempty"`
	Asked  time.Time `json:"asked"`
	Roles  []string  `json:"roles"`
	Hooks  []Hook    `json:"hooks,omitempty"`
	Scope  Scope     `json:"scope,omitempty"` // of the hooks
	// PlanOnly: the switch is not to begin; who has asked takes the request
	// back when it has the reports.
	PlanOnly bool `json:"plan_only,omitempty"`
	// AcceptRefusals: it may begin though some logins would find no place to wait.
	AcceptRefusals bool `json:"accept_refusals,omitempty"`
	// Comparison of the members, before HOLD; nil if none has begun.
	Comparison *Comparison `json:"comparison,omitempty"`
	// Reports by frontend, each on all the roles.
	Reports map[string]Report `json:"reports,omitempty"`
}

// Report is what one frontend says to a Request.
type Report struct {
	// Sessions that are inside the request's roles, and Users who have them.
	Sessions int `json:"sessions"`
	Users    int `json:"users,omitempty"`
	// Crowded says which of their logins would find no place to wait; empty if
	// all would find one.
	Crowded string `json:"crowded,omitempty"`
	// Unreachable says which services of the new active cannot be reached from
	// there, and why; empty if all can.
	Unreachable string `json:"unreachable,omitempty"`
	// Closed: its host is there, and nobody listens.
	Closed bool `json:"closed,omitempty"`
	// Digest is RoleConfig's, of the role that was asked for.
	Digest string `json:"digest,omitempty"`
}

const (
	// preflightTimeout bounds the wait for reports; so does SwitchBudget.
	preflightTimeout = 10 * time.Second
	// reportAgainAfter is when a frontend looks again whether it can report.
	reportAgainAfter = 50 * time.Millisecond
	// requestKept is after how long nobody expects a switch to begin any more:
	// all frontends were stopped meanwhile. Clocks may differ by as much.
	requestKept = 10 * time.Minute
	// planKept is after how long the driver takes a plan's request back.
	planKept = time.Minute
)

// request asks for a switch of roles. It refuses what hold would refuse. The
// operator's word that all is clean counts for the residues that stand now, not
// for what comes up until HOLD.
func (r rules) request(s *State, roles []string, o order, planOnly bool, now time.Time) error {
	trial := s.Clone()
	if o.confirmedClean {
		trial.clean(roles)
	}
	if err := r.hold(trial, roles, o, now); err != nil {
		return err
	}
	if o.confirmedClean && !planOnly {
		s.clean(roles)
	}
	s.Switches++
	for _, role := range roles {
		row := s.Roles[role]
		row.Request = &Request{Number: s.Switches, To: o.to, Who: o.who, Why: o.why, Asked: now, Roles: slices.Clone(roles),
			Hooks: slices.Clone(o.hooks), Scope: o.scope, PlanOnly: planOnly, AcceptRefusals: o.acceptRefusals}
		s.Roles[role] = row
	}
	return nil
}

// clean clears the residues of roles.
func (s *State) clean(roles []string) {
	for _, role := range roles {
		if row, ok := s.Roles[role]; ok {
			row.Residues = nil
			s.Roles[role] = row
		}
	}
}

// requested looks up a role for which the switch with this number is asked.
func (s *State) requested(role string, number uint64) (Row, error) {
	row, err := s.row(role)
	if err == nil && (row.Request == nil || row.Request.Number != number) {
		err = fmt.Errorf("%w: role %s: switch %d is not asked for any more", ErrConflict, role, number)
	}
	return row, err
}

// report takes a frontend's report, with what it hands in for each role.
func (r rules) report(s *State, id, role string, number uint64, report Report, hands map[string]handed) error {
	row, err := s.requested(role, number)
	if err != nil {
		return err
	}
	if _, ok := s.Frontends[id]; !ok {
		return fmt.Errorf("%w: frontend %s is not registered", ErrConflict, id)
	}
	req := *row.Request
	req.Reports = maps.Clone(req.Reports)
	if req.Reports == nil {
		req.Reports = make(map[string]Report)
	}
	req.Reports[id] = report
	row.Request = &req
	s.Roles[role] = row
	s.take(hands)
	return nil
}

// start holds the roles of a request, for the driver who has it in hand then. They
// must be still those that are switched together, and every frontend of now must
// have reported.
func (r rules) start(s *State, role string, number uint64, driver string, now time.Time) error {
	row, err := s.requested(role, number)
	if err != nil {
		return err
	}
	q := *row.Request
	roles, err := r.group(s, role, q.To, RoleConfig{Hooks: q.Hooks, Scope: q.Scope})
	if err != nil {
		return err
	}
	if why, _ := s.obstacle(row); why != "" {
		return fmt.Errorf("%w: role %s: %s", ErrConflict, role, why)
	}
	if !slices.Equal(roles, q.Roles) {
		return fmt.Errorf("%w: role %s: %s serves roles %s now, and when the switch was asked for those to be switched were %s: ask again",
			ErrConflict, role, row.Active, listed(roles), listed(q.Roles))
	}
	o := order{number: number, to: q.To, who: q.Who, why: q.Why, hooks: q.Hooks, scope: q.Scope, driver: driver}
	return r.hold(s, q.Roles, o, now)
}

// refuse ends a request. It is in the history like a switch that was aborted,
// unless it was for a plan.
func (r rules) refuse(s *State, role string, number uint64, why string, now time.Time) error {
	row, err := s.requested(role, number)
	if err != nil {
		return err
	}
	for _, role := range row.Request.Roles {
		row, err := s.requested(role, number)
		if err != nil {
			continue // the store went back
		}
		q := row.Request
		if !q.PlanOnly {
			s.record(SwitchRecord{Role: role, From: row.Active, Epochs: map[string]uint64{role: row.Epoch}, Ended: now,
				Switch: Switch{Number: number, To: q.To, Who: q.Who, Why: q.Why, Started: q.Asked, Roles: q.Roles, Hooks: q.Hooks, Scope: q.Scope, AbortWhy: why,
					Steps: []Step{{PhasePreflight, q.Asked}, {PhaseOpen, now}}}})
		}
		row.endComparison()
		if q.Comparison != nil && len(row.Members) > 2 {
			row.Seen = Seen{All: true} // it says nothing of the third member
		}
		row.Request = nil
		s.Roles[role] = row
	}
	return nil
}

// obstacle says what keeps a request's switch from beginning: "" if nothing, and
// whether it may pass by waiting. row is that of the first role.
func (s *State) obstacle(row Row) (why string, mayPass bool) {
	q := row.Request
	var missing, unready []string
	digests := make(map[string]string) // a frontend by its digest
	for _, id := range sortedKeys(s.Frontends) {
		r, reported := q.Reports[id]
		if reported {
			digests[r.Digest] = id
		}
		switch {
		case !reported:
			missing = append(missing, id)
		case r.Unreachable != "" && !(r.Closed && slices.Contains(q.Hooks, HookPromote)): // which may be what opens its doors
			unready = append(unready, fmt.Sprintf("frontend %s cannot reach %s: %s", id, q.To, r.Unreachable))
		case r.Crowded != "" && !q.AcceptRefusals:
			unready = append(unready, fmt.Sprintf("frontend %s has not enough places for logins to wait: %s: raise these limits, or have logins refused (--accept-refusals)",
				id, r.Crowded))
		}
	}
	if len(digests) > 1 {
		unready = append(unready, fmt.Sprintf("frontends %s have different hooks, scope or catch_up for the role in their configuration, "+
			"or limits.hold_window, switch_budget or undo_reserve: any of them may drive the switch",
			listed(slices.Sorted(maps.Values(digests)))))
	}
	if why := s.tooMany(q); why != "" {
		unready = append(unready, why)
	}
	if len(unready) > 0 {
		return "preflight: " + strings.Join(unready, "; "), false
	}
	if c := q.Comparison; c != nil && c.Failed {
		return "preflight: " + c.Found, false
	}
	if len(missing) > 0 {
		return "preflight: no report from frontend " + strings.Join(missing, ", ") + ": is it running? See `posthouse frontends`", true
	}
	return "", false
}

// to is where the switch in progress, or asked for, leads; "" if there is none.
func (row Row) to() string {
	switch {
	case row.Switch != nil:
		return row.Switch.To
	case row.Request != nil && !row.Request.PlanOnly:
		return row.Request.To
	}
	return ""
}

// answerRequests reports on requests until ctx ends. Apart from keep: a backend
// that does not answer must not delay an ack.
func (t *Table) answerRequests(ctx context.Context) {
	for ctx.Err() == nil {
		changed := t.Changed()
		wait := make(<-chan time.Time)
		switch err := t.reportDue(ctx); {
		case err == nil || ctx.Err() != nil:
		case errors.Is(err, errStillEntering):
			wait = time.After(reportAgainAfter)
		default:
			t.log.Error("reporting on a switch; trying again", zap.Error(err))
			wait = time.After(retryAfter)
		}
		select {
		case <-ctx.Done():
		case <-changed:
		case <-wait:
		}
	}
}

// reportDue reports on the requests that wait for this frontend.
func (t *Table) reportDue(ctx context.Context) error {
	var errs []error
	s, id := t.Snapshot(), t.ID()
	for _, role := range s.inMotion() {
		q := s.Roles[role].Request
		if q == nil || q.Roles[0] != role {
			continue
		}
		if _, registered := s.Frontends[id]; !registered {
			continue
		}
		if _, reported := q.Reports[id]; reported {
			continue
		}
		if t.isEntering(q.Roles) {
			errs = append(errs, errStillEntering)
			continue
		}
		report := Report{Digest: t.opt.Roles[role].Digest}
		if t.opt.Reach != nil {
			if err := t.opt.Reach(ctx, q.To); err != nil {
				report.Unreachable, report.Closed = err.Error(), errors.Is(err, ErrNobodyListens)
			}
		}
		hands := t.inspect(q.Roles, &report)
		_, err := t.update(ctx, func(s *State) error { return t.rules.report(s, id, role, q.Number, report, hands) })
		t.settle(hands, err)
		t.wakeKeeper() // an ack may have waited for that
		if err != nil && !errors.Is(err, ErrConflict) {
			errs = append(errs, fmt.Errorf("reporting on switch %d of role %s: %w", q.Number, role, err))
		}
	}
	return errors.Join(errs...)
}

// errStillEntering: who was parked in the last hold has used up some of his window
// and would be refused by the next.
var errStillEntering = errors.New("logins still enter after the last hold")

func (t *Table) isEntering(roles []string) bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	return slices.ContainsFunc(roles, func(role string) bool { return len(t.gateLocked(role).parked) > 0 })
}

// inspect completes a report on these roles, and takes out of their gates what
// goes with it. settle must follow.
func (t *Table) inspect(roles []string, report *Report) (hands map[string]handed) {
	t.mu.Lock()
	defer t.mu.Unlock()
	hands = make(map[string]handed)
	for _, role := range roles {
		g := t.gateLocked(role)
		t.pruneLocked(g)
		hands[role] = g.handOver()
		inside := make(map[string]bool)
		for s := range g.stays { // they may change more
			g.see(s.User)
			inside[s.User] = true
		}
		report.Sessions += len(g.stays)
		report.Users += len(inside)
	}
	report.Crowded = t.crowdedLocked(roles)
	return hands
}

// stepRequest does what is due for a request. row is that of its first role.
func (d *driver) stepRequest(ctx context.Context, s *State, role string, row Row) (bool, error) {
	t, q, now := d.t, row.Request, time.Now()
	mine := d.requests[q.Number]
	if mine == nil {
		mine = &asking{since: now}
		d.requests[q.Number] = mine
	}
	why, mayPass := s.obstacle(row)
	expected := q.Asked
	if q.Comparison != nil && q.Comparison.Ended.After(expected) {
		expected = q.Comparison.Ended
	}
	switch {
	case mine.cancel != nil:
		return false, nil // a comparison is at work; abort takes the request back
	case mine.compares && q.Comparison != nil && q.Comparison.Driver != d.token:
		return false, errDeposed
	case why == "" && d.wantsComparison(role, q):
		return d.runComparison(ctx, s, role, mine)
	case q.PlanOnly && now.Sub(mine.since) < planKept:
		return false, nil
	case q.PlanOnly:
		why = "nobody has taken the plan"
	case now.Sub(expected) > requestKept:
		why = "it was asked for at " + q.Asked.UTC().Format(time.DateTime) + " and could not begin: ask again"
	case why == "":
		did, err := d.commitAll(ctx, role+": holding", func(s *State) error { return t.rules.start(s, role, q.Number, d.token, now) })
		if did || err != nil {
			return did, err
		}
		trial := t.Snapshot().Clone()
		if row, err := trial.requested(role, q.Number); err == nil {
			if _, mayPass := trial.obstacle(row); mayPass {
				return false, nil
			}
		}
		if err = t.rules.start(trial, role, q.Number, d.token, now); err == nil {
			return false, nil // the snapshot is behind
		}
		why = err.Error()
	case mayPass && now.Sub(mine.since) < min(preflightTimeout, t.opt.SwitchBudget):
		return false, nil
	}
	t.log.Warn("switch refused", zap.String("role", role), zap.Uint64("switch", q.Number), zap.String("why", why))
	return d.commitAll(ctx, role+": refusing", func(s *State) error { return t.rules.refuse(s, role, q.Number, why, now) })
}
