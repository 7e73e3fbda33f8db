package routing

import (
	"context"
	"errors"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"go.uber.org/goleak"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// toB is the switch that most tests make.
var toB = SwitchRequest{Role: "ma01", To: "b", Who: "test", Why: "test"}

// goSwitch runs a switch in the background.
func (p *process) goSwitch(req SwitchRequest) <-chan error {
	done := make(chan error, 1)
	go func() {
		_, err := p.Switch(context.Background(), req, nil)
		done <- err
	}()
	return done
}

func TestSwitchDrainsAndLetsIn(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := newHost(t)
		var kinds []EventKind
		h.opt.OnEvent = func(e Event) { kinds = append(kinds, e.Kind) }
		f := h.start("f")
		old := f.enter("alice")
		if old.Backend != "a" || old.Epoch != 1 || old.Check() != nil {
			t.Fatalf("alice is on %s in epoch %d: %v", old.Backend, old.Epoch, old.Check())
		}
		done := f.goSwitch(toB)
		<-old.Revoked()
		if !errors.Is(old.Check(), ErrRevoked) {
			t.Errorf("Check of a revoked stay = %v", old.Check())
		}
		entered := make(chan *Stay)
		go func() { entered <- f.enter("bob") }()
		synctest.Wait()
		st := f.Roles()[0]
		if st.Phase != PhaseHold || st.Parked != 1 || st.Below != 1 || !slices.Equal(st.Missing, []string{f.ID()}) {
			t.Errorf("while draining: %+v", st)
		}
		old.Leave(proven)
		old.Leave(End{Why: "twice"})
		if err := <-done; err != nil {
			t.Fatal(err)
		}
		s := <-entered
		if s.Backend != "b" || s.Epoch != 2 {
			t.Errorf("bob entered %s in epoch %d, want b in 2", s.Backend, s.Epoch)
		}
		if got := f.ActiveBackends(); !slices.Equal(got, []string{"b"}) {
			t.Errorf("ActiveBackends = %v", got)
		}
		s.Leave(proven)
		f.stop()
		for _, k := range []EventKind{EventHeld, EventRevoked, EventParked, EventAcked, EventOpened} {
			if !slices.Contains(kinds, k) {
				t.Errorf("no event %q in %v", k, kinds)
			}
		}
		if slices.Contains(kinds, EventResidue) {
			t.Error("a proven end left a residue")
		}
	})
}

func TestSwitchProgressAndRecord(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := newHost(t)
		f := h.start("f")
		var kinds []EventKind
		rec, err := f.Switch(t.Context(), toB, func(e Event) { kinds = append(kinds, e.Kind) })
		if err != nil {
			t.Fatal(err)
		}
		if !slices.Equal(kinds, []EventKind{EventHeld, EventAcked, EventOpened}) {
			t.Errorf("progress = %v", kinds)
		}
		if !rec.Done || rec.From != "a" || rec.To != "b" || rec.Epochs["ma01"] != 2 || rec.Number != 1 || rec.Attempt != 1 {
			t.Errorf("record = %+v", rec)
		}
		if _, err := f.Switch(t.Context(), toB, nil); !errors.Is(err, ErrConflict) || !strings.Contains(err.Error(), "active already") {
			t.Errorf("second switch to b: %v", err)
		}
		f.stop()
	})
}

// A stay that does not drain: the switch aborts in time, naming the frontend,
// and nobody was refused.
func TestBudgetAborts(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := newHost(t)
		f, g := h.start("f"), h.start("g")
		stuck := f.enter("alice")
		done := g.goSwitch(toB)
		synctest.Wait()
		begin := time.Now()
		parked := g.enter("bob")
		if waited := time.Since(begin); waited < defaultBudget || waited >= defaultHoldWindow {
			t.Errorf("bob waited %v, want the budget %v", waited, defaultBudget)
		}
		if parked.Backend != "a" || parked.Epoch != 3 {
			t.Errorf("after the abort bob is on %s in epoch %d, want a in 3", parked.Backend, parked.Epoch)
		}
		err := <-done
		if err == nil || !strings.Contains(err.Error(), f.ID()) || strings.Contains(err.Error(), g.ID()) {
			t.Errorf("the switch's error must name %s only: %v", f.ID(), err)
		}
		stuck.Leave(proven)
		parked.Leave(proven)
		f.stop()
		g.stop()
	})
}

// The window counts from first parking, also when the role flips meanwhile.
func TestHoldWindow(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := newHost(t)
		f := h.start("f")
		stuck := f.enter("alice")
		done := f.goSwitch(toB)
		synctest.Wait()
		refused := make(chan error)
		begin := time.Now()
		go func() {
			_, err := f.Enter(context.Background(), "bob")
			refused <- err
		}()
		// The abort and the next hold are one flip.
		h.site.observe(func(_, now *State) {
			if row := now.Roles["ma01"]; row.Phase == PhaseOpen {
				rules{}.hold(now, []string{"ma01"}, order{to: "b", who: "test", why: "again"}, time.Now())
			}
		})
		err := <-refused
		if waited := time.Since(begin); !errors.Is(err, ErrHeld) || waited != defaultHoldWindow {
			t.Errorf("bob got %v after %v, want ErrHeld after %v", err, waited, defaultHoldWindow)
		}
		h.site.observe(nil)
		if err := <-done; err == nil {
			t.Error("the first switch cannot have succeeded")
		}
		stuck.Leave(proven)
		f.stop()
	})
}

func TestMaxParkedAndNoWait(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := newHost(t)
		h.opt.Parking.Total = 2
		f := h.start("f")
		stuck := f.enter("alice")
		done := f.goSwitch(toB)
		synctest.Wait()
		entered := make(chan *Stay)
		for range 2 {
			go func() { entered <- f.enter("bob") }()
		}
		synctest.Wait()
		begin := time.Now()
		if _, err := f.Enter(t.Context(), "bob"); !errors.Is(err, ErrHeld) {
			t.Errorf("the third parked login got %v, want ErrHeld", err)
		}
		if _, err := f.Enter(t.Context(), "alice", NoWait()); !errors.Is(err, ErrHeld) {
			t.Errorf("NoWait got %v, want ErrHeld", err)
		}
		ctx, cancel := context.WithTimeout(t.Context(), 0)
		defer cancel()
		if _, err := f.Enter(ctx, "carol"); err != nil {
			t.Errorf("another role must not park: %v", err)
		}
		if time.Since(begin) != 0 {
			t.Errorf("refusals took %v", time.Since(begin))
		}
		stuck.Leave(proven)
		(<-entered).Leave(proven)
		(<-entered).Leave(proven)
		if err := <-done; err != nil {
			t.Error(err)
		}
		f.Close(context.Background())
	})
}

// Whoever holds the campaign drives: the switch survives its driver.
func TestSwitchSurvivesDriver(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := newHost(t)
		f := h.start("f") // the driver
		synctest.Wait()
		g := h.start("g")
		stay := g.enter("alice")
		done := g.goSwitch(toB)
		synctest.Wait()
		f.kill()
		synctest.Wait()
		stay.Leave(proven)
		err := <-done
		// f is gone without a goodbye, but had acked: nothing of it is on a.
		if err != nil {
			t.Fatal(err)
		}
		rec := g.Snapshot().History[0]
		if rec.Attempt != 2 {
			t.Errorf("attempt = %d, want 2", rec.Attempt)
		}
		g.until(func(s *State) bool { return len(s.Frontends) == 1 })
		for _, r := range g.Snapshot().Roles["ma01"].Residues {
			if r.Backend == "a" {
				t.Errorf("residue of the dead frontend: %+v", r)
			}
		}
		g.stop()
	})
}

func TestExplainHasNoSideEffects(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := newHost(t)
		f := h.start("f")
		x := f.Explain(t.Context(), "alice")
		if x.Role != "ma01" || x.Backend != "a" || x.Parks != "" || x.LastRole != "" || x.Error != "" {
			t.Errorf("Explain(alice) = %+v", x)
		}
		if last, _ := h.local.Recall("alice"); last != "" {
			t.Errorf("Explain remembered %q", last)
		}
		if x := f.Explain(t.Context(), "nobody"); !strings.Contains(x.Error, ErrUnknownUser.Error()) {
			t.Errorf("Explain(nobody) = %+v", x)
		}
		s := f.enter("alice")
		h.dir.set("alice", Entry{"alice", "ma02"})
		x = f.Explain(t.Context(), "alice")
		if x.Role != "ma01" || !x.Disagrees || x.DirectoryRole != "ma02" || len(x.Sessions) != 1 {
			t.Errorf("Explain(alice) after the directory's change = %+v", x)
		}
		s.Leave(proven)
		f.stop()
	})
}

func TestUnknownUserAndClosed(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := newHost(t)
		f := h.start("f")
		if _, err := f.Enter(t.Context(), "nobody"); !errors.Is(err, ErrUnknownUser) {
			t.Errorf("Enter(nobody) = %v", err)
		}
		if f.Ready() != nil {
			t.Error(f.Ready())
		}
		stuck := f.enter("alice")
		f.goSwitch(toB)
		synctest.Wait()
		refused := make(chan error)
		go func() {
			_, err := f.Enter(context.Background(), "bob")
			refused <- err
		}()
		synctest.Wait()
		f.stop()
		if err := <-refused; !errors.Is(err, ErrClosed) {
			t.Errorf("a parked login at the end got %v", err)
		}
		if f.Ready() == nil {
			t.Error("a closed table is ready")
		}
		<-stuck.Revoked()
		stuck.Leave(proven)
		rest := h.site.get().Roles["ma01"].Residues
		if len(rest) != 1 || rest[0].User != "alice" || rest[0].Backend != "a" {
			t.Errorf("residues after Close with a stay inside: %+v", rest)
		}
		if len(h.site.get().Frontends) != 0 {
			t.Error("still registered after the goodbye")
		}
	})
}

// Without the store, logins go on from the last snapshot, and what is owed to
// it is made up for afterwards.
func TestStoreAway(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := newHost(t)
		f := h.start("f")
		stay := f.enter("alice")
		begun := make(chan error, 1)
		h.site.observe(func(_, now *State) {
			if now.Roles["ma01"].Phase == PhaseHold && now.Frontends[f.opt.ID].Floors["ma01"] < 2 {
				go h.site.fail(errors.New("connection refused")) // right behind HOLD
			}
		})
		go func() {
			_, err := f.Switch(context.Background(), toB, nil)
			begun <- err
		}()
		<-stay.Revoked()
		synctest.Wait()
		f.enter("carol").Leave(proven)
		stay.Leave(proven)
		if _, err := f.Switch(t.Context(), SwitchRequest{Role: "ma02", To: "a"}, nil); err == nil || errors.Is(err, ErrConflict) {
			t.Errorf("a switch without the store: %v", err)
		}
		h.site.observe(nil)
		h.site.fail(nil)
		if err := <-begun; err != nil {
			t.Error(err)
		}
		f.stop()
	})
}

// A role that the configuration gained is no use before the operator says so.
func TestInitNewRole(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := newHost(t)
		f, g := h.start("f"), h.start("g")
		h.opt.Roles["ma03"] = RoleConfig{Members: []string{"a", "b"}, Active: "a"}
		h.dir.set("dave", Entry{"dave", "ma03"})
		n := h.start("n")
		if _, err := n.Enter(t.Context(), "dave"); err == nil || !strings.Contains(err.Error(), "roles init ma03") {
			t.Errorf("Enter into a role outside the table: %v", err)
		}
		rec, err := n.InitRole(t.Context(), "ma03", "a", "test", false)
		if err != nil || !rec.Done || rec.Epochs["ma03"] != 1 {
			t.Fatalf("%+v, %v", rec, err)
		}
		for _, p := range []*process{f, g, n} {
			p.until(func(s *State) bool { return s.Roles["ma03"].Phase == PhaseOpen })
			p.enter("dave").Leave(proven)
			p.stop()
		}
	})
}
