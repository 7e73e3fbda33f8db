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

func (p *process) failover(acceptLoss bool, to string) error {
	p.host.t.Helper()
	ctx, cancel := context.WithTimeout(p.host.t.Context(), time.Hour)
	defer cancel()
	_, err := p.Failover(ctx, FailoverRequest{Role: "ma01", To: to, Who: "root", AcceptLoss: acceptLoss}, nil)
	return err
}

// What a failover needs: the acks, and proof that the old active is off or the
// operator's word. The old active is stale until it has rejoined.
func TestFailover(t *testing.T) {
	for name, c := range map[string]struct {
		has        []Hook
		fail       map[Hook]error
		acceptLoss bool
		ran        []Hook
		reason     string // "": it opens b
	}{
		"fenced":                {[]Hook{HookDemote, HookFence, HookCatchUp, HookPromote}, nil, false, []Hook{HookFence, HookPromote}, ""},
		"not fenced":            {[]Hook{HookDemote, HookPromote}, nil, false, nil, "--accept-loss"},
		"accepted":              {[]Hook{HookDemote, HookFence, HookPromote}, nil, true, []Hook{HookPromote}, ""},
		"the fence hook failed": {[]Hook{HookFence, HookPromote}, map[Hook]error{HookFence: errors.New("no answer")}, false, []Hook{HookFence}, "hook fence failed: no answer"},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				h := newHost(t)
				l := &hookLog{fail: c.fail}
				f := h.startWith(l, append(c.has, HookRejoin)...)
				stay := f.enter("alice")
				over := make(chan struct{})
				defer close(over)
				go func() {
					select {
					case <-stay.Revoked():
						stay.Leave(End{Why: "a does not answer"})
					case <-over:
					}
				}()
				err := f.failover(c.acceptLoss, "b")
				if c.reason != "" {
					if err == nil || !strings.Contains(err.Error(), c.reason) || f.Snapshot().Roles["ma01"].Active != "a" {
						t.Errorf("%v, want %q", err, c.reason)
					}
				} else if err != nil {
					t.Error(err)
				}
				if !slices.Equal(l.ran, c.ran) {
					t.Errorf("hooks %v, want %v", l.ran, c.ran)
				}
				if c.reason == "" {
					mustRejoin(t, f, l)
				}
				stay.Leave(proven)
				f.stop()
			})
		})
	}
}

// mustRejoin: a, which was left behind, becomes active again only after a rejoin
// that has succeeded.
func mustRejoin(t *testing.T, f *process, l *hookLog) {
	t.Helper()
	row := f.Snapshot().Roles["ma01"]
	if row.Active != "b" || len(row.Stale) != 1 || len(row.Residues) != 0 {
		t.Errorf("after the failover: %+v", row)
	}
	toA := SwitchRequest{Role: "ma01", To: "a"}
	f.mustFail(toA, "posthouse rejoin ma01 a")
	if err := f.failover(true, "a"); err == nil || !strings.Contains(err.Error(), "rejoin") {
		t.Errorf("failover to a stale member: %v", err)
	}
	l.fail = map[Hook]error{HookRejoin: errors.New("sync_client -A failed")}
	if _, err := f.Rejoin(t.Context(), RejoinRequest{Role: "ma01", Member: "a"}); err == nil {
		t.Error("a rejoin that failed counts")
	}
	f.mustFail(toA, "posthouse rejoin ma01 a")
	l.fail = nil
	if _, err := f.Rejoin(t.Context(), RejoinRequest{Role: "ma01", Member: "a"}); err != nil {
		t.Error(err)
	}
	if _, err := f.Rejoin(t.Context(), RejoinRequest{Role: "ma01", Member: "a"}); err == nil {
		t.Error("rejoined twice")
	}
	f.mustSwitch(clean(toA))
}

// Safety 20: a dies after DEMOTE, so that there is neither catch-up nor undo: a
// failover takes the switch over, and nobody has to ack again.
func TestSafety20FailoverTakesOverASwitch(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := newHost(t)
		dead := errors.New("a does not answer")
		l := &hookLog{fail: map[Hook]error{HookCatchUp: dead, HookUndoDemote: dead}}
		f := h.startWith(l, HookDemote, HookCatchUp, HookPromote, HookUndoDemote, HookFence)
		var floors []uint64
		h.site.observe(func(old, now *State) {
			for id, fe := range now.Frontends {
				if fe.Floors["ma01"] > old.Frontends[id].Floors["ma01"] {
					floors = append(floors, fe.Floors["ma01"])
				}
			}
		})
		done := f.goSwitch(toB)
		time.Sleep(5 * time.Second)
		if row := f.Snapshot().Roles["ma01"]; row.Phase != PhaseAbort {
			t.Fatalf("%+v", row)
		}
		if err := f.failover(false, "b"); err != nil {
			t.Fatal(err)
		}
		if err := <-done; err == nil || !strings.Contains(err.Error(), "failover 2 takes over in phase abort") {
			t.Errorf("the switch ended with %v", err)
		}
		if row := f.Snapshot().Roles["ma01"]; row.Active != "b" || row.Epoch != 2 {
			t.Errorf("%+v", row)
		}
		if !slices.Equal(floors, []uint64{2}) {
			t.Errorf("acks %v, want one", floors)
		}
		f.stop()
	})
}

// The hook that is at work when a failover takes over has ended before the next
// one begins.
func TestFailoverWaitsForTheHookAtWork(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := newHost(t)
		l := &hookLog{slow: map[Hook]time.Duration{HookCatchUp: time.Hour}, ending: 700 * time.Millisecond}
		f := h.startWith(l, HookDemote, HookCatchUp, HookPromote, HookFence)
		done := f.goSwitch(toB)
		time.Sleep(3 * time.Second)
		if err := f.failover(false, "b"); err != nil {
			t.Fatal(err)
		}
		if err := <-done; err == nil || l.most != 1 {
			t.Errorf("%v; %d hooks at a time", err, l.most)
		}
		f.stop()
	})
}

// What is being promoted may have taken mail already: no failover to a third.
func TestFailoverGoesWhereThePromotionBegan(t *testing.T) {
	s := table(t)
	mustHold(t, s, HookPromote)
	r := rules{}
	if err := errors.Join(r.ack(s, "f.1", "r", 5, handed{}), r.advance(s, "r", PhaseHold, explorerTime)); err != nil {
		t.Fatal(err)
	}
	f := s.Frontends["f.1"]
	f.Backends = append(f.Backends, "c")
	s.Frontends["f.1"] = f
	o := order{to: "c", acceptLoss: true}
	if err := r.failover(s.Clone(), []string{"r"}, o, explorerTime); err == nil || !strings.Contains(err.Error(), "has begun to promote b") {
		t.Errorf("to c: %v", err)
	}
	o.to = "b"
	if err := r.failover(s, []string{"r"}, o, explorerTime); err != nil {
		t.Errorf("to b: %v", err)
	}
	// What it promotes again is to be undone once, should it be aborted.
	row := s.Roles["r"]
	row.Switch.Hooks = []Hook{HookPromote, HookUndoPromote}
	s.Roles["r"] = row
	if err := errors.Join(r.ack(s, "f.1", "r", 5, handed{}), r.advance(s, "r", PhaseHold, explorerTime)); err != nil {
		t.Fatal(err)
	}
	if begun := s.Roles["r"].Switch.Begun; !slices.Equal(begun, []Phase{PhasePromote}) {
		t.Errorf("begun: %v", begun)
	}
}

// a was left behind, and then b dies before a could rejoin: a opens with what it
// has, on the operator's word, and b is the stale one.
func TestFailoverToAStaleMember(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := newHost(t)
		l := &hookLog{}
		f := h.startWith(l, HookFence, HookPromote, HookUndoPromote, HookRejoin)
		if err := f.failover(false, "b"); err != nil {
			t.Fatal(err)
		}
		again := FailoverRequest{Role: "ma01", To: "a", Who: "root"}
		isStale := func(want string) {
			t.Helper()
			row := f.Snapshot().Roles["ma01"]
			if _, is := row.Stale[want]; !is || len(row.Stale) != 1 || row.Active == want {
				t.Errorf("on %s, stale: %v, want %s", row.Active, row.Stale, want)
			}
		}
		if _, err := f.Failover(t.Context(), again, nil); err == nil || !strings.Contains(err.Error(), "--accept-stale") {
			t.Errorf("to a stale member: %v", err)
		}
		again.AcceptStale = true
		l.fail = map[Hook]error{HookPromote: errors.New("exit status 1")}
		if _, err := f.Failover(t.Context(), again, nil); err == nil {
			t.Error("it opened though its promotion failed")
		}
		isStale("a") // an abort changes nothing of it
		l.fail = nil
		if _, err := f.Failover(t.Context(), again, nil); err != nil {
			t.Error(err)
		}
		isStale("b")
		if _, err := f.Rejoin(t.Context(), RejoinRequest{Role: "ma01", Member: "b"}); err != nil {
			t.Error(err)
		}
		f.mustSwitch(toB)
		f.stop()
	})
}

// b dies for good while it is promoted, and there is no undo_promote, or none that
// ends: on the operator's word a serves on, and b is stale.
func TestAbortWhenTheNewActiveIsDown(t *testing.T) {
	dead := map[Hook]error{HookPromote: errors.New("b does not answer"), HookUndoPromote: errors.New("b does not answer")}
	for name, c := range map[string]struct {
		slow map[Hook]time.Duration
		has  []Hook
	}{
		"no undo":           {nil, []Hook{HookDemote, HookPromote, HookUndoDemote}},
		"undo fails":        {nil, []Hook{HookDemote, HookPromote, HookUndoDemote, HookUndoPromote}},
		"undo at work":      {map[Hook]time.Duration{HookUndoPromote: time.Hour}, []Hook{HookDemote, HookPromote, HookUndoDemote, HookUndoPromote}},
		"promotion at work": {map[Hook]time.Duration{HookPromote: time.Hour}, []Hook{HookDemote, HookPromote, HookUndoDemote}},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				h := newHost(t)
				l := &hookLog{fail: dead, slow: c.slow}
				f := h.startWith(l, append(c.has, HookRejoin)...)
				isDown := AbortRequest{Role: "ma01", Who: "root", Why: "b burns", ConfirmedDown: true}
				if err := f.Abort(t.Context(), isDown); err == nil {
					t.Error("turned back what does not exist")
				}
				done := f.goSwitch(toB)
				time.Sleep(10 * time.Minute) // it is stuck, or its hook takes its time
				if !slices.Contains(c.has, HookUndoPromote) {
					if err := f.Abort(t.Context(), AbortRequest{Role: "ma01"}); err == nil {
						t.Error("turned back without a word on b")
					}
				}
				began := time.Now()
				if err := f.Abort(t.Context(), isDown); err != nil {
					t.Fatal(err)
				}
				if err := <-done; err == nil || !strings.Contains(err.Error(), "a serves on") || time.Since(began) > time.Minute {
					t.Errorf("after %v: %v", time.Since(began), err)
				}
				row := f.Snapshot().Roles["ma01"]
				if _, is := row.Stale["b"]; !is || row.Active != "a" || row.Phase != PhaseOpen || l.ran[len(l.ran)-1] != HookUndoDemote || l.most != 1 {
					t.Errorf("%+v after %v, %d at a time", row, l.ran, l.most)
				}
				f.mustFail(toB, "posthouse rejoin ma01 b")
				f.stop()
			})
		})
	}
}

// Before anything has begun at b there is nothing to abandon.
func TestAbandonNeedsAPromotion(t *testing.T) {
	s, r := table(t), rules{}
	mustHold(t, s, HookDemote, HookPromote)
	if err := r.abandon(s, "r", "", explorerTime); !errors.Is(err, ErrConflict) || !strings.Contains(err.Error(), "without --confirmed-down") {
		t.Errorf("in HOLD: %v", err)
	}
}

// The word that the old active is off says nothing of a third member.
func TestAcceptedLossIsOfTheOldActive(t *testing.T) {
	s, r := table(t), rules{}
	row := s.Roles["r"]
	row.Residues = []Residue{{Backend: "a", User: "u"}, {Backend: "c", User: "v"}}
	s.Roles["r"] = row
	o := order{to: "b", acceptLoss: true}
	if err := errors.Join(r.failover(s, []string{"r"}, o, explorerTime), r.ack(s, "f.1", "r", 5, handed{})); err != nil {
		t.Fatal(err)
	}
	if err := r.open(s.Clone(), "r", explorerTime); err == nil || strings.Contains(err.Error(), "work of u") || !strings.Contains(err.Error(), "work of v") {
		t.Errorf("opened over what runs on c: %v", err)
	}
	o.confirmedClean = true
	if err := errors.Join(r.failover(s, []string{"r"}, o, explorerTime), r.open(s, "r", explorerTime)); err != nil {
		t.Error(err)
	}
}

// A failover by proof takes over one by word, whose promotion has begun: however it
// came about, the promotion is undone first, or both would be masters.
func TestAbortUndoesThePromotionFirst(t *testing.T) {
	s, r, now := table(t), rules{}, explorerTime
	to := order{to: "b", hooks: AllHooks, acceptLoss: true}
	proven := order{to: "b", hooks: AllHooks}
	if err := errors.Join(r.failover(s, []string{"r"}, to, now), r.ack(s, "f.1", "r", 5, handed{}), r.advance(s, "r", PhaseHold, now),
		r.failover(s, []string{"r"}, proven, now), r.advance(s, "r", PhaseHold, now), r.abort(s, "r", "", now)); err != nil {
		t.Fatal(err)
	}
	if do, why := decideUndo(s.Roles["r"], driving{}); do != moveUndo || why != string(HookUndoPromote) {
		t.Errorf("%v %s: %v was begun", do, why, s.Roles["r"].Switch.Begun)
	}
}

// What a hook restarts rejoins as one, and not under the users of another role.
func TestRejoinOfAllRolesOfABackend(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := newHost(t)
		members := []string{"a", "b"}
		var calls [][]string
		l := &hookLog{site: h.site, do: map[Hook]func(HookCall){HookRejoin: func(c HookCall) { calls = append(calls, c.Roles) }}}
		has := []Hook{HookFence, HookRejoin}
		h.opt.Roles = map[string]RoleConfig{"ma01": {Members: members, Active: "a", Hooks: has}, "ma02": {Members: members, Active: "a", Hooks: has},
			"ma03": {Members: members, Hooks: has, Scope: ScopeRole}}
		h.opt.Hooks = l
		f := h.start("f")
		if err := f.failover(false, "b"); err != nil {
			t.Fatal(err)
		}
		if _, err := f.InitRole(t.Context(), "ma03", "a", "test", false); err != nil {
			t.Fatal(err)
		}
		if _, err := f.Rejoin(t.Context(), RejoinRequest{Role: "ma02", Member: "a"}); err == nil || !strings.Contains(err.Error(), "serves role ma03") || len(calls) > 0 {
			t.Errorf("%v; hooks for %v", err, calls)
		}
		if _, err := f.Failover(t.Context(), FailoverRequest{Role: "ma03", To: "b"}, nil); err != nil {
			t.Fatal(err)
		}
		done, err := f.Rejoin(t.Context(), RejoinRequest{Role: "ma02", Member: "a"})
		if want := []string{"ma02", "ma01", "ma03"}; err != nil || !slices.Equal(done.Roles, want) || len(calls) != 1 || !slices.Equal(calls[0], want) {
			t.Errorf("%+v, %v; hooks for %v", done, err, calls)
		}
		for role, row := range f.Snapshot().Roles {
			if len(row.Stale) > 0 {
				t.Errorf("%s: %+v", role, row)
			}
		}
		f.stop()
	})
}

// While a rejoin hook overwrites a, nothing makes a active, and no second one begins.
func TestNobodyServesWhileItRejoins(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := newHost(t)
		release := make(chan struct{})
		l := &hookLog{do: map[Hook]func(HookCall){HookRejoin: func(HookCall) { <-release }}}
		f := h.startWith(l, HookRejoin)
		if err := f.failover(true, "b"); err != nil {
			t.Fatal(err)
		}
		done := make(chan error, 1)
		req := RejoinRequest{Role: "ma01", Member: "a"}
		go func() {
			_, err := f.Rejoin(t.Context(), req)
			done <- err
		}()
		synctest.Wait()
		_, err := f.Failover(t.Context(), FailoverRequest{Role: "ma01", To: "a", AcceptLoss: true, AcceptStale: true}, nil)
		if err == nil || !strings.Contains(err.Error(), "makes a a copy of the active") {
			t.Errorf("failover to a: %v", err)
		}
		if _, err := f.Rejoin(t.Context(), req); err == nil || !strings.Contains(err.Error(), "is at it already") {
			t.Errorf("a second rejoin: %v", err)
		}
		close(release)
		if err := <-done; err != nil || len(f.Snapshot().Roles["ma01"].Stale) > 0 {
			t.Errorf("%v, %+v", err, f.Snapshot().Roles["ma01"].Stale)
		}
		f.stop()
	})
}

// The frontend whose rejoin was at work is gone: its hook has ended with it, or will
// be refused for the higher attempt.
func TestRejoinOfAFrontendThatIsGone(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := newHost(t)
		l := &hookLog{slow: map[Hook]time.Duration{HookRejoin: time.Hour}}
		f := h.startWith(l, HookRejoin)
		if err := f.failover(true, "b"); err != nil {
			t.Fatal(err)
		}
		go f.Rejoin(t.Context(), RejoinRequest{Role: "ma01", Member: "a"})
		synctest.Wait()
		if by := f.Snapshot().Roles["ma01"].Stale["a"].RejoinBy; by != f.ID() {
			t.Errorf("by %q", by)
		}
		l.mu.Lock()
		l.slow = nil
		l.mu.Unlock()
		g := h.start("g")
		f.kill()
		g.until(func(s *State) bool { return len(s.Frontends) == 1 })
		if _, err := g.Rejoin(t.Context(), RejoinRequest{Role: "ma01", Member: "a"}); err != nil {
			t.Error(err)
		}
		g.stop()
		time.Sleep(2 * time.Hour)
	})
}

// A failover takes a request away, and who waits for that hears so.
func TestFailoverOverARequest(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h, l := newHost(t), &compareLog{}
		l.site = h.site
		l.compare = func(ctx context.Context, _ HookCall) (Seen, string, error) {
			<-ctx.Done()
			return Seen{}, "", ctx.Err()
		}
		h.withHooks(l, HookCatchUp)
		f := h.start("f")
		ended := f.goSwitch(toB)
		time.Sleep(time.Minute) // it compares
		if err := f.failover(true, "b"); err != nil {
			t.Fatal(err)
		}
		if err := <-ended; err == nil || !strings.Contains(err.Error(), "failover 2 takes over") {
			t.Error(err)
		}
		f.stop()
	})
}

// Without a catch-up nobody knows whose mail differs.
func TestNobodyHasLooked(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := newHost(t)
		f := h.start("f")
		f.enter("alice").Leave(proven)
		f.mustSwitch(toB)
		if seen := f.Snapshot().Roles["ma01"].Seen; !seen.All {
			t.Errorf("%+v", seen)
		}
		f.stop()
	})
}
