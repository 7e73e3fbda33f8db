package routing

import (
	"context"
	"errors"
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
}

func (l *hookLog) Run(ctx context.Context, call HookCall) (string, error) {
	l.mu.Lock()
	l.ran = append(l.ran, call.Hook)
	l.seen = append(l.seen, l.site.get().Roles[call.Roles[0]].Phase)
	d, err, do := l.slow[call.Hook], l.fail[call.Hook], l.do[call.Hook]
	l.mu.Unlock()
	if d > 0 && !pause(ctx, d) {
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
