package routing

import (
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"
)

// table is a State with one role on a, two members more, and one frontend.
func table(t *testing.T) *State {
	t.Helper()
	s := emptyState()
	s.Roles["r"] = Row{Members: []string{"a", "b", "c"}, Active: "a", Epoch: 4, Phase: PhaseOpen}
	if err := (rules{}).register(s, "f.1", Frontend{Backends: []string{"a", "b"}}); err != nil {
		t.Fatal(err)
	}
	return s
}

func mustHold(t *testing.T, s *State, hooks ...Hook) {
	t.Helper()
	if err := (rules{}).hold(s, []string{"r"}, order{to: "b", who: "who", why: "why", hooks: hooks}, explorerTime); err != nil {
		t.Fatal(err)
	}
}

// A refusal is one case of a rule that refuses, or allows.
type refusal struct {
	name    string
	prepare func(*State)
	rule    func(*State) error
	want    string // "": allowed
}

func refusals(t *testing.T, r rules) []refusal {
	now := explorerTime
	hold := func(role, to string, confirmed bool) func(*State) error {
		return func(s *State) error {
			if confirmed {
				s.clean([]string{role})
			}
			return r.hold(s, []string{role}, order{to: to}, now)
		}
	}
	residue := func(s *State) {
		row := s.Roles["r"]
		row.Residues = []Residue{{Backend: "a", User: "u"}}
		s.Roles["r"] = row
	}
	stale := func(s *State) {
		row := s.Roles["r"]
		row.Stale, row.Doubt = map[string]Stale{"b": {Number: 1}}, &Doubt{Known: 4}
		s.Roles["r"] = row
	}
	rejoins := func(scope Scope) func(*State) {
		return func(s *State) {
			s.Roles["q"] = Row{Members: []string{"a", "b"}, Active: "a", Epoch: 1, Phase: PhaseOpen, Stale: map[string]Stale{"b": {Number: 1}}}
			if _, err := (rules{}).rejoining(s, "q", "b", "f.1", scope); err != nil {
				t.Fatal(err)
			}
		}
	}
	asks := func(s *State) {
		if err := (rules{}).request(s, []string{"r"}, order{to: "b"}, false, now); err != nil {
			t.Fatal(err)
		}
	}
	failover := func(to string, o order) func(*State) error {
		return func(s *State) error {
			o.to = to
			return r.failover(s, []string{"r"}, o, now)
		}
	}
	elsewhere := func(s *State) { // q is switched from c to b
		s.Roles["q"] = Row{Members: []string{"b", "c"}, Active: "c", Epoch: 2, Phase: PhaseHold,
			Switch: &Switch{Number: 7, To: "b", Roles: []string{"q"}, Hooks: []Hook{HookDemote}}}
	}
	promotes := func(s *State) {
		mustHold(t, s)
		row := s.Roles["r"]
		row.Phase, row.Switch.Begun = PhasePromote, []Phase{PhasePromote}
		s.Roles["r"] = row
	}
	return []refusal{
		{"hold", nil, hold("r", "b", false), ""},
		{"hold: unknown role", nil, hold("x", "b", false), "no role"},
		{"hold: to itself", nil, hold("r", "a", false), "active already"},
		{"hold: to a stranger", nil, hold("r", "z", false), "not one of a, b, c"},
		{"hold: frontend without it", nil, hold("r", "c", false), "f.1 has no backend c"},
		{"hold: twice", func(s *State) { mustHold(t, s) }, hold("r", "b", false), "in phase hold"},
		{"hold: residue", residue, hold("r", "b", false), "u may still run on a"},
		{"hold: residue, confirmed", residue, hold("r", "b", true), ""},
		{"hold: doubt", func(s *State) { r.markDoubt(s, "r", Row{Epoch: 9}, "f.1", "went back", now) }, hold("r", "b", false), "roles init"},
		{"open: no ack", func(s *State) { mustHold(t, s) },
			func(s *State) error { return r.advance(s, "r", PhaseHold, now) }, "f.1"},
		{"demote: no ack", func(s *State) { mustHold(t, s, AllHooks...) },
			func(s *State) error { return r.advance(s, "r", PhaseHold, now) }, "f.1"},
		{"open: not switched", nil, func(s *State) error { return r.open(s, "r", now) }, "its phase is open"},
		{"abort: not switched", nil, func(s *State) error { return r.abort(s, "r", "", now) }, "is open"},
		{"ack: of an open role", nil, func(s *State) error { return r.ack(s, "f.1", "r", 4, handed{}) }, "no ack of 4"},
		{"ack: of another epoch", func(s *State) { mustHold(t, s) }, func(s *State) error { return r.ack(s, "f.1", "r", 4, handed{}) }, "no ack of 4"},
		{"ack: by a stranger", func(s *State) { mustHold(t, s) }, func(s *State) error { return r.ack(s, "f.2", "r", 5, handed{}) }, "not registered"},
		{"register: twice", nil, func(s *State) error { return r.register(s, "f.1", Frontend{}) }, "never reused"},
		{"members: without the active", nil, func(s *State) error { return r.setMembers(s, "r", []string{"b", "c"}) }, "its active a"},
		{"members: in a switch", func(s *State) { mustHold(t, s) }, func(s *State) error { return r.setMembers(s, "r", []string{"a", "b"}) }, "while it is switched"},
		{"members: fewer", nil, func(s *State) error { return r.setMembers(s, "r", []string{"a", "b"}) }, ""},
		{"init: not in doubt", nil, func(s *State) error { return r.initRole(s, "r", order{to: "b", who: ""}, nil, 0, now) }, "posthouse switch"},
		{"init: stale", stale, func(s *State) error { return r.initRole(s, "r", order{to: "b"}, nil, 0, now) }, "--accept-stale"},
		{"init: stale, accepted", stale, func(s *State) error {
			return r.initRole(s, "r", order{to: "b", acceptStale: true}, nil, 0, now)
		}, ""},
		{"init: under a switch's hooks", func(s *State) { mustHold(t, s, HookDemote) }, func(s *State) error {
			return r.initRole(s, "new", order{to: "a"}, []string{"a"}, 0, now)
		}, "may restart what both use"},
		{"init: no member", nil, func(s *State) error { return r.initRole(s, "new", order{to: "z", who: ""}, []string{"a"}, 0, now) }, "not one of a"},
		{"hold: where another role rejoins", rejoins(ScopeBackend), hold("r", "b", false), "frontend f.1 makes b a copy of the active of role q"},
		{"hold: where another role rejoins by itself", rejoins(ScopeRole), hold("r", "b", false), ""},
		{"take up: ended", nil, func(s *State) error { return r.takeUp(s, "r", 1, "d") }, "has ended"},
		{"hold: another is asked for", asks, hold("r", "b", false), "is being prepared"},
		{"failover: no proof", nil, failover("b", order{}), "--accept-loss"},
		{"failover: loss accepted", nil, failover("b", order{acceptLoss: true}), ""},
		{"failover: under another switch's hooks", elsewhere, failover("b", order{acceptLoss: true}), "may restart what both use"},
		{"failover: of all that are switched", elsewhere, func(s *State) error {
			return r.failover(s, []string{"r", "q"}, order{to: "b", acceptLoss: true}, now)
		}, ""},
		{"failover: another is being promoted", promotes, failover("c", order{acceptLoss: true}), "has begun to promote b"},
	}
}

func TestRulesRefuse(t *testing.T) {
	for _, c := range refusals(t, rules{}) {
		err := c.try(t)
		switch {
		case c.want == "" && err != nil:
			t.Errorf("%s: %v", c.name, err)
		case c.want != "" && (!errors.Is(err, ErrConflict) || !strings.Contains(err.Error(), c.want)):
			t.Errorf("%s: %v, want a conflict with %q", c.name, err, c.want)
		}
	}
}

func (c refusal) try(t *testing.T) error {
	s := table(t)
	if c.prepare != nil {
		c.prepare(s)
	}
	return c.rule(s.Clone())
}

// Every guard is needed: without it a rule does not refuse what it must, or the
// explorer finds a fault.
func TestEveryGuardIsMissed(t *testing.T) {
	var names []string
	for _, g := range slices.Concat(openGuards, advanceGuards, holdGuards, failoverGuards, initGuards) {
		names = append(names, g.name)
	}
	for _, g := range slices.Concat(admitGuards, ackGuards) {
		names = append(names, g.name)
	}
	slices.Sort(names)
	for _, name := range slices.Compact(names) {
		missed := slices.ContainsFunc(mutations(), func(m mutation) bool { return m.rule == name })
		for _, c := range refusals(t, rules{without: name}) {
			err := c.try(t)
			missed = missed || c.want != "" && (err == nil || !strings.Contains(err.Error(), c.want))
		}
		if !missed {
			t.Errorf("%q: nobody misses it", name)
		}
	}
}

func TestNoWayBackFromPromote(t *testing.T) {
	var r rules
	for _, c := range []struct {
		hooks []Hook
		want  bool
	}{
		{[]Hook{HookPromote}, false},
		{[]Hook{HookPromote, HookUndoDemote}, false},
		{[]Hook{HookPromote, HookUndoPromote}, true},
	} {
		s := table(t)
		mustHold(t, s, c.hooks...)
		if err := errors.Join(r.ack(s, "f.1", "r", 5, handed{}), r.advance(s, "r", PhaseHold, explorerTime)); err != nil {
			t.Fatal(err)
		}
		if got := s.Roles["r"].Phase; got != PhasePromote {
			t.Fatalf("phase %s, want promote: phases without a hook are skipped", got)
		}
		if err := r.abort(s, "r", "", explorerTime); (err == nil) != c.want {
			t.Errorf("abort = %v, want allowed: %v", err, c.want)
		}
	}
}

func TestHistoryIsBounded(t *testing.T) {
	var r rules
	s := table(t)
	for i := range historyLimit + 5 {
		mustHold(t, s)
		if err := errors.Join(r.abort(s, "r", fmt.Sprint(i), explorerTime), r.reopen(s, "r", explorerTime)); err != nil {
			t.Fatal(err)
		}
	}
	if len(s.History) != historyLimit || s.History[historyLimit-1].Number != historyLimit+5 {
		t.Errorf("%d records, the last is %d", len(s.History), s.History[len(s.History)-1].Number)
	}
	if row := s.Roles["r"]; row.Epoch != 4+2*(historyLimit+5) || row.Active != "a" {
		t.Errorf("after all the aborts: %+v", row)
	}
}

func TestInitRoleIsAboveEverythingKnown(t *testing.T) {
	var r rules
	s := table(t)
	f := s.Frontends["f.1"]
	f.Floors["r"] = 11
	for _, c := range []struct{ doubt, known, want uint64 }{{7, 0, 12}, {20, 0, 21}, {7, 30, 31}} {
		s := s.Clone()
		if err := r.markDoubt(s, "r", Row{Epoch: c.doubt, Residues: []Residue{{Backend: "a"}}}, "f.1", "went back", explorerTime); err != nil {
			t.Fatal(err)
		}
		if err := r.initRole(s, "r", order{to: "b", who: "who"}, nil, c.known, explorerTime); err != nil {
			t.Fatal(err)
		}
		row := s.Roles["r"]
		if row.Epoch != c.want || row.Phase != PhaseHold || row.Doubt != nil || len(row.Residues) != 1 {
			t.Errorf("known %d and %d: %+v, want a hold in epoch %d", c.doubt, c.known, row, c.want)
		}
		if err := r.abort(s, "r", "", explorerTime); err == nil {
			t.Error("there is nothing to abort to")
		}
	}
}

func TestMerge(t *testing.T) {
	row := func(epoch uint64, active string, phase Phase) Row {
		return Row{Members: []string{"a", "b"}, Active: active, Epoch: epoch, Phase: phase}
	}
	state := func(revision uint64, r Row) *State {
		s := emptyState()
		s.Revision = revision
		s.Roles["r"] = r
		return s
	}
	doubted := row(3, "a", PhaseOpen)
	doubted.Doubt = &Doubt{Known: 7}
	behind := row(6, "a", PhaseOpen)
	for _, c := range []struct {
		name        string
		kept, fresh *State
		active      string // in the view
		isDoubt     bool   // in the view
		marks       bool   // to be written into the store
	}{
		{"nothing kept", nil, state(5, row(3, "a", PhaseOpen)), "a", false, false},
		{"nothing kept, doubt", nil, state(5, doubted), "", true, false},
		{"newer", state(5, row(3, "a", PhaseOpen)), state(6, row(4, "b", PhaseOpen)), "b", false, false},
		{"epoch back", state(5, row(7, "b", PhaseOpen)), state(6, row(3, "a", PhaseOpen)), "b", true, true},
		{"epoch back, marked", state(5, row(7, "b", PhaseOpen)), state(6, doubted), "b", true, false},
		{"marked, and we know less", state(5, behind), state(6, doubted), "", true, false},
		{"phase back", state(5, row(7, "b", PhaseOpen)), state(6, row(7, "a", PhasePromote)), "b", true, true},
		{"other active", state(5, row(7, "b", PhaseOpen)), state(6, row(7, "a", PhaseOpen)), "b", true, true},
		{"revision back", state(9, row(3, "a", PhaseOpen)), state(6, row(3, "a", PhaseOpen)), "a", true, true},
		{"revision back, and decided", state(9, row(3, "a", PhaseOpen)), state(6, row(4, "b", PhaseOpen)), "b", false, false},
		{"role lost", state(5, row(7, "b", PhaseOpen)), emptyState(), "b", true, true},
		{"decided", state(5, row(7, "b", PhaseOpen)), state(6, row(8, "a", PhaseOpen)), "a", false, false},
	} {
		view, doubts := merge(c.kept, c.fresh)
		got := view.Roles["r"]
		if got.Active != c.active || (got.Doubt != nil) != c.isDoubt || (len(doubts) > 0) != c.marks {
			t.Errorf("%s: %+v (doubt %+v), to mark: %v", c.name, got, got.Doubt, doubts)
		}
		// What is not marked yet is not forgotten with the next read.
		again, doubts := merge(view, c.fresh)
		if (len(doubts) > 0) != c.marks || again.Roles["r"].Active != c.active {
			t.Errorf("%s, read again: %+v, to mark: %v", c.name, again.Roles["r"], doubts)
		}
	}
}

func TestResiduesMerge(t *testing.T) {
	at := func(s int) time.Time { return explorerTime.Add(time.Duration(s) * time.Second) }
	got := mergeResidues([]Residue{{Backend: "a", User: "u", Since: at(1)}, {Backend: "b", User: "u", Since: at(5)}},
		[]Residue{{Backend: "a", User: "u", Since: at(3)}, {Backend: "b", User: "u", Since: at(2)}, {Backend: "a", Since: at(4)}})
	if len(got) != 3 || !got[0].Since.Equal(at(3)) || !got[1].Since.Equal(at(5)) {
		t.Errorf("%+v", got)
	}
}

func TestResidueTextIsShort(t *testing.T) {
	var rest []Residue
	for i := range 5000 {
		rest = append(rest, Residue{Backend: "a", User: fmt.Sprint("u", i)})
	}
	if text := residueText("r", rest); len(text) > 1000 || !strings.Contains(text, "4995 more") {
		t.Error(text)
	}
}

// Who is decided anew leaves no request behind in the roles that were to be
// switched with it.
func TestInitRoleEndsItsRequest(t *testing.T) {
	s, r := table(t), rules{}
	s.Roles["q"] = Row{Members: []string{"a", "b"}, Active: "a", Epoch: 1, Phase: PhaseOpen}
	if err := errors.Join(r.request(s, []string{"r", "q"}, order{to: "b"}, false, explorerTime),
		r.markDoubt(s, "r", Row{Epoch: 9}, "f.1", "went back", explorerTime),
		r.initRole(s, "r", order{to: "a"}, nil, 9, explorerTime)); err != nil {
		t.Fatal(err)
	}
	if s.Roles["r"].Request != nil || s.Roles["q"].Request != nil {
		t.Errorf("%+v", s.Roles)
	}
}

// Of two switches the later one may end first: both ends are told.
func TestEndsAreToldInAnyOrder(t *testing.T) {
	first, second := emptyState(), emptyState()
	first.History = []SwitchRecord{{Role: "r", Switch: Switch{Number: 3}, Done: true, Epochs: map[string]uint64{"r": 2}}}
	second.History = append(slices.Clone(first.History),
		SwitchRecord{Role: "q", Switch: Switch{Number: 2}, Done: true, Epochs: map[string]uint64{"q": 2}})
	events := changes(first, second)
	if len(events) != 1 || events[0].Kind != EventOpened || events[0].Role != "q" {
		t.Errorf("%+v", events)
	}
}

// What a switch could not promise is in its record: here, an unclean drain.
func TestRecordSaysWhatIsUncertain(t *testing.T) {
	s, r := table(t), rules{}
	s.Roles["q"] = Row{Members: []string{"a", "b"}, Active: "a", Epoch: 1, Phase: PhaseOpen}
	mustHold(t, s, HookDemote, HookCatchUp)
	hand := handed{residues: []Residue{{Backend: "a", User: "u"}, {Backend: "a", User: "v"}}}
	if err := errors.Join(r.ack(s, "f.1", "r", 5, hand), r.advance(s, "r", PhaseHold, explorerTime),
		r.ran(s, "r", s.Roles["r"].Switch.Number, HookRun{Hook: HookDemote}), r.advance(s, "r", PhaseDemote, explorerTime),
		r.advance(s, "r", PhaseCatchUp, explorerTime)); err != nil {
		t.Fatal(err)
	}
	said := strings.Join(s.History[len(s.History)-1].Caveats(), "\n")
	if !strings.Contains(said, "without proof that nothing of them runs on: 2") || strings.Contains(said, "catch_up") || !strings.Contains(said, "a serves 1 other roles on") {
		t.Error(said)
	}
}

// A switch of many roles is one record: the history has room for it, and whoever
// waits for it, with any of its roles, hears of its end.
func TestGroupIsOneRecord(t *testing.T) {
	s, r := table(t), rules{}
	roles := []string{"r"}
	for n := range historyLimit + 10 {
		role := fmt.Sprint("q", n)
		s.Roles[role] = Row{Members: []string{"a", "b"}, Active: "a", Epoch: 1, Phase: PhaseOpen}
		roles = append(roles, role)
	}
	if err := r.hold(s, roles, order{to: "b"}, explorerTime); err != nil {
		t.Fatal(err)
	}
	number, before := s.Roles["r"].Switch.Number, s.Clone()
	for _, role := range roles {
		if err := errors.Join(r.ack(s, "f.1", role, s.Roles[role].Epoch, handed{residues: []Residue{{Backend: "b", User: "u"}}}),
			r.advance(s, role, PhaseHold, explorerTime)); err != nil {
			t.Fatal(err)
		}
	}
	if len(s.History) != 1 || s.History[0].Role != "r" || s.History[0].Unclean != len(roles) {
		t.Fatalf("%d records, the last: %+v", len(s.History), s.History[len(s.History)-1])
	}
	opened, steps := 0, 0
	for _, e := range changes(before, s) {
		if e.Kind == EventOpened {
			opened++
			steps += min(len(e.Steps), 1)
		}
	}
	if opened != len(roles) || steps != 1 {
		t.Errorf("%d of %d roles are told to be open, %d of them for the switch", opened, len(roles), steps)
	}
	for _, role := range roles {
		if rec, ended, err := outcome(s, role, number); !ended || err != nil || rec.Epochs[role] != s.Roles[role].Epoch {
			t.Errorf("%s: %+v, %v, %v", role, rec, ended, err)
		}
	}
}
