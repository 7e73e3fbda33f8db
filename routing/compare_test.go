package routing

import (
	"context"
	"errors"
	"reflect"
	"testing"
	"testing/synctest"
	"time"
)

// compareLog plays the comparison before HOLD, and the hooks.
type compareLog struct {
	hookLog
	of      []Seen // whom each comparison was asked for
	inHold  []Seen // whom each catch_up hook was told of
	compare func(ctx context.Context, call HookCall) (Seen, string, error)
	pace    Compared // Users and PerUser of each
}

func (l *compareLog) Compares(role string) bool { return role == "ma01" }

func (l *compareLog) Compare(ctx context.Context, call HookCall) (found Compared, err error) {
	l.of = append(l.of, call.Seen)
	found = l.pace
	found.Found = "all equal"
	if l.compare != nil {
		found.Left, found.Found, err = l.compare(ctx, call)
	}
	return found, err
}

// comparing starts a frontend with a comparison, in a role of which nobody was
// seen yet.
func (h *host) comparing(l *compareLog) *process {
	h.t.Helper()
	l.do = map[Hook]func(HookCall){HookCatchUp: func(c HookCall) { l.inHold = append(l.inHold, c.Seen) }}
	l.site = h.site
	h.dir = newMemDirectory(map[string]string{"alice": "ma01", "bob": "ma01", "early": "ma01", "lags": "ma01", "again": "ma01", "stays": "ma01"})
	c := h.opt.Roles["ma01"]
	c.Hooks, c.Scope = []Hook{HookCatchUp}, ScopeRole
	h.opt.Roles["ma01"], h.opt.Hooks = c, l
	f := h.start("f")
	f.mustSwitch(toB)
	if !l.of[0].All || len(l.inHold) != 1 || !reflect.DeepEqual(l.inHold[0], Seen{}) {
		h.t.Errorf("the first of all: compared %v, in HOLD %v", l.of, l.inHold)
	}
	l.of, l.inHold = nil, nil
	return f
}

var toA = SwitchRequest{Role: "ma01", To: "a", Who: "test", Why: "test"}

func users(names ...string) Seen { return Seen{Users: names} }

// mustSeen asserts whom a list of calls was about.
func mustSeen(t *testing.T, what string, got []Seen, want ...Seen) {
	t.Helper()
	if !reflect.DeepEqual(got, want) {
		t.Errorf("%s: %+v, want %+v", what, got, want)
	}
}

// In HOLD only those are looked at who had a stay since the comparison, or were
// not equal in it.
func TestComparisonBeforeHold(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := newHost(t)
		l := &compareLog{}
		f := h.comparing(l)
		g := h.start("g")
		f.enter("early").Leave(proven)
		g.enter("lags").Leave(proven)
		g.enter("again").Leave(proven)
		stays := g.enter("stays")
		l.compare = func(_ context.Context, call HookCall) (Seen, string, error) {
			if row := f.Snapshot().Roles["ma01"]; row.Phase != PhaseOpen || call.From != "b" || call.To != "a" {
				t.Errorf("compared %s with %s in phase %s", call.From, call.To, row.Phase)
			}
			g.enter("again").Leave(proven)
			go func() {
				<-stays.Revoked()
				stays.Leave(proven)
			}()
			return users("lags"), "1 differs", nil
		}
		f.mustSwitch(toA)
		mustSeen(t, "before HOLD", l.of, users("again", "early", "lags", "stays"))
		mustSeen(t, "in HOLD", l.inHold, users("again", "lags", "stays"))
		if row := f.Snapshot().Roles["ma01"]; !reflect.DeepEqual(row.Seen, Seen{}) {
			t.Errorf("after the switch: %+v", row.Seen)
		}
		if h := f.Snapshot().History; h[len(h)-1].Compared != "1 differs" {
			t.Errorf("the history does not say what was compared: %+v", h[len(h)-1])
		}
		f.stop()
		g.stop()
	})
}

// A switch whose comparison fails does not begin, and forgets nobody.
func TestFailedComparisonRefuses(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := newHost(t)
		l := &compareLog{}
		f := h.comparing(l)
		f.enter("alice").Leave(proven)
		l.compare = func(context.Context, HookCall) (Seen, string, error) {
			return Seen{}, "", errors.New("812 users differ")
		}
		f.mustFail(toA, "preflight: 812 users differ")
		if p, err := f.Plan(t.Context(), toA); err != nil || p.Refused != "preflight: 812 users differ" || p.Compared != "812 users differ" {
			t.Errorf("%+v, %v", p, err)
		}
		if row := f.Snapshot().Roles["ma01"]; row.Epoch != 2 || row.Request != nil {
			t.Errorf("%+v", row)
		}
		l.compare, l.of = nil, nil
		f.mustSwitch(toA)
		mustSeen(t, "before HOLD", l.of, users("alice"))
		f.stop()
	})
}

// A plan compares too, and what it found equal is not looked at again.
func TestPlanCompares(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := newHost(t)
		l := &compareLog{}
		f := h.comparing(l)
		f.enter("alice").Leave(proven)
		l.compare = func(ctx context.Context, _ HookCall) (Seen, string, error) {
			pause(ctx, 20*time.Second)
			return Seen{}, "1 user is equal", ctx.Err()
		}
		if p, err := f.Plan(t.Context(), toA); err != nil || p.Refused != "" || p.Compared != "1 user is equal" {
			t.Errorf("%+v, %v", p, err)
		}
		l.of = nil
		f.enter("bob").Leave(proven)
		f.mustSwitch(toA)
		mustSeen(t, "before HOLD", l.of, users("bob"))
		f.stop()
	})
}

// Work that may run on unseen is looked at in HOLD.
func TestResiduesAreComparedAgain(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := newHost(t)
		l := &compareLog{}
		f := h.comparing(l)
		f.enter("alice").Leave(End{Why: "reset"})
		f.enter("bob").Leave(proven)
		f.mustFail(toA, "alice", "reset")
		f.mustSwitch(clean(toA))
		mustSeen(t, "in HOLD", l.inHold, users()) // the word covers the residue
		f.enter("alice").Leave(End{Why: "reset"})
		h.opt.Hooks = nil
		l.of = nil
		f.mustFail(toB, "reset")
		if row := f.Snapshot().Roles["ma01"]; !reflect.DeepEqual(row.Seen, users("alice")) {
			t.Errorf("%+v", row.Seen)
		}
		f.stop()
	})
}

// An abort ends the comparison; a driver that dies leaves it to the next one.
// Neither loses anybody.
func TestComparisonIsCutShort(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := newHost(t)
		l := &compareLog{}
		f := h.comparing(l)
		f.enter("alice").Leave(proven)
		began := make(chan struct{}, 2)
		l.compare = func(ctx context.Context, _ HookCall) (Seen, string, error) {
			began <- struct{}{}
			<-ctx.Done()
			return Seen{}, "", ctx.Err()
		}
		end := f.goSwitch(toA)
		<-began
		synctest.Wait()
		if row := f.Snapshot().Roles["ma01"]; !reflect.DeepEqual(row.Request.Comparison.Of, users("alice")) || row.Seen.Users != nil {
			t.Errorf("%+v", row)
		}
		if err := f.Abort(t.Context(), AbortRequest{Role: "ma01", Who: "test", Why: "enough"}); err != nil {
			t.Error(err)
		}
		if err := <-end; err == nil {
			t.Error("it switched")
		}
		if row := f.Snapshot().Roles["ma01"]; !reflect.DeepEqual(row.Seen, users("alice")) {
			t.Errorf("after the abort: %+v", row.Seen)
		}
		end = f.goSwitch(toA)
		<-began
		g := h.start("g")
		l.compare, l.of = nil, nil
		synctest.Wait() // it has reported
		g.enter("bob").Leave(proven)
		f.stop()
		<-end
		g.until(func(s *State) bool { return s.Roles["ma01"].Active == "a" && s.Roles["ma01"].Phase == PhaseOpen })
		mustSeen(t, "before HOLD", l.of, users("alice"))
		mustSeen(t, "in HOLD", l.inHold, users("bob"))
		g.stop()
	})
}

// Whoever is inside is compared in HOLD. Are they too many for its time, HOLD does not
// begin.
func TestTooManyInside(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := newHost(t)
		l := &compareLog{}
		f := h.comparing(l)
		g := h.start("g")
		l.pace.PerUser = 4 * f.opt.SwitchBudget / 3
		leaves := func(s *Stay) {
			<-s.Revoked()
			s.Leave(proven)
		}
		for _, user := range []string{"alice", "bob", "stays"} {
			go leaves(f.enter(user))
		}
		go leaves(f.enter("alice"))
		go leaves(g.enter("alice"))
		fourth := f.enter("again")
		f.mustFail(toA, "preflight: 4 users or more are inside", "has time for some 3:")
		if p, err := f.Plan(t.Context(), toA); err != nil || p.Refused == "" {
			t.Errorf("%+v, %v", p, err)
		}
		if row := f.Snapshot().Roles["ma01"]; row.Epoch != 2 || row.Request != nil {
			t.Errorf("%+v", row)
		}
		fourth.Leave(proven)
		f.mustSwitch(toA)
		mustSeen(t, "in HOLD", l.inHold, users("alice", "bob", "stays"))
		f.stop()
		g.stop()
	})
}

// Of everybody it is known how many they are if everybody was compared.
func TestTooManySeen(t *testing.T) {
	for name, test := range map[string]struct {
		c    Comparison
		seen Seen
		want bool
	}{
		"fewer":                {Comparison{Room: 2}, users("a", "b"), false},
		"more":                 {Comparison{Room: 2}, users("a", "b", "c"), true},
		"no pace":              {Comparison{Everybody: 44000}, Seen{All: true}, false},
		"everybody":            {Comparison{Room: 2000, Everybody: 44000}, Seen{All: true}, true},
		"everybody are few":    {Comparison{Room: 2000, Everybody: 300}, Seen{All: true}, false},
		"everybody, who knows": {Comparison{Room: 2000}, Seen{All: true}, false},
	} {
		s := &State{Roles: map[string]Row{"r": {Seen: test.seen}}}
		if why := s.tooMany(&Request{Roles: []string{"r"}, Comparison: &test.c}); (why != "") != test.want {
			t.Errorf("%s: %q", name, why)
		}
	}
}
