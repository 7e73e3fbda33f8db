package routing

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"math"
	"math/rand/v2"
	"slices"
	"time"
)

// Backends, hooks and operators of the simulation.

// simBackend records who has work on a backend. simulation.mu guards it.
type simBackend struct {
	isDown bool
	serves map[string]bool      // by partOf: it lets users in
	newest map[string]hookStamp // by partOf, of the hooks that have come here
	visits map[*simVisit]struct{}
}

func newSimBackend() *simBackend {
	return &simBackend{serves: make(map[string]bool), newest: make(map[string]hookStamp), visits: make(map[*simVisit]struct{})}
}

// simVisit is a session as a backend has it: as long as it is there, it may
// have effects.
type simVisit struct {
	user, role, backend string
	store               *simStore     // of the frontend
	over                chan struct{} // closed when the backend has ended it
	isShut              bool
	isGhost             bool // its frontend knows nothing of it any more
}

// whole stands for all roles of a backend.
const whole = ""

// partOf is the part of a backend that a role's hooks act on.
func (s *simulation) partOf(role string) string {
	if s.scope == ScopeBackend {
		return whole
	}
	return role
}

// open lets a session in; nil if the backend does not.
func (s *simulation) open(p *simProcess, stay *Stay) *simVisit {
	s.mu.Lock()
	defer s.mu.Unlock()
	b := s.backends[stay.Backend]
	if b.isDown || !b.serves[s.partOf(stay.Role)] {
		return nil
	}
	v := &simVisit{user: stay.User, role: stay.Role, backend: stay.Backend, store: p.store, over: make(chan struct{})}
	b.visits[v] = struct{}{}
	if s.on[v.user] == nil {
		s.on[v.user] = make(map[string]int)
	}
	s.on[v.user][v.backend]++
	s.noteLocked("%s is on %s by %s in %d", v.user, v.backend, p.host.name, stay.Epoch)
	if len(s.on[v.user]) > 1 {
		s.isTwice = true
		s.faultLocked("%s has work on two backends: %v", v.user, s.on[v.user])
	}
	return v
}

func (s *simulation) shut(v *simVisit) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.shutLocked(v)
}

func (s *simulation) shutLocked(v *simVisit) {
	if v.isShut {
		return
	}
	v.isShut = true
	close(v.over)
	delete(s.backends[v.backend].visits, v)
	if s.on[v.user][v.backend]--; s.on[v.user][v.backend] == 0 {
		delete(s.on[v.user], v.backend)
	}
	s.noteLocked("%s has left %s", v.user, v.backend)
}

// haunt lets the work of a session go on for d, that nobody sees any more.
func (s *simulation) haunt(v *simVisit, d time.Duration) {
	s.mu.Lock()
	defer s.mu.Unlock()
	v.isGhost = true
	if !v.isShut {
		s.noteLocked("work of %s on %s goes on for %v", v.user, v.backend, d)
	}
	s.running.Go(func() {
		timer := time.NewTimer(d)
		defer timer.Stop()
		select {
		case <-v.over:
		case <-timer.C:
			s.shut(v)
		}
	})
}

// clearLocked ends all that users do on a part of a backend.
func (s *simulation) clearLocked(backend, part string) {
	for v := range s.backends[backend].visits {
		if part == whole || v.role == part {
			s.shutLocked(v)
		}
	}
}

// simHooks are a site's programs, run by one frontend.
type simHooks struct {
	p    *simProcess
	dice *rand.Rand
}

// hookStamp orders hooks: the programs keep the highest on each backend's host
// and refuse what is older (safety 17).
type hookStamp struct {
	number  uint64
	attempt int
	step    int
}

var errSimHook = errors.New("exit status 1")

func (h *simHooks) Run(ctx context.Context, call HookCall) (string, error) {
	s := h.p.host.s
	s.mu.Lock()
	took, fate, isLate := upTo(h.dice, 2*time.Second), h.dice.IntN(12), upTo(h.dice, 10*time.Second)
	s.mu.Unlock()
	isWell := s.isWell()
	if fate == 0 && !isWell {
		took = time.Hour // ssh hangs
	}
	if !pause(ctx, took) || !h.p.awake(ctx) {
		s.running.Go(func() { // what has reached the backend's host goes on
			time.Sleep(isLate)
			s.note("orphan %s of switch %d: %v", call.Hook, call.Number, s.work(call))
		})
		return "", ctx.Err()
	}
	err := errSimHook
	switch {
	case isWell || fate > 4:
		err = s.work(call)
	case fate == 1:
	case fate == 2:
		_ = s.work(call)
	default:
		err = ErrTryAgain
	}
	s.note("hook %s of switch %d %v, attempt %d: %v", call.Hook, call.Number, call.Roles, call.Attempt, err)
	return "", err
}

// isWell says whether the time of faults is over.
func (s *simulation) isWell() bool { return time.Since(s.begun) > simFaults }

// work is what a hook does at the backends.
func (s *simulation) work(call HookCall) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	steps := []Hook{HookProve, HookDemote, HookFence, HookCatchUp, HookPromote, HookUndoPromote, HookUndoDemote, HookRejoin}
	stamp := hookStamp{call.Number, call.Attempt, slices.Index(steps, call.Hook)}
	if call.Hook == HookRejoin { // it has the number of the failover
		call.From, stamp.attempt = "", math.MaxInt
	}
	on := call.From
	if call.Hook == HookPromote || call.Hook == HookUndoPromote || call.Hook == HookRejoin {
		on = call.To
	}
	if s.backends[on].isDown && call.Hook != HookFence {
		return fmt.Errorf("%s is down", on)
	}
	for _, part := range s.partsOf(call.Roles) {
		for _, name := range []string{call.From, call.To} {
			b := s.backends[name]
			switch {
			case b == nil || b.isDown && name != on:
			case compareStamps(stamp, b.newest[part]) < 0:
				return errors.New("an older attempt")
			default:
				b.newest[part] = stamp
			}
		}
		switch call.Hook {
		case HookDemote, HookFence, HookUndoPromote, HookRejoin:
			s.hitsLocked(on, call)
			s.backends[on].serves[part] = false
			s.clearLocked(on, part)
		case HookPromote, HookUndoDemote:
			s.backends[on].serves[part] = true
		case HookProve:
			for v := range s.backends[on].visits {
				if slices.Contains(call.Roles, v.role) && s.partOf(v.role) == part {
					return fmt.Errorf("%w: %s runs there", ErrTryAgain, v.user)
				}
			}
		}
	}
	return nil
}

// partsOf are the parts of a backend that the hooks of roles act on.
func (s *simulation) partsOf(roles []string) []string {
	if s.scope == ScopeBackend {
		return []string{whole}
	}
	return roles
}

// hitsLocked notes that a hook stops a backend under users whose roles it was not
// called for (safety 21).
func (s *simulation) hitsLocked(backend string, call HookCall) {
	for v := range s.backends[backend].visits {
		if s.scope == ScopeBackend && !v.isGhost && !slices.Contains(call.Roles, v.role) {
			s.faultLocked("%s of switch %d, for %v, hits %s of role %s on %s", call.Hook, call.Number, call.Roles, v.user, v.role, backend)
			return
		}
	}
}

func compareStamps(a, b hookStamp) int {
	return cmp.Or(cmp.Compare(a.number, b.number), cmp.Compare(a.attempt, b.attempt), cmp.Compare(a.step, b.step))
}

func (s *simulation) reach(_ context.Context, backend string) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.backends[backend].isDown {
		return errors.New("no route to host")
	}
	return nil
}

// troubleSite takes the store and backends down for a while, and makes two
// drivers, until ctx ends; then all are up.
func (s *simulation) troubleSite(ctx context.Context) {
	dice := s.dice("trouble")
	for pause(ctx, upTo(dice, 25*time.Second)) {
		switch dice.IntN(3) {
		case 0:
			s.note("the store is away")
			s.cluster.setAway(true)
			pause(ctx, upTo(dice, 15*time.Second))
			s.cluster.setAway(false)
			s.note("the store is back")
		case 1:
			s.cluster.usurp()
		case 2:
			s.breakBackend(ctx, []string{"a", "b", "c"}[dice.IntN(3)], upTo(dice, 20*time.Second))
		}
	}
}

// breakBackend ends all that runs on a backend. Before it is up again it looks
// where it is active still, and serves nobody else (safety 22); it stays off
// while a failover counts on that.
func (s *simulation) breakBackend(ctx context.Context, name string, d time.Duration) {
	s.note("%s is down", name)
	s.mu.Lock()
	b := s.backends[name]
	b.isDown = true
	s.clearLocked(name, whole)
	s.mu.Unlock()
	pause(ctx, d)
	s.running.Go(func() {
		for !s.revive(name) {
			if time.Since(s.begun) > simFaults+simRecovery { // that failover does not end
				return
			}
			time.Sleep(time.Second)
		}
		s.note("%s is up", name)
	})
}

func (s *simulation) revive(name string) bool {
	rows := s.cluster.site.get().Roles
	for _, row := range rows {
		if row.Switch != nil && row.Switch.AcceptLoss && row.Active == name && row.Phase != PhaseAbort {
			return false
		}
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	serves := make(map[string]bool)
	for role, row := range rows {
		part := s.partOf(role)
		serves[part] = serves[part] || row.Stale[name].Number == 0 || row.Active == name
	}
	for part, is := range serves {
		s.backends[name].serves[part] = s.backends[name].serves[part] && is
	}
	s.backends[name].isDown = false
	return true
}

// simWord is, in a context, what an operator gives the word for: looked at when
// the store commits what goes by it.
type simWord struct{}

// gives returns a context in which what is committed needs to be true.
func gives(ctx context.Context, word func(now *State) error) context.Context {
	return context.WithValue(ctx, simWord{}, word)
}

// looksOff says whether the active of a role is down.
func (s *simulation) looksOff(now *State, role string) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if !s.backends[now.Roles[role].Active].isDown {
		return errors.New("the active is up")
	}
	return nil
}

// looksClean says whether no work is left in a role of which no registered
// frontend knows.
func (s *simulation) looksClean(now *State, role string) error {
	registered := make(map[*simStore]bool)
	for id := range now.Frontends {
		registered[s.cluster.owner(id)] = true
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, b := range s.backends {
		for v := range b.visits {
			if v.role == role && (v.isGhost || !registered[v.store] || v.store.proc.life.Err() != nil) {
				return fmt.Errorf("work of %s runs on %s", v.user, v.backend)
			}
		}
	}
	return nil
}

// operator asks for switches and failovers, and meddles with them, until ctx
// ends.
func (s *simulation) operator(ctx context.Context) {
	dice := s.dice("operator")
	for pause(ctx, upTo(dice, 10*time.Second)) {
		p, role := s.anyProcess(dice), []string{"ma01", "ma02"}[dice.IntN(2)]
		members := s.opt.Roles[role].Members
		to, verb := members[dice.IntN(len(members))], dice.IntN(12)
		if p != nil {
			s.running.Go(func() { s.operate(p, role, to, verb) })
		}
	}
}

func (s *simulation) operate(p *simProcess, role, to string, verb int) {
	ctx, cancel := context.WithTimeout(p.life, 40*time.Second)
	defer cancel()
	var err error
	what := "switch"
	switch verb {
	default:
		_, err = p.table.Switch(ctx, SwitchRequest{Role: role, To: to, Who: "operator"}, nil)
	case 1:
		what = "abort"
		err = p.table.Abort(ctx, AbortRequest{Role: role, Who: "operator", Why: "no reason"})
	case 2:
		what = "plan"
		_, err = p.table.Plan(ctx, SwitchRequest{Role: role, To: to})
	case 3:
		what = "resume"
		err = p.table.Resume(ctx, role, "operator", "")
	case 4, 5:
		what = "failover"
		s.mu.Lock()
		isOff := s.backends[p.table.Snapshot().Roles[role].Active].isDown
		s.mu.Unlock()
		if isOff {
			ctx = gives(ctx, func(now *State) error { return s.looksOff(now, role) })
		}
		if isOff || slices.Contains(s.opt.Roles[role].Hooks, HookFence) {
			_, err = p.table.Failover(ctx, FailoverRequest{Role: role, To: to, Who: "operator", AcceptLoss: isOff}, nil)
		}
	case 6:
		what = "rejoin"
		_, err = p.table.Rejoin(ctx, RejoinRequest{Role: role, Member: to})
	case 7, 8:
		s.settle(ctx, p)
		return
	}
	s.note("operator by %s: %s of %s to %s: %v", p.host.name, what, role, to, err)
}

// settle does what an operator has to see to: fence frontends that are down for
// good, resume what is stuck, look whether anything runs.
func (s *simulation) settle(ctx context.Context, p *simProcess) {
	now := p.table.Snapshot()
	for id := range now.Frontends {
		if st := s.cluster.owner(id); st != nil && st.proc.life.Err() != nil {
			s.note("operator: fence %s: %v", id, p.table.FenceFrontend(ctx, id, "operator", ""))
		}
	}
	for role, row := range now.Roles {
		if row.Switch != nil && row.Switch.Stuck != "" {
			s.note("operator: resume %s: %v", role, p.table.Resume(ctx, role, "operator", ""))
		}
		if len(row.Residues) > 0 && s.opt.ResidueMaxAge == 0 {
			s.note("operator: %s is clean: %v", role, p.table.ConfirmClean(gives(ctx, func(now *State) error { return s.looksClean(now, role) }), role))
		}
	}
}

// recovers waits until every role is open and lets users in everywhere, and can
// be switched.
func (s *simulation) recovers() {
	ended := time.Now().Add(simRecovery)
	why, switched := "", map[string]bool{"ma01": false, "ma02": false}
	for time.Now().Before(ended) {
		p := s.hosts[0].newest()
		ctx, cancel := context.WithTimeout(p.life, time.Minute)
		s.settle(ctx, p)
		why = s.unwell(ctx)
		if role := roleLeft(switched); why == "" && role != "" {
			why = s.switchOnce(ctx, p, role)
			switched[role] = why == ""
		}
		cancel()
		if why == "" && roleLeft(switched) == "" {
			return
		}
		time.Sleep(2 * time.Second)
	}
	s.fault("not well %v after the last fault: %s", simRecovery, why)
}

func roleLeft(switched map[string]bool) string {
	for _, role := range sortedKeys(switched) {
		if !switched[role] {
			return role
		}
	}
	return ""
}

// switchOnce switches a role to a member that may become active, if there is
// one, and says what is in the way.
func (s *simulation) switchOnce(ctx context.Context, p *simProcess, role string) string {
	now := s.cluster.site.get()
	why := ""
	for _, to := range now.Roles[role].Members {
		group, err := (rules{}).group(now, role, to, s.opt.Roles[role])
		if err != nil || to == now.Roles[role].Active || slices.ContainsFunc(group, func(with string) bool { return now.Roles[with].Stale[to].Number != 0 }) {
			continue // not a matter of time
		}
		_, err = p.table.Switch(ctx, SwitchRequest{Role: role, To: to, Who: "operator"}, nil)
		s.note("operator: switch of %s to %s: %v", role, to, err)
		if err == nil {
			return ""
		}
		why = err.Error()
	}
	return why
}

// unwell says what is not as it should be.
func (s *simulation) unwell(ctx context.Context) string {
	now := s.cluster.site.get()
	for _, name := range sortedKeys(s.opt.Backends) {
		if s.reach(ctx, name) != nil {
			return name + " is down"
		}
	}
	for role, row := range now.Roles {
		if row.Phase != PhaseOpen || row.Request != nil {
			return fmt.Sprintf("role %s is in phase %s, %+v, request %v", role, row.Phase, row.Switch, row.Request)
		}
	}
	for _, h := range s.hosts {
		p := h.newest()
		if _, is := now.Frontends[p.table.ID()]; !is {
			return p.table.ID() + " is not registered"
		}
		for _, user := range []string{"alice", "carol"} {
			stay, err := p.table.Enter(ctx, user)
			if err != nil {
				return fmt.Sprintf("%s cannot enter by %s: %v", user, h.name, err)
			}
			stay.Leave(End{Proven: true})
		}
	}
	return ""
}
