package routing

import (
	"context"
	"encoding/json"
	"errors"
	"maps"
	"strings"
	"testing"
	"testing/synctest"
	"time"
)

// The cases of safety.md that concern this package, by number. The explorer
// covers the executions; these show that Table keeps the rules.

// mustFail runs a switch that has to be refused or aborted for a reason.
func (p *process) mustFail(req SwitchRequest, reasons ...string) {
	p.host.t.Helper()
	_, err := p.switches(req)
	if err == nil {
		p.host.t.Fatalf("switch to %s succeeded, want an error with %q", req.To, reasons)
	}
	for _, reason := range reasons {
		if !strings.Contains(err.Error(), reason) {
			p.host.t.Errorf("the switch's error lacks %q: %v", reason, err)
		}
	}
}

func (p *process) mustSwitch(req SwitchRequest) {
	p.host.t.Helper()
	if _, err := p.switches(req); err != nil {
		p.host.t.Fatal(err)
	}
}

// switches bounds the wait: where time is not real, a driver that is stuck would
// go on for ever.
func (p *process) switches(req SwitchRequest) (SwitchRecord, error) {
	ctx, cancel := context.WithTimeout(context.Background(), 24*time.Hour)
	defer cancel()
	return p.Switch(ctx, req, nil)
}

func clean(req SwitchRequest) SwitchRequest {
	req.ConfirmedClean = true
	return req
}

func TestSafety01EndWithoutProofKeepsTheSwitchFromOpening(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newHost(t).start("f")
		f.enter("alice").Leave(End{Why: "reset after 10 s"})
		f.enter("bob").Leave(proven)
		begin := time.Now()
		f.mustFail(toB, "alice", "reset after 10 s", "--confirmed-clean")
		if took := time.Since(begin); took > time.Second {
			t.Errorf("logins were parked for %v though nothing could clear the residue", took)
		}
		f.mustSwitch(clean(toB))
		f.stop()
	})
}

func TestSafety02KilledFrontendLeavesUnknownResidue(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := newHost(t)
		f, g := h.start("f"), h.start("g")
		f.enter("alice")
		f.kill()
		g.until(func(s *State) bool { return len(s.Frontends) == 1 })
		for role, row := range g.Snapshot().Roles {
			if len(row.Residues) != 1 || row.Residues[0].User != "" || row.Residues[0].Backend != row.Active {
				t.Errorf("role %s has residues %+v, want an unknown one on %s", role, row.Residues, row.Active)
			}
		}
		g.mustFail(toB, "an unknown user", f.ID())
		if err := g.ConfirmClean(t.Context(), "ma01"); err != nil {
			t.Fatal(err)
		}
		g.mustSwitch(toB)
		g.stop()
	})
}

// The successor on the host buries it too, before it serves.
func TestSafety02SuccessorBuries(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := newHost(t)
		f := h.start("f")
		f.kill()
		g := h.start("f")
		if s := g.Snapshot(); len(s.Frontends) != 1 || len(s.Roles["ma01"].Residues) != 1 {
			t.Errorf("after the successor's start: %+v", s)
		}
		g.stop()
	})
}

func TestSafety03ResidueIsInherited(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := newHost(t)
		f := h.start("f")
		f.enter("alice").Leave(End{Why: "reset"})
		f.mustFail(toB, "aborted", "alice") // handed over with the ack
		f.enter("bob").Leave(proven)
		f.mustFail(toB, "alice") // refused before anybody parks
		if got := len(f.Snapshot().History); got != 1 {
			t.Errorf("%d switches were begun, want 1", got)
		}
		// Not a goodbye, nor a successor, changes that.
		f.stop()
		f = h.start("f")
		f.mustFail(toB, "alice")
		f.stop()
	})
}

// No step of a switch clears a residue by itself: only a hook that proves it, the
// operator and age do.
func TestSafety04OnlyProofClears(t *testing.T) {
	s, r, now := emptyState(), rules{}, time.Now()
	s.Roles["r"] = Row{Members: []string{"a", "b"}, Active: "a", Epoch: 1, Phase: PhaseOpen}
	if err := r.register(s, "f", Frontend{Backends: []string{"a", "b"}}); err != nil {
		t.Fatal(err)
	}
	steps := []func() error{
		func() error {
			return r.hold(s, []string{"r"}, order{to: "b", hooks: AllHooks}, now)
		},
		func() error {
			return r.ack(s, "f", "r", 2, handed{residues: []Residue{{Backend: "a", User: "u", Since: now}}})
		},
		func() error { return r.advance(s, "r", PhaseHold, now) },
	}
	for i, step := range steps {
		if err := step(); err != nil {
			t.Fatalf("step %d: %v", i, err)
		}
	}
	// What runs could change what has been compared, too.
	if err := r.advance(s, "r", PhaseDemote, now); !errors.Is(err, ErrConflict) || !strings.Contains(err.Error(), "u may still run on a") {
		t.Errorf("CATCH UP with a residue = %v", err)
	}
	if err := errors.Join(r.abort(s, "r", "residue", now), r.undone(s, "r", PhaseDemote), r.reopen(s, "r", now)); err != nil {
		t.Fatal(err)
	}
	if row := s.Roles["r"]; len(row.Residues) != 1 || row.Active != "a" || row.Epoch != 3 {
		t.Errorf("after the abort: %+v", row)
	}
}

// Age counts from when this process saw it first, whatever the other's clock.
func TestSafety04AgeTrustsNoForeignClock(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := newHost(t)
		h.opt.ResidueMaxAge = 15 * time.Minute
		f := h.start("f")
		synctest.Wait()
		begin := time.Now()
		_, err := f.store.Update(t.Context(), func(s *State) error {
			row := s.Roles["ma01"]
			row.Residues = []Residue{{Backend: "a", User: "alice", Since: begin.Add(-time.Hour), Why: "from a host an hour behind"}}
			s.Roles["ma01"] = row
			return nil
		})
		if err != nil {
			t.Fatal(err)
		}
		f.until(func(s *State) bool { return len(s.Roles["ma01"].Residues) == 1 })
		f.mustFail(toB, "alice")
		f.until(func(s *State) bool { return len(s.Roles["ma01"].Residues) == 0 })
		if age := time.Since(begin); age < 15*time.Minute || age > 16*time.Minute {
			t.Errorf("the residue was dropped after %v, want 15m", age)
		}
		f.mustSwitch(toB)
		f.stop()
	})
}

func TestSafety05NobodyEntersWhileAStayIsElsewhere(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := newHost(t)
		f := h.start("f")
		old := f.enter("alice")
		s := h.site.get().Clone()
		s.Revision++
		row := s.Roles["ma01"]
		row.Active, row.Epoch = "b", 2
		s.Roles["ma01"] = row
		h.site.replace(s)
		<-old.Revoked()
		if _, err := f.Enter(t.Context(), "bob", NoWait()); !errors.Is(err, ErrHeld) {
			t.Errorf("Enter with a stay on a and b open = %v, want ErrHeld", err)
		}
		entered := make(chan *Stay)
		go func() { entered <- f.enter("bob") }()
		synctest.Wait()
		select {
		case <-entered:
			t.Fatal("bob entered b while alice was on a")
		default:
		}
		old.Leave(proven)
		if s := <-entered; s.Backend != "b" {
			t.Errorf("bob entered %s", s.Backend)
		} else {
			s.Leave(proven)
		}
		f.stop()
	})
}

func TestSafety06FloorIsOnDiskBeforeTheAck(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := newHost(t)
		f := h.start("f")
		id := f.ID()
		h.site.observe(func(old, now *State) {
			if now.Frontends[id].Floors["ma01"] <= old.Frontends[id].Floors["ma01"] {
				return
			}
			kept, err := loadSnapshot(h.local)
			if err != nil || kept.Roles["ma01"].Epoch != 2 || kept.Roles["ma01"].Phase != PhaseHold {
				t.Errorf("at the ack the disk had %+v, %v", kept, err)
			}
		})
		synctest.Wait()
		h.local.setFull(true)
		f.mustFail(toB, "no ack from frontend "+f.ID())
		h.local.setFull(false)
		h.site.observe(nil)
		f.mustSwitch(toB)
		f.stop()
	})
}

// A start that finds a held row on disk, and a store that is older, parks.
func TestSafety06HeldSnapshotParks(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := newHost(t)
		f := h.start("f")
		synctest.Wait()
		before := h.site.get()
		stuck := f.enter("alice")
		f.goSwitch(toB)
		synctest.Wait()
		f.kill()
		stuck.Leave(proven)
		restored := before.Clone()
		h.site.replace(restored)
		f = h.start("f")
		if _, err := f.Enter(t.Context(), "bob", NoWait()); !errors.Is(err, ErrHeld) {
			t.Errorf("Enter = %v, want ErrHeld", err)
		}
		f.stop()
	})
}

func TestSafety26DirectoryProposesOnly(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := newHost(t)
		var alarms []string
		h.opt.OnEvent = func(e Event) {
			if e.Kind == EventDisagreement {
				alarms = append(alarms, e.User)
			}
		}
		f := h.start("f")
		first := f.enter("alice")
		h.dir.set("alice", Entry{"alice", "ma02"})
		second := f.enter("alice")
		if second.Role != "ma01" || second.Backend != first.Backend {
			t.Errorf("alice is in %s on %s and in %s on %s", first.Role, first.Backend, second.Role, second.Backend)
		}
		first.Leave(proven)
		second.Leave(proven)
		if n := f.Counters().Disagreements; n != 1 {
			t.Errorf("%d disagreements counted", n)
		}
		f.stop()
		if len(alarms) != 1 {
			t.Errorf("alarms: %v", alarms)
		}
		// A restart does not forget.
		f = h.start("f")
		s := f.enter("alice")
		if s.Role != "ma01" {
			t.Errorf("after a restart alice is in %s", s.Role)
		}
		s.Leave(proven)
		f.stop()
	})
}

func TestSafety27MovedWhileParked(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := newHost(t)
		f := h.start("f")
		stuck := f.enter("bob")
		done := f.goSwitch(toB)
		synctest.Wait()
		entered := make(chan *Stay)
		go func() { entered <- f.enter("alice") }()
		synctest.Wait()
		if _, err := f.store.Update(t.Context(), func(s *State) error {
			s.Overrides["alice"] = "ma02"
			return nil
		}); err != nil {
			t.Fatal(err)
		}
		s := <-entered // though ma01 is still held
		if s.Role != "ma02" || s.Backend != "b" {
			t.Errorf("alice woke into %s on %s", s.Role, s.Backend)
		}
		if last, _ := h.local.Recall("alice"); last != "ma02" {
			t.Errorf("alice was last in %q", last)
		}
		s.Leave(proven)
		stuck.Leave(proven)
		if err := <-done; err != nil {
			t.Error(err)
		}
		f.stop()
	})
}

func TestSafety29CanonicalUserIsTheOnlyKey(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := newHost(t)
		h.dir.set("alice%example.org", Entry{"alice", "ma02"})
		h.dir.set("Alice@Example.ORG", Entry{"alice", "ma01"})
		f := h.start("f")
		for _, name := range []string{"alice", "alice%example.org", "Alice@Example.ORG"} {
			s := f.enter(name)
			if s.User != "alice" || s.Role != "ma01" {
				t.Errorf("%s entered as %s in %s", name, s.User, s.Role)
			}
			s.Leave(End{Why: "lost"})
		}
		if rest := f.Roles()[0].Unhanded; len(rest) != 1 || rest[0].User != "alice" {
			t.Errorf("residues: %+v", rest)
		}
		f.stop()
	})
}

func TestSafety30FrontendsMustAgree(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := newHost(t)
		h.opt.Settings = map[string]string{"normalise": "lower"}
		h.opt.Backends["spare"] = map[string]string{"imap": "10.0.0.13:143"}
		f := h.start("f")
		defer f.stop()
		for _, c := range []struct {
			name   string
			change func(o *Options)
			want   string // "": accepted
		}{
			{"address of a member", func(o *Options) { o.Backends["a"] = map[string]string{"imap": "10.0.0.99:143"} }, "new backend name"},
			{"one more service", func(o *Options) { o.Backends["a"] = map[string]string{"imap": "10.0.0.11:143", "pop3": "x:110"} }, "new backend name"},
			{"setting", func(o *Options) { o.Settings = map[string]string{"normalise": "none"} }, "must agree"},
			{"active no member", func(o *Options) {
				o.Roles = map[string]RoleConfig{"ma01": {Members: []string{"b", "spare"}}}
			}, "its active a"},
			{"address of no member", func(o *Options) { o.Backends["spare"] = map[string]string{"imap": "10.0.0.99:143"} }, ""},
			{"new backend and member", func(o *Options) {
				o.Backends["c"] = map[string]string{"imap": "10.0.0.14:143"}
				o.Roles = map[string]RoleConfig{"ma01": {Members: []string{"a", "b", "c"}}}
			}, ""},
		} {
			h.opt.Backends = maps.Clone(f.opt.Backends)
			h.opt.Settings, h.opt.Roles = f.opt.Settings, f.opt.Roles
			c.change(&h.opt)
			g, err := h.tryStart("g")
			switch {
			case c.want == "" && err != nil:
				t.Errorf("%s: %v", c.name, err)
			case c.want != "" && (!errors.Is(err, ErrConflict) || !strings.Contains(err.Error(), c.want)):
				t.Errorf("%s: %v, want %q", c.name, err, c.want)
			}
			if err == nil {
				g.stop()
			}
		}
		// f does not know c: nobody may be sent there.
		f.until(func(s *State) bool { return len(s.Roles["ma01"].Members) == 3 })
		f.mustFail(SwitchRequest{Role: "ma01", To: "c"}, "frontend "+f.ID()+" has no backend c")
	})
}

// With `auth: backend` the login in the stay is the verification: it never
// waits, and it counts as inside.
func TestSafety31VerificationIsInTheStay(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newHost(t).start("f")
		s, err := f.Enter(t.Context(), "alice", NoWait())
		if err != nil {
			t.Fatal(err)
		}
		done := f.goSwitch(toB)
		<-s.Revoked()
		begin := time.Now()
		if _, err := f.Enter(t.Context(), "mallory-as-bob", NoWait()); !errors.Is(err, ErrUnknownUser) {
			t.Error(err)
		}
		if _, err := f.Enter(t.Context(), "bob", NoWait()); !errors.Is(err, ErrHeld) || time.Since(begin) != 0 {
			t.Errorf("an unverified login in a hold: %v after %v", err, time.Since(begin))
		}
		if n := f.Counters().Parked; n != 0 {
			t.Errorf("%d parked", n)
		}
		s.Leave(proven)
		if err := <-done; err != nil {
			t.Error(err)
		}
		f.stop()
	})
}

func TestStateSurvivesJSON(t *testing.T) {
	s := emptyState()
	s.Roles["r"] = Row{Members: []string{"a"}, Active: "a", Epoch: 3, Phase: PhaseOpen, Doubt: &Doubt{Known: 4, Why: "x"}}
	data, err := json.Marshal(s)
	if err != nil {
		t.Fatal(err)
	}
	var back State
	if err := json.Unmarshal(data, &back); err != nil || back.Roles["r"].Doubt.Known != 4 {
		t.Errorf("%+v, %v", back, err)
	}
	c := s.Clone()
	c.Roles["r"].Doubt.Known = 5
	if s.Roles["r"].Doubt.Known != 4 {
		t.Error("Clone shares the doubt")
	}
}
