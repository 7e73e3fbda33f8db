package routing

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"strings"
	"testing"
	"testing/synctest"
	"time"
)

// Safety 19: a switch that could not end well does not begin.
func TestSafety19Preflight(t *testing.T) {
	shut := fmt.Errorf("%w: imap: connection refused", ErrNobodyListens)
	away := errors.New("imap: no route to host")
	for name, c := range map[string]struct {
		reach   error
		parking Parking
		hooks   []Hook
		reason  string // "": it switches
	}{
		"all is well":                         {nil, Parking{}, nil, ""},
		"nobody listens at b":                 {shut, Parking{}, nil, "cannot reach b: nobody listens there: imap: connection refused"},
		"promote opens its doors":             {shut, Parking{}, []Hook{HookPromote}, ""},
		"a frontend cannot reach b's host":    {away, Parking{}, []Hook{HookPromote}, "cannot reach b: imap: no route to host"},
		"no places for the role's logins":     {nil, Parking{Role: 1}, nil, "2 logins for role ma01 and places for 1 (limits.max_parked_per_role)"},
		"none for a user's":                   {nil, Parking{User: 1}, nil, "2 logins for user alice and places for 1 (limits.max_parked_per_user)"},
		"none for those from an address":      {nil, Parking{Address: 1}, nil, "2 logins from 192.0.2.1 and places for 1 (limits.max_parked_per_ip)"},
		"none for those nobody has verified":  {nil, Parking{Unverified: 1}, nil, "2 logins that nobody has verified and places for 1 (limits.max_parked_unverified)"},
		"none for all logins":                 {nil, Parking{Total: 1}, nil, "2 logins in all and places for 1 (limits.max_parked)"},
		"none, with all that waits elsewhere": {nil, Parking{Total: 2}, nil, ""},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				h := newHost(t)
				h.opt.Parking = c.parking
				f := h.startWith(&hookLog{}, c.hooks...)
				h.opt.Reach = func(_ context.Context, backend string) error {
					if backend != "b" {
						t.Errorf("asked to reach %s", backend)
					}
					return c.reach
				}
				g := h.start("g")
				var stays []*Stay
				for range 2 {
					s, err := g.Enter(t.Context(), "alice", From(netip.MustParseAddr("192.0.2.1")), Unverified())
					if err != nil {
						t.Fatal(err)
					}
					stays = append(stays, s)
				}
				delivery := g.enter("alice") // is told to try again: no login that is refused
				stays = append(stays, delivery)
				if c.reason == "" {
					go func() {
						for _, s := range stays {
							<-s.Revoked()
							s.Leave(proven)
						}
					}()
					f.mustSwitch(toB)
				} else {
					f.mustFail(toB, "preflight: ", c.reason)
					if row := f.Snapshot().Roles["ma01"]; row.Epoch != 1 || row.Request != nil {
						t.Errorf("%+v", row)
					}
					for _, s := range stays {
						if s.Check() != nil {
							t.Error("a session was ended by a switch that did not begin")
						}
						s.Leave(proven)
					}
				}
				f.stop()
				g.stop()
			})
		})
	}
}

// The places are those for the logins of all roles that are switched together; and
// the operator may go on without.
func TestSafety19PreflightOfGroup(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := newHost(t)
		h.opt.Parking = Parking{Total: 3}
		h.opt.Hooks = &hookLog{site: h.site}
		for _, role := range []string{"ma01", "ma02"} {
			h.opt.Roles[role] = RoleConfig{Members: []string{"a", "b"}, Active: "a", Hooks: []Hook{HookDemote}}
		}
		f := h.start("f")
		for _, user := range []string{"alice", "alice", "carol", "carol"} {
			s, err := f.Enter(t.Context(), user, From(netip.MustParseAddr("192.0.2.1")))
			if err != nil {
				t.Fatal(err)
			}
			go func() {
				<-s.Revoked()
				s.Leave(proven)
			}()
		}
		f.mustFail(toB, "4 logins in all and places for 3")
		req := toB
		req.AcceptRefusals = true
		f.mustSwitch(req)
		if f.Snapshot().Roles["ma02"].Active != "b" {
			t.Errorf("%+v", f.Snapshot().Roles)
		}
		f.stop()
	})
}

// A plan asks every frontend and changes nothing.
func TestPlan(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := newHost(t)
		f := h.startWith(&hookLog{}, HookDemote, HookUndoDemote, HookPromote)
		g := h.start("g")
		stay := g.enter("bob")
		p, err := f.Plan(t.Context(), toB)
		if err != nil || p.Refused != "" || p.From != "a" || len(p.Frontends) != 2 || len(p.Steps) != 4 {
			t.Fatalf("%+v, %v", p, err)
		}
		sessions := 0
		for _, fe := range p.Frontends {
			if fe.Report == nil || !fe.Alive {
				t.Fatalf("%+v", fe)
			}
			sessions += fe.Report.Sessions
		}
		if sessions != 1 {
			t.Errorf("%d sessions", sessions)
		}
		if row := f.Snapshot().Roles["ma01"]; row.Epoch != 1 || row.Request != nil || len(f.Snapshot().History) != 0 || stay.Check() != nil {
			t.Errorf("the plan has changed something: %+v", row)
		}
		if p, err = f.Plan(t.Context(), SwitchRequest{Role: "ma01", To: "a"}); err != nil || !strings.Contains(p.Refused, "active already") {
			t.Errorf("%+v, %v", p, err)
		}
		stay.Leave(proven)
		f.stop()
		g.stop()
	})
}

// A frontend that hangs keeps neither a plan nor a switch waiting for ever.
func TestSilentFrontendIsNamed(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := newHost(t)
		f := h.start("f")
		h.opt.Reach = func(ctx context.Context, _ string) error {
			<-ctx.Done()
			return ctx.Err()
		}
		g := h.start("g")
		began := time.Now()
		p, err := f.Plan(t.Context(), toB)
		if err != nil || !strings.Contains(p.Refused, "no report from frontend "+g.ID()) {
			t.Errorf("%+v, %v", p, err)
		}
		f.mustFail(toB, "no report from frontend "+g.ID())
		if took := time.Since(began); took > planTimeout+preflightTimeout+2*time.Second {
			t.Errorf("took %v", took)
		}
		f.stop()
		g.stop()
	})
}

// A request that is being prepared excludes another, and can be taken back.
func TestRequestIsAborted(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := newHost(t)
		hangs := make(chan struct{})
		h.opt.Reach = func(ctx context.Context, _ string) error {
			<-hangs
			return nil
		}
		f := h.start("f")
		done := f.goSwitch(toB)
		synctest.Wait()
		f.mustFail(toB, "switch 1 to b is being prepared")
		if err := f.Abort(t.Context(), AbortRequest{Role: "ma01", Who: "root", Why: "not today"}); err != nil {
			t.Fatal(err)
		}
		if err := <-done; err == nil || !strings.Contains(err.Error(), "not today") {
			t.Errorf("%v", err)
		}
		close(hangs)
		f.stop()
	})
}

// A switch that could not begin before all frontends were stopped does not begin
// when they are started the next day.
func TestOldRequestIsRefused(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := newHost(t)
		h.start("f").stop()
		s := h.site.get().Clone()
		if err := (rules{}).request(s, []string{"ma01"}, order{to: "b"}, false, time.Now()); err != nil {
			t.Fatal(err)
		}
		h.site.replace(s)
		time.Sleep(time.Hour)
		f := h.start("f")
		time.Sleep(time.Minute)
		row, history := f.Snapshot().Roles["ma01"], f.Snapshot().History
		if row.Active != "a" || row.Request != nil || len(history) != 1 || !strings.Contains(history[0].AbortWhy, "ask again") {
			t.Errorf("%+v, %+v", row, history)
		}
		f.stop()
	})
}

// The operator's word is about what was there when it was given: what comes up
// until HOLD still stands in the way.
func TestWordCoversNothingNewer(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := newHost(t)
		f := h.start("f")
		f.enter("alice").Leave(End{Why: "reset"})
		f.mustFail(toB, "alice")
		dead := false
		h.opt.Reach = func(context.Context, string) error { // called for a preflight's report
			if !dead {
				dead = true
				f.enter("bob").Leave(End{Why: "killed"})
			}
			return nil
		}
		g := h.start("g")
		f.mustFail(clean(toB), "bob", "killed")
		if row := f.Snapshot().Roles["ma01"]; row.Active != "a" || len(row.Residues) != 1 {
			t.Errorf("%+v", row)
		}
		f.mustSwitch(clean(toB))
		f.stop()
		g.stop()
	})
}

// Any frontend may drive the switch: all must have the same hooks.
func TestFrontendsWithOtherHooks(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := newHost(t)
		f := h.startWith(&hookLog{}, HookDemote)
		c := h.opt.Roles["ma01"]
		c.Digest = "another"
		h.opt.Roles = map[string]RoleConfig{"ma01": c}
		g := h.start("g")
		f.mustFail(toB, "preflight: ", f.ID(), g.ID(), "different hooks")
		g.stop()
		f.mustSwitch(toB)
		f.stop()
	})
}

// Safety 19: what frontends report before a long comparison is not what they would
// report behind it.
func TestSafety19ReportsAreFresh(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h, l := newHost(t), &compareLog{}
		l.site = h.site
		h.withHooks(l, HookCatchUp)
		var away error
		h.opt.Reach = func(context.Context, string) error { return away }
		f := h.start("f")
		l.compare = func(context.Context, HookCall) (Seen, string, error) {
			time.Sleep(30 * time.Minute)
			away = errors.New("imap: no route to host")
			return Seen{}, "all equal", nil
		}
		f.mustFail(toB, "cannot reach b: imap: no route to host")
		f.stop()
	})
}

// A frontend that registers between the last report and HOLD is asked first.
func TestSafety19LateFrontend(t *testing.T) {
	s, r := table(t), rules{}
	if err := errors.Join(r.request(s, []string{"r"}, order{to: "b"}, false, explorerTime),
		r.report(s, "f.1", "r", s.Roles["r"].Request.Number, Report{}, nil),
		r.register(s, "g.1", Frontend{Backends: []string{"a", "b"}})); err != nil {
		t.Fatal(err)
	}
	if err := r.start(s, "r", s.Roles["r"].Request.Number, "d", explorerTime); err == nil || !strings.Contains(err.Error(), "no report from frontend g.1") {
		t.Error(err)
	}
}

// Who has waited for a switch that was aborted enters before the next one holds
// the role: what is left of his window would not do.
func TestSwitchAgainAtOnce(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := newHost(t)
		h.opt.Parking = Parking{EntryRate: 2}
		h.withHooks(&hookLog{site: h.site, slow: map[Hook]time.Duration{HookDemote: time.Hour}}, HookDemote)
		f := h.start("f")
		errs := make(chan error, 10)
		for range cap(errs) {
			f.logsInAgain("alice", errs)
		}
		f.mustFail(toB, "hook demote failed")
		f.mustFail(toB, "hook demote failed")
		for range cap(errs) {
			if err := <-errs; err != nil {
				t.Error(err)
			}
		}
		f.stop()
	})
}
