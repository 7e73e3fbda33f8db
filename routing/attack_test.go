package routing

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"
)

// lateStore keeps a commit on its way for as long as late says, or fails it.
type lateStore struct {
	*memStore
	late func(old, now *State) (<-chan struct{}, error)
}

func (s *lateStore) Update(ctx context.Context, change func(*State) error) (*State, error) {
	old := s.site.get()
	now := old.Clone()
	if change(now) == nil {
		wait, err := s.late(old, now)
		if err != nil {
			return nil, err
		}
		if wait != nil {
			<-wait
		}
	}
	return s.memStore.Update(ctx, change)
}

// A driver's step out of DEMOTE is long on its way. Meanwhile another drives, and
// a failover has taken over: it is in DEMOTE too, but its fence hook has not
// proven anything yet.
func TestALateStepIsForItsOwnSwitch(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := newHost(t)
		arrives := make(chan struct{})
		l := &hookLog{site: h.site, slow: map[Hook]time.Duration{HookFence: 5 * time.Second}}
		h.withHooks(l, HookDemote, HookPromote, HookUndoDemote, HookFence)
		h.site.observe(func(old, now *State) {
			was, is := old.Roles["ma01"], now.Roles["ma01"]
			fenced := is.Switch != nil && slices.ContainsFunc(is.Switch.Runs, func(r HookRun) bool { return r.Hook == HookFence })
			if was.Switch != nil && was.Switch.Failover && was.Phase == PhaseDemote && is.Phase == PhasePromote && !fenced {
				t.Error("b is promoted and nothing proves that a is off")
			}
		})
		f := h.startOn("f", func(old, now *State) (<-chan struct{}, error) {
			if old.Roles["ma01"].Phase == PhaseDemote && now.Roles["ma01"].Phase == PhasePromote && now.Roles["ma01"].Switch.Number == 1 {
				return arrives, nil
			}
			return nil, nil
		})
		synctest.Wait() // f drives
		g := h.start("g")
		taken := f.goSwitch(toB)
		synctest.Wait()
		l.mu.Lock()
		l.slow[HookDemote] = 5 * time.Second // when g drives
		l.mu.Unlock()
		f.depose()
		done := make(chan error, 1)
		go func() { done <- g.failover(false, "b") }()
		time.Sleep(time.Second)
		if row := g.Snapshot().Roles["ma01"]; row.Phase != PhaseDemote || !row.Switch.Failover {
			t.Fatalf("%+v", row)
		}
		close(arrives)
		if err := <-done; err != nil {
			t.Error(err)
		}
		if err := <-taken; err == nil {
			t.Error("the switch that was taken over has succeeded")
		}
		g.stop()
		f.stop()
	})
}

// withThird makes c a third backend, and ma01 a role whose members are compared.
func (h *host) withThird(l *compareLog, members ...string) {
	h.opt.Backends["c"] = map[string]string{"imap": "10.0.0.13:143"}
	l.site = h.site
	l.do = map[Hook]func(HookCall){HookCatchUp: func(c HookCall) { l.inHold = append(l.inHold, c.Seen) }}
	c := h.opt.Roles["ma01"]
	c.Members, c.Hooks, c.Scope = members, []Hook{HookDemote, HookCatchUp}, ScopeRole
	h.opt.Roles["ma01"], h.opt.Hooks = c, l
}

var toC = SwitchRequest{Role: "ma01", To: "c", Who: "test", Why: "test"}

// That a and c are equal says nothing of b.
func TestAComparisonIsOfTwoMembers(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h, l := newHost(t), &compareLog{}
		h.withThird(l, "a", "b", "c")
		f := h.start("f")
		if p, err := f.Plan(t.Context(), toC); err != nil || p.Refused != "" {
			t.Errorf("%+v, %v", p, err)
		}
		l.of = nil
		f.mustSwitch(toB)
		mustSeen(t, "before HOLD", l.of, Seen{All: true})
		f.stop()
	})
}

// Nobody has ever looked at a member that is new.
func TestANewMemberIsComparedWhole(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h, l := newHost(t), &compareLog{}
		h.withThird(l, "a", "b")
		f := h.start("f")
		f.mustSwitch(toB)
		f.stop()
		h.withThird(l, "a", "b", "c")
		l.of = nil
		f = h.start("f")
		f.mustSwitch(toC)
		mustSeen(t, "before HOLD", l.of, Seen{All: true})
		f.stop()
	})
}

// Work that is taken to have ended while a comparison goes on may have changed
// something behind it.
func TestAResidueThatAgesDuringAComparison(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h, l := newHost(t), &compareLog{}
		h.opt.ResidueMaxAge = 15 * time.Minute
		h.withThird(l, "a", "b")
		f := h.start("f")
		f.mustSwitch(toB)
		f.enter("alice").Leave(End{Why: "reset"})
		l.inHold = nil
		l.compare = func(ctx context.Context, _ HookCall) (Seen, string, error) {
			pause(ctx, 30*time.Minute)
			return Seen{}, "all equal", ctx.Err()
		}
		f.mustSwitch(toA)
		mustSeen(t, "in HOLD", l.inHold, users("alice"))
		f.stop()
	})
}

// A backend hangs under thousands of sessions: what they leave fits into the
// store, else there would be no ack, and no failover.
func TestResiduesAreBounded(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := newHost(t)
		const sessions = 3 * mostResidues
		for n := range sessions {
			name := fmt.Sprintf("user%06d@example.org", n)
			h.dir.set(name, Entry{User: name, Role: "ma01"})
		}
		f := h.start("f")
		for n := range sessions {
			f.enter(fmt.Sprintf("user%06d@example.org", n)).Leave(End{Why: "a did not answer within the drain timeout"})
		}
		f.mustFail(toB, "work of an unknown user may still run on a", "did not answer")
		row := h.site.get().Roles["ma01"]
		if raw, err := json.Marshal(row.Residues); err != nil || len(raw) > 200<<10 || len(row.Residues) == 0 {
			t.Errorf("%d residues take %d bytes: %v", len(row.Residues), len(raw), err)
		}
		row.take(handed{residues: []Residue{{Backend: "b", User: "u"}}})
		if n := len(row.Residues); n != 2 {
			t.Errorf("%d residues, want that of b too", n)
		}
		f.mustSwitch(clean(toB))
		f.stop()
	})
}

// Safety 30: a frontend that has another address for a new member than the table
// would let its users in to another server.
func TestSafety30AddressThatChangedBeforeTheRoleCame(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := newHost(t)
		h.opt.Backends["c"] = map[string]string{"imap": "10.0.0.13:143"}
		f := h.start("f")
		h.opt.Backends["c"] = map[string]string{"imap": "10.0.0.99:143"}
		h.opt.Roles["ma01"] = RoleConfig{Members: []string{"a", "b", "c"}}
		g := h.start("g")
		g.mustFail(toC, "frontend "+f.ID()+" has no backend c")
		f.stop()
		f = h.start("f")
		g.mustSwitch(toC)
		f.stop()
		g.stop()
	})
}

// A rejoin overwrites a member: never by what a frontend believes that is cut off,
// and never the active.
func TestRejoinAsksTheStoreFirst(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := newHost(t)
		var attempts []int
		l := &hookLog{}
		l.do = map[Hook]func(HookCall){HookRejoin: func(c HookCall) { attempts = append(attempts, c.Attempt) }}
		f := h.startWith(l, HookRejoin)
		if err := f.failover(true, "b"); err != nil {
			t.Fatal(err)
		}
		rejoins := func() error {
			_, err := f.Rejoin(t.Context(), RejoinRequest{Role: "ma01", Member: "a"})
			return err
		}
		h.site.fail(errors.New("no quorum"))
		if err := rejoins(); err == nil || len(attempts) > 0 {
			t.Errorf("%v, attempts %v", err, attempts)
		}
		h.site.fail(nil)
		l.fail = map[Hook]error{HookRejoin: errors.New("exit status 1")}
		if rejoins() == nil {
			t.Error("a rejoin that failed counts")
		}
		l.fail = nil
		if err := rejoins(); err != nil || !slices.Equal(attempts, []int{1, 2}) {
			t.Errorf("%v, attempts %v", err, attempts)
		}
		f.stop()
		s := emptyState()
		s.Roles["r"] = Row{Members: []string{"a", "b"}, Active: "b", Phase: PhaseOpen, Stale: map[string]Stale{"b": {Number: 1}}}
		if _, err := (rules{}).rejoining(s, "r", "b", "f.1", ScopeRole); !errors.Is(err, ErrConflict) {
			t.Errorf("the active rejoins: %v", err)
		}
	})
}

// A failover takes over a switch of one of its roles, and is aborted before it
// has begun anything itself: what that one has begun is undone.
func TestFailoverOfRolesThatStandDifferently(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := newHost(t)
		l := &hookLog{site: h.site, slow: map[Hook]time.Duration{HookDemote: 10 * time.Second}}
		members := []string{"a", "b"}
		h.opt.Roles = map[string]RoleConfig{
			"ma01": {Members: members, Active: "a", Hooks: []Hook{HookDemote, HookUndoDemote, HookPromote}, Scope: ScopeRole},
			"ma02": {Members: members, Active: "a", Hooks: []Hook{HookFence, HookUndoDemote, HookPromote}},
		}
		h.opt.Hooks = l
		f := h.start("f")
		f.goSwitch(toB)
		time.Sleep(time.Second)
		stay := f.enter("carol")
		ctx, cancel := context.WithTimeout(t.Context(), time.Hour)
		defer cancel()
		if _, err := f.Failover(ctx, FailoverRequest{Role: "ma02", To: "b"}, nil); err == nil || !strings.Contains(err.Error(), "was aborted") {
			t.Errorf("while carol was on a: %v", err)
		}
		stay.Leave(proven)
		if want := []Hook{HookDemote, HookUndoDemote}; !slices.Equal(l.ran, want) {
			t.Errorf("hooks %v, want %v", l.ran, want)
		}
		for role, row := range f.Snapshot().Roles {
			if row.Phase != PhaseOpen || row.Active != "a" {
				t.Errorf("%s: %+v", role, row)
			}
		}
		f.stop()
	})
}

// Safety 21: a role that opens on a backend while a switch is compared for is
// not restarted under its users.
func TestSafety21RoleThatCameSinceTheRequest(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h, l := newHost(t), &compareLog{}
		l.site = h.site
		members := []string{"a", "b"}
		h.opt.Roles = map[string]RoleConfig{
			"ma01": {Members: members, Active: "a", Hooks: []Hook{HookDemote, HookCatchUp}},
			"ma03": {Members: members},
		}
		h.opt.Hooks = l
		f := h.start("f")
		l.compare = func(ctx context.Context, _ HookCall) (Seen, string, error) {
			if _, err := f.InitRole(ctx, "ma03", "a", "root", false); err != nil {
				t.Error(err)
			}
			return Seen{}, "all equal", nil
		}
		f.mustFail(toB, "ma03")
		if len(l.ran) > 0 {
			t.Errorf("hooks %v ran under ma03's users", l.ran)
		}
		l.compare = nil
		f.mustSwitch(toB)
		if row := f.Snapshot().Roles["ma03"]; row.Active != "b" {
			t.Errorf("%+v", row)
		}
		f.stop()
	})
}

// A report that hands in residues is long on its way. Meanwhile the role is held by
// somebody who waits for no report: no ack overtakes what the report carries.
func TestNoAckOvertakesAReport(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := newHost(t)
		g := h.start("g") // drives
		arrives := make(chan struct{})
		f := h.startOn("f", func(old, now *State) (<-chan struct{}, error) {
			if q := now.Roles["ma01"].Request; q != nil && len(q.Reports) > len(old.Roles["ma01"].Request.Reports) {
				return arrives, nil
			}
			return nil, nil
		})
		stay := f.enter("alice")
		stay.Leave(End{Why: "reset by the client"})

		asked := g.goSwitch(toB)
		synctest.Wait() // f's report is on its way
		failed := make(chan error, 1)
		go func() {
			_, err := g.Failover(t.Context(), FailoverRequest{Role: "ma01", To: "b", AcceptLoss: true}, nil)
			failed <- err
		}()
		synctest.Wait()
		if row := g.Snapshot().Roles["ma01"]; row.Phase != PhaseHold || g.Snapshot().Frontends[f.ID()].Floors["ma01"] >= row.Epoch {
			t.Errorf("an ack has gone out: %+v, %v", row, g.Snapshot().Frontends[f.ID()].Floors)
		}
		close(arrives) // and finds the request gone
		if err := <-failed; err != nil {
			t.Error(err)
		}
		<-asked
		rec := g.Snapshot().History
		if last := rec[len(rec)-1]; last.Unclean != 1 {
			t.Errorf("the residue did not come with the ack: %+v", last)
		}
		f.stop()
		g.stop()
	})
}
