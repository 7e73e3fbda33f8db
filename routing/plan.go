package routing

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"time"
)

// Plan is what a switch would do, and what it would meet.
type Plan struct {
	Role string `json:"role"`
	From string `json:"from,omitempty"`
	To   string `json:"to"`
	// Roles are switched together, Role first.
	Roles []string `json:"roles"`
	// Refused says why the switch would not begin; empty if it would.
	Refused   string           `json:"refused,omitempty"`
	Steps     []PlanStep       `json:"steps"`
	Frontends []FrontendStatus `json:"frontends"`
	Residues  []Residue        `json:"residues,omitempty"`
	// Seen are the users whose mail may have changed since the last switch.
	Seen Seen `json:"seen"`
	// Compared is what the comparison of both members has found; empty if none
	// is made, or where it did not come to its end in planComparison.
	Compared string `json:"compared,omitempty"`
	// Caveats are what the switch cannot promise.
	Caveats []string `json:"caveats"`
}

// PlanStep is one phase of a Plan.
type PlanStep struct {
	Phase Phase  `json:"phase"`
	Does  string `json:"does"`
	// Undo says how an abort turns the step back; empty: nothing is to be done.
	Undo string `json:"undo,omitempty"`
}

// FrontendStatus is one registered frontend.
type FrontendStatus struct {
	ID    string    `json:"id"`
	Since time.Time `json:"since"`
	// Alive: it shows life. Otherwise it has ended or is cut off, and a switch
	// aborts for want of its ack until that is known.
	Alive bool `json:"alive"`
	// Own: it is the one that was asked.
	Own      bool     `json:"own,omitempty"`
	Backends []string `json:"backends"`
	// Missing are the held roles that wait for its ack.
	Missing []string `json:"missing,omitempty"`
	// Report is what it said to a plan; nil if it said nothing.
	Report *Report `json:"report,omitempty"`
}

// Frontends lists the registered frontends, sorted by ID.
func (t *Table) Frontends(ctx context.Context) ([]FrontendStatus, error) {
	s, own := t.Snapshot(), t.ID()
	ids := sortedKeys(s.Frontends)
	alive, err := t.opt.Store.Alive(ctx, ids)
	if err != nil {
		return nil, fmt.Errorf("asking which frontends are alive: %w", err)
	}
	list := make([]FrontendStatus, 0, len(ids))
	for _, id := range ids {
		f := s.Frontends[id]
		st := FrontendStatus{ID: id, Since: f.Since, Backends: f.Backends, Own: id == own, Alive: slices.Contains(alive, id)}
		for _, role := range s.inMotion() {
			if s.Roles[role].Phase != PhaseOpen && slices.Contains(s.missingAcks(role), id) {
				st.Missing = append(st.Missing, role)
			}
		}
		list = append(list, st)
	}
	return list, nil
}

// FenceFrontend ends the registration of a frontend on the operator's word that
// it is down and stays down: no switch waits for its ack any more. What it may
// have left behind becomes residues. It refuses one that shows life.
func (t *Table) FenceFrontend(ctx context.Context, id, who, why string) error {
	if _, registered := t.Snapshot().Frontends[id]; !registered {
		return fmt.Errorf("%w: frontend %s is not registered: see `posthouse frontends`", ErrConflict, id)
	}
	alive, err := t.opt.Store.Alive(ctx, []string{id})
	if err != nil {
		return fmt.Errorf("asking whether frontend %s is alive: %w", id, err)
	}
	if len(alive) > 0 {
		return fmt.Errorf("%w: frontend %s shows life: stop it, and it says goodbye by itself", ErrConflict, id)
	}
	_, err = t.update(ctx, func(s *State) error { return t.rules.bury(s, id, time.Now()) })
	if errors.Is(err, errNothing) {
		return nil // it has said goodbye meanwhile
	}
	if err != nil {
		return fmt.Errorf("fencing frontend %s: %w", id, err)
	}
	t.emit(Event{Kind: EventBuried, Frontend: id, Text: "on the word of " + who + ": " + why})
	return nil
}

// Plan says what Switch would do with this request. It asks every frontend for a
// report, which takes up to planTimeout, has the members compared, if the site
// wants that, for up to planComparison, and changes nothing else.
func (t *Table) Plan(ctx context.Context, req SwitchRequest) (Plan, error) {
	now := time.Now()
	s, err := t.update(ctx, func(s *State) error { return t.requests(s, req, true, now) })
	refused := ""
	switch {
	case errors.Is(err, ErrConflict):
		refused = err.Error()
		if s, err = t.opt.Store.Load(ctx); err != nil {
			return Plan{}, fmt.Errorf("reading the role table: %w", err)
		}
	case err != nil:
		return Plan{}, fmt.Errorf("asking the frontends: %w", err)
	default:
		s = t.reported(ctx, req.Role, s.Roles[req.Role].number())
	}
	row, err := s.row(req.Role)
	if err != nil {
		return Plan{}, err
	}
	p := Plan{Role: req.Role, From: row.Active, To: req.To, Roles: []string{req.Role}, Refused: refused, Residues: []Residue{}}
	if p.Frontends, err = t.Frontends(ctx); err != nil {
		return Plan{}, err
	}
	if row.Request != nil && refused == "" {
		p.Roles = row.Request.Roles
		p.Refused, _ = s.obstacle(row)
		if row.Request.Comparison != nil {
			p.Compared = row.Request.Comparison.Found
		}
		for n, f := range p.Frontends {
			if r, ok := row.Request.Reports[f.ID]; ok {
				p.Frontends[n].Report = &r
			}
		}
	}
	for _, role := range p.Roles {
		row := s.Roles[role]
		p.Residues = append(p.Residues, row.Residues...)
		p.Seen = p.Seen.merge(row.Seen)
	}
	p.Steps = steps(t.opt.Roles[req.Role].Hooks, row.Active, req.To)
	p.Caveats = SwitchRecord{Switch: Switch{To: req.To, Hooks: t.opt.Roles[req.Role].Hooks, Beside: s.beside(p.Roles)}, Role: req.Role, From: row.Active}.Caveats()
	return p, nil
}

// planTimeout bounds a plan's wait for reports, planComparison that for the
// comparison behind it.
const (
	planTimeout    = 6 * time.Second
	planComparison = 40 * time.Second
)

// reported waits for the reports to a plan's request and takes it back. It
// returns the State that has them.
func (t *Table) reported(ctx context.Context, role string, number uint64) *State {
	end := time.NewTimer(planTimeout)
	defer end.Stop()
	defer func() {
		_, _ = t.update(context.WithoutCancel(ctx), func(s *State) error { // else the driver takes it back
			return t.rules.refuse(s, role, number, "", time.Now())
		})
	}()
	comparing := false
	for {
		changed, s := t.Changed(), t.Snapshot()
		row := s.Roles[role]
		if row.number() != number {
			return s
		}
		why, mayPass := s.obstacle(row)
		c := row.Request.Comparison
		compares := t.compares(role) && (c == nil || c.Found == "")
		if !mayPass && len(row.Request.Reports) >= len(s.Frontends) && (why != "" || !compares) {
			return s
		}
		if c != nil && !comparing {
			comparing = true
			end.Reset(planComparison)
		}
		select {
		case <-changed:
		case <-end.C:
			return s
		case <-ctx.Done():
			return s
		case <-t.closing:
			return s
		}
	}
}

// steps are the phases of a switch with these hooks.
func steps(hooks []Hook, from, to string) []PlanStep {
	sw := &Switch{Hooks: hooks}
	does := "new logins and deliveries wait, sessions on " + from + " end in good order, every frontend acks"
	if sw.has(HookProve) {
		does += "; what may still run on " + from + " is looked for by the prove hook"
	}
	list := []PlanStep{{Phase: PhaseHold, Does: does}}
	for p := sw.next(PhaseHold); p != PhaseOpen; p = sw.next(p) {
		do, undo := sw.hooks(p)
		step := PlanStep{Phase: p, Does: "hook " + string(do)}
		switch {
		case sw.has(undo):
			step.Undo = "hook " + string(undo)
		case p == PhasePromote:
			step.Undo = "none: from here on there is no way back"
		}
		list = append(list, step)
	}
	return append(list, PlanStep{Phase: PhaseOpen, Does: to + " serves, waiting logins enter", Undo: "none: switch back instead"})
}
