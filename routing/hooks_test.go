package routing

import (
	"context"
	"errors"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"
)

// hookLog plays hooks: fail says which ones fail.
type hookLog struct {
	ran  []Hook
	seen []Phase // the row's phase in the store while the hook ran
	fail map[Hook]error
	slow map[Hook]time.Duration
}

func (l *hookLog) hooks(site *memSite, has func(Hook) bool) hooks {
	return hooks{has: has, run: func(ctx context.Context, h Hook, role string, _ Row) error {
		l.ran = append(l.ran, h)
		l.seen = append(l.seen, site.get().Roles[role].Phase)
		if d := l.slow[h]; d > 0 && !pause(ctx, d) {
			return ctx.Err()
		}
		return l.fail[h]
	}}
}

// startWith starts a frontend that has hooks before it can drive anything.
func (h *host) startWith(hk hooks) *process {
	h.t.Helper()
	h.site.driving <- struct{}{}
	p := h.start("f")
	p.hooks = hk
	<-h.site.driving
	return p
}

func TestHooksRunAfterTheirStep(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := newHost(t)
		var l hookLog
		f := h.startWith(l.hooks(h.site, allHooks))
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
				f := h.startWith(l.hooks(h.site, allHooks))
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
		hk := l.hooks(h.site, func(h Hook) bool { return h != HookUndoPromote })
		run := hk.run
		hk.run = func(ctx context.Context, hook Hook, role string, row Row) error {
			if hook == HookPromote {
				if tries++; tries == 3 {
					delete(l.fail, HookPromote)
				}
			}
			return run(ctx, hook, role, row)
		}
		f := h.startWith(hk)
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
	if err := (rules{}).ack(acked, "f.1", "r", 5, nil); err != nil {
		t.Fatal(err)
	}
	dirty := s.Clone()
	if err := (rules{}).ack(dirty, "f.1", "r", 5, []Residue{{Backend: "a", User: "u"}}); err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		name            string
		s               *State
		isOver, agesOut bool
		has             func(Hook) bool
		want            move
	}{
		{"acks missing", s, false, true, noHooks, moveWait},
		{"acks missing, too long", s, true, true, noHooks, moveAbort},
		{"acked", acked, false, true, noHooks, moveAdvance},
		{"acked, with hooks", acked, false, true, allHooks, moveAdvance},
		{"acked, too late", acked, true, true, noHooks, moveAbort},
		{"residue for good", dirty, false, false, noHooks, moveAbort},
		{"residue that ages", dirty, false, true, noHooks, moveWait},
		{"residue before a demote hook", dirty, false, false, allHooks, moveAdvance},
	} {
		if got, why := decide(c.s, "r", driving{}, c.isOver, c.agesOut, c.has); got != c.want {
			t.Errorf("%s: move %d (%s), want %d", c.name, got, why, c.want)
		}
	}
	// The word that operators look for, and that `posthouse roles` shows.
	if _, why := decide(dirty, "r", driving{}, false, false, noHooks); !strings.HasPrefix(why, "residue: work of u may still run on a") {
		t.Errorf("a residue is in the way, but the switch says %q", why)
	}
}
