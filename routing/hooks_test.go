package routing

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"
)

// hookLog plays hooks: fail says which ones fail, slow which take their time.
type hookLog struct {
	site *memSite
	mu   sync.Mutex
	ran  []Hook
	seen []Phase // the row's phase in the store while the hook ran
	fail map[Hook]error
	slow map[Hook]time.Duration
	do   map[Hook]func(HookCall)
	// ending is how long one takes that is ended; most, how many ran at a time.
	ending        time.Duration
	running, most int
}

func (l *hookLog) Run(ctx context.Context, call HookCall) (string, error) {
	l.mu.Lock()
	l.ran = append(l.ran, call.Hook)
	l.seen = append(l.seen, l.site.get().Roles[call.Roles[0]].Phase)
	d, err, do := l.slow[call.Hook], l.fail[call.Hook], l.do[call.Hook]
	l.running++
	l.most = max(l.most, l.running)
	l.mu.Unlock()
	defer func() {
		l.mu.Lock()
		l.running--
		l.mu.Unlock()
	}()
	if d > 0 && !pause(ctx, d) {
		time.Sleep(l.ending)
		return "", ctx.Err()
	}
	if do != nil {
		do(call)
	}
	return "output of " + string(call.Hook), err
}

// startWith starts a frontend whose role ma01 has these hooks.
func (h *host) startWith(l *hookLog, has ...Hook) *process {
	h.t.Helper()
	l.site = h.site
	c := h.opt.Roles["ma01"]
	c.Hooks, c.Scope = has, ScopeRole
	h.opt.Roles["ma01"], h.opt.Hooks = c, l
	return h.start("f")
}

func TestHooksRunAfterTheirStep(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := newHost(t)
		var l hookLog
		f := h.startWith(&l, AllHooks...)
		f.mustSwitch(toB)
		if !slices.Equal(l.ran, []Hook{HookDemote, HookCatchUp, HookPromote}) ||
			!slices.Equal(l.seen, []Phase{PhaseDemote, PhaseCatchUp, PhasePromote}) {
			t.Errorf("hooks %v ran in phases %v", l.ran, l.seen)
		}
		f.stop()
	})
}

func TestAbortUndoesInReverse(t *testing.T) {
	for name, l := range map[string]*hookLog{
		"fails": {fail: map[Hook]error{HookPromote: errors.New("exit status 1")}},
		"slow":  {slow: map[Hook]time.Duration{HookPromote: time.Hour}},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				h := newHost(t)
				f := h.startWith(l, AllHooks...)
				f.mustFail(toB, "hook promote failed", "a serves on")
				if want := []Hook{HookDemote, HookCatchUp, HookPromote, HookUndoPromote, HookUndoDemote}; !slices.Equal(l.ran, want) {
					t.Errorf("hooks %v, want %v", l.ran, want)
				}
				if want := []Phase{PhaseDemote, PhaseCatchUp, PhasePromote, PhaseAbort, PhaseAbort}; !slices.Equal(l.seen, want) {
					t.Errorf("phases %v, want %v", l.seen, want)
				}
				if row := f.Snapshot().Roles["ma01"]; row.Active != "a" || row.Epoch != 3 {
					t.Errorf("after the abort: %+v", row)
				}
				f.stop()
			})
		})
	}
}

// A driver that has lost the election without noticing ends an undo hook when
// the next one has written down that the phase is undone.
func TestUndoOfALateDriver(t *testing.T) {
	for name, begun := range map[string][]Phase{"nothing is left": nil, "an earlier phase is left": {PhaseDemote}} {
		t.Run(name, func(t *testing.T) {
			d, mine := newDriver(nil), &driving{}
			row := Row{Phase: PhaseAbort, Switch: &Switch{Begun: begun, Hooks: AllHooks}}
			d.hookDone(mine, row, HookUndoPromote)
			want := moveReopen
			if begun != nil {
				want = moveUndo
			}
			if got, what := decideUndo(row, *mine); got != want {
				t.Errorf("the next move is %d %s, want %d", got, what, want)
			}
		})
	}
}

// Without undo_promote a promotion that failed is tried again, not aborted.
func TestPromoteIsResumed(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := newHost(t)
		l := &hookLog{fail: map[Hook]error{HookPromote: errors.New("exit status 1")}}
		tries := 0
		l.do = map[Hook]func(HookCall){HookPromote: func(HookCall) {
			if tries++; tries == 2 {
				delete(l.fail, HookPromote) // the third
			}
		}}
		f := h.startWith(l, HookDemote, HookPromote, HookUndoDemote)
		f.mustSwitch(toB)
		if tries != 3 || slices.Contains(l.ran, HookUndoDemote) {
			t.Errorf("%d tries, hooks %v", tries, l.ran)
		}
		f.stop()
	})
}

// A hook that does not succeed at once but says so is run again within the budget.
func TestHookIsTriedAgain(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := newHost(t)
		l := &hookLog{fail: map[Hook]error{HookCatchUp: fmt.Errorf("%w: lag", ErrTryAgain)}}
		tries := 0
		l.do = map[Hook]func(HookCall){HookCatchUp: func(HookCall) {
			if tries++; tries == 4 {
				delete(l.fail, HookCatchUp)
			}
		}}
		f := h.startWith(l, HookCatchUp)
		f.mustSwitch(toB)
		if tries != 5 {
			t.Errorf("%d tries, want 5", tries)
		}
		l.fail[HookCatchUp] = ErrTryAgain
		began := time.Now()
		f.mustFail(SwitchRequest{Role: "ma01", To: "a"}, "b serves on", "catch-up took too long")
		if took := time.Since(began); took > defaultBudget+time.Second {
			t.Errorf("the abort came after %v", took)
		}
		f.stop()
	})
}

// Safety 4: a residue on the old active is cleared by the hook that stopped it or
// that shows no process; a hook that cannot show it clears nothing.
func TestSafety04HooksClearResidues(t *testing.T) {
	fails, again := map[Hook]error{HookProve: errors.New("exit status 1")}, map[Hook]error{HookProve: ErrTryAgain}
	for name, c := range map[string]struct {
		has    []Hook
		fail   map[Hook]error
		ran    []Hook
		opens  bool
		reason string
	}{
		"prove":                     {[]Hook{HookProve}, nil, []Hook{HookProve}, true, ""},
		"prove cannot":              {[]Hook{HookProve}, fails, []Hook{HookProve}, false, "u may still run on a"},
		"demote":                    {[]Hook{HookDemote}, nil, []Hook{HookDemote}, true, ""},
		"prove cannot, demote":      {[]Hook{HookProve, HookDemote}, fails, []Hook{HookProve, HookDemote}, true, ""},
		"prove tries again, demote": {[]Hook{HookProve, HookDemote}, again, []Hook{HookProve, HookDemote}, true, ""},
		"catch-up only":             {[]Hook{HookCatchUp, HookUndoDemote}, nil, nil, false, "u may still run on a"},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				h := newHost(t)
				l := &hookLog{fail: c.fail}
				f := h.startWith(l, c.has...)
				stay := f.enter("alice")
				go func() {
					<-stay.Revoked()
					stay.Leave(End{Why: "no tagged reply: u may still run on a"})
				}()
				if c.opens {
					f.mustSwitch(toB)
				} else {
					f.mustFail(toB, c.reason)
				}
				if !slices.Equal(l.ran, c.ran) {
					t.Errorf("hooks %v, want %v", l.ran, c.ran)
				}
				f.stop()
			})
		})
	}
}

// An operator's abort ends the hook at work before anything is undone.
func TestAbortEndsTheHookAtWork(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := newHost(t)
		l := &hookLog{slow: map[Hook]time.Duration{HookCatchUp: 10 * time.Second}}
		f := h.startWith(l, HookDemote, HookCatchUp, HookUndoDemote)
		go func() {
			time.Sleep(2 * time.Second)
			if err := f.Abort(t.Context(), AbortRequest{Role: "ma01", Who: "root", Why: "wrong role"}); err != nil {
				t.Error(err)
			}
			if err := f.Abort(t.Context(), AbortRequest{Role: "ma01", Who: "root", Why: "again"}); err == nil {
				t.Error("aborted twice")
			}
		}()
		began := time.Now()
		f.mustFail(toB, "aborted by root: wrong role")
		if want := []Hook{HookDemote, HookCatchUp, HookUndoDemote}; !slices.Equal(l.ran, want) || time.Since(began) > 3*time.Second {
			t.Errorf("hooks %v after %v, want %v after 2s", l.ran, time.Since(began), want)
		}
		f.stop()
	})
}

// A switch that can go neither on nor back waits for the operator, and resumes.
func TestStuckSwitchIsResumed(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := newHost(t)
		l := &hookLog{fail: map[Hook]error{HookPromote: errors.New("exit status 1")}}
		f := h.startWith(l, HookPromote)
		if err := f.Resume(t.Context(), "ma01", "test", ""); err == nil {
			t.Error("resumed what does not exist")
		}
		go func() {
			for f.Snapshot().Roles["ma01"].Switch == nil || f.Snapshot().Roles["ma01"].Switch.Stuck == "" {
				time.Sleep(time.Second)
			}
			tries := len(l.ran)
			time.Sleep(time.Hour)
			if len(l.ran) != tries {
				t.Error("a stuck switch ran a hook")
			}
			if err := f.Abort(t.Context(), AbortRequest{Role: "ma01", Who: "root", Why: ""}); err == nil || !strings.Contains(err.Error(), "no undo_promote") {
				t.Errorf("abort of what has no way back: %v", err)
			}
			delete(l.fail, HookPromote)
			if err := f.Resume(t.Context(), "ma01", "test", ""); err != nil {
				t.Error(err)
			}
		}()
		f.mustSwitch(toB)
		f.stop()
	})
}

// Safety 21: what a hook restarts is switched as one, and no half of it.
func TestSafety21RolesOfABackendAreSwitchedTogether(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := newHost(t)
		h.opt.Roles["ma02"] = RoleConfig{Members: []string{"a", "b"}, Active: "a"}
		h.opt.Roles["ma01"] = RoleConfig{Members: []string{"a", "b"}, Active: "a"}
		l := &hookLog{site: h.site}
		l.do = map[Hook]func(HookCall){HookPromote: func(call HookCall) {
			if !slices.Equal(call.Roles, []string{"ma01", "ma02"}) || !slices.Equal(call.Seen.Users, nil) || !call.Seen.All {
				t.Errorf("the hook got %+v", call)
			}
			for role, row := range h.site.get().Roles {
				if row.Phase != PhasePromote {
					t.Errorf("role %s is in phase %s", role, row.Phase)
				}
			}
		}}
		c := h.opt.Roles["ma01"]
		c.Hooks = AllHooks
		h.opt.Roles["ma01"], h.opt.Hooks = c, l
		f := h.start("f")
		h.site.observe(func(_, now *State) {
			if now.Roles["ma01"].Phase != now.Roles["ma02"].Phase || now.Roles["ma01"].Active != now.Roles["ma02"].Active {
				t.Errorf("one is ahead: %+v", now.Roles)
			}
		})
		f.mustSwitch(toB)
		if len(l.ran) != 3 {
			t.Errorf("hooks %v, want each once", l.ran)
		}
		l.fail = map[Hook]error{HookCatchUp: errors.New("lag")}
		f.mustFail(SwitchRequest{Role: "ma01", To: "a"}, "b serves on")
		for _, role := range []string{"ma01", "ma02"} {
			if row := f.Snapshot().Roles[role]; row.Active != "b" || row.Phase != PhaseOpen {
				t.Errorf("%s: %+v", role, row)
			}
		}
		f.stop()
	})
}

func TestGroup(t *testing.T) {
	var r rules
	config := RoleConfig{Hooks: []Hook{HookDemote}}
	for name, c := range map[string]struct {
		other  Row
		config RoleConfig
		want   string // the group, or part of the conflict
	}{
		"shares the old active":         {Row{Members: []string{"a", "b"}, Active: "a"}, config, "r s"},
		"no hooks":                      {Row{Members: []string{"a", "b"}, Active: "a"}, RoleConfig{}, "r"},
		"hooks for the role only":       {Row{Members: []string{"a", "b"}, Active: "a"}, RoleConfig{Hooks: config.Hooks, Scope: ScopeRole}, "r"},
		"elsewhere":                     {Row{Members: []string{"a", "c"}, Active: "c"}, config, "r"},
		"no copy on the new active":     {Row{Members: []string{"a", "c"}, Active: "a"}, config, "s too, which has no copy on b"},
		"on the new active, is touched": {Row{Members: []string{"b"}, Active: "b"}, config, "b serves role s"},
	} {
		s := table(t)
		s.Roles["s"] = c.other
		group, err := r.group(s, "r", "b", c.config)
		if got := strings.Join(group, " "); err == nil && got != c.want || err != nil && !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: %v, %v; want %s", name, group, err, c.want)
		}
	}
}

// A driver that takes a switch over has only what the first one has left.
func TestSuccessorHasWhatIsLeftOfTheBudget(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := newHost(t)
		l := &hookLog{slow: map[Hook]time.Duration{HookCatchUp: time.Hour}}
		f := h.startWith(l, HookCatchUp)
		g := h.start("g")
		ended := make(chan error, 1)
		began := time.Now()
		go func() {
			_, err := g.Switch(t.Context(), toB, nil)
			ended <- err
		}()
		time.Sleep(12 * time.Second)
		f.stop()
		if err := <-ended; err == nil || time.Since(began) > defaultBudget+2*time.Second {
			t.Errorf("%v after %v", err, time.Since(began))
		}
		g.stop()
	})
}

func TestDecide(t *testing.T) {
	s := table(t)
	mustHold(t, s)
	acked := s.Clone()
	if err := (rules{}).ack(acked, "f.1", "r", 5, handed{}); err != nil {
		t.Fatal(err)
	}
	dirty := s.Clone()
	if err := (rules{}).ack(dirty, "f.1", "r", 5, handed{residues: []Residue{{Backend: "a", User: "u"}}}); err != nil {
		t.Fatal(err)
	}
	hooked := table(t)
	mustHold(t, hooked, HookDemote)
	proving := table(t)
	mustHold(t, proving, HookProve)
	for _, s := range []*State{hooked, proving} {
		if err := (rules{}).ack(s, "f.1", "r", 5, handed{residues: []Residue{{Backend: "a", User: "u"}}}); err != nil {
			t.Fatal(err)
		}
	}
	for _, c := range []struct {
		name            string
		s               *State
		isOver, agesOut bool
		want            move
	}{
		{"acks missing", s, false, true, moveWait},
		{"acks missing, too long", s, true, true, moveAbort},
		{"acked", acked, false, true, moveAdvance},
		{"acked, too late", acked, true, true, moveAbort},
		{"residue for good", dirty, false, false, moveAbort},
		{"residue that ages", dirty, false, true, moveWait},
		{"residue before a demote hook", hooked, false, false, moveAdvance},
		{"residue and a prove hook", proving, false, false, moveRun},
	} {
		d := driving{roles: []string{"r"}}
		if got, why := decide(c.s, d, c.isOver, c.agesOut); got != c.want {
			t.Errorf("%s: move %d (%s), want %d", c.name, got, why, c.want)
		}
	}
	// The word that operators look for, and that `posthouse roles` shows.
	if _, why := decide(dirty, driving{roles: []string{"r"}}, false, false); !strings.HasPrefix(why, "residue: work of u may still run on a") {
		t.Errorf("a residue is in the way, but the switch says %q", why)
	}
}

// A hook that does not mind its deadline may succeed when the time is over. Then it is
// undone, and nothing goes on.
func TestAHookThatEndsTooLate(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := newHost(t)
		var l hookLog
		f := h.startWith(&l, HookDemote, HookCatchUp, HookPromote, HookUndoDemote)
		l.do = map[Hook]func(HookCall){HookCatchUp: func(HookCall) { time.Sleep(f.opt.SwitchBudget) }}
		f.mustFail(toB, "catch-up took too long")
		if !slices.Equal(l.ran, []Hook{HookDemote, HookCatchUp, HookUndoDemote}) || f.Snapshot().Roles["ma01"].Active != "a" {
			t.Errorf("hooks %v ran: %+v", l.ran, f.Snapshot().Roles["ma01"])
		}
		f.stop()
	})
}

// Whoever follows a switch is told of each hook once, the last one too.
func TestHooksAreTold(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := newHost(t)
		l := hookLog{slow: map[Hook]time.Duration{HookDemote: time.Second, HookCatchUp: time.Second, HookPromote: time.Second}}
		f := h.startWith(&l, HookDemote, HookCatchUp, HookPromote)
		var told []string
		_, err := f.Switch(t.Context(), toB, func(e Event) {
			switch e.Kind {
			case EventHook, EventPhase, EventOpened:
				told = append(told, strings.Fields(e.Text + " open")[0])
			}
		})
		want := []string{"demote", "demote", "catch-up", "catch_up", "promote", "promote", "open"} // phases, and hooks behind them
		if err != nil || !slices.Equal(told, want) {
			t.Errorf("told of %q, %v", told, err)
		}
		f.stop()
	})
}
