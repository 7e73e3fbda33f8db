package routing

import (
	"context"
	"errors"
	"strings"
	"testing"
	"testing/synctest"
	"time"
)

func TestSafety09RegistrationLost(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := newHost(t)
		f, g := h.start("f"), h.start("g")
		old, first := f.enter("alice"), f.ID()
		s := h.site.get().Clone()
		s.Revision++
		delete(s.Frontends, first)
		h.site.replace(s)
		<-old.Revoked()
		f.until(func(s *State) bool { return len(s.Frontends) == 2 })
		synctest.Wait()
		if f.ID() == first || !strings.HasPrefix(f.ID(), "f.") {
			t.Errorf("the new ID is %s, was %s", f.ID(), first)
		}
		f.enter("bob").Leave(proven)
		// alice still drains: a switch has to wait for that.
		g.mustFail(toB, f.ID())
		old.Leave(proven)
		g.mustSwitch(toB)
		f.stop()
		g.stop()
	})
}

// The registration is done, and its answer gets lost: trying again completes it.
func TestSafety09RegistrationUnanswered(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := newHost(t)
		f := h.start("f")
		first := f.ID()
		s := h.site.get().Clone()
		s.Revision++
		delete(s.Frontends, first)
		h.site.mu.Lock()
		h.site.silent = true
		h.site.mu.Unlock()
		h.site.replace(s)
		synctest.Wait()
		time.Sleep(time.Minute)
		registered := h.site.get().Frontends
		if _, is := registered[f.ID()]; !is || f.ID() == first || len(registered) != 1 {
			t.Fatalf("%s, before %s, is one of %v", f.ID(), first, sortedKeys(registered))
		}
		f.enter("alice").Leave(proven)
		f.mustSwitch(toB)
		f.stop()
	})
}

func TestSafety11LateJoinerParks(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := newHost(t)
		f := h.start("f")
		stuck := f.enter("alice")
		done := f.goSwitch(toB)
		synctest.Wait()
		g := h.start("g")
		if _, err := g.Enter(t.Context(), "bob", NoWait()); !errors.Is(err, ErrHeld) {
			t.Errorf("the late joiner admits: %v", err)
		}
		stuck.Leave(proven)
		if err := <-done; err != nil {
			t.Fatal(err)
		}
		g.enter("bob").Leave(proven)
		f.stop()
		g.stop()
	})
}

// Who registers before HOLD is waited for: nothing begins without its report, and
// nothing opens without its ack.
func TestSafety11EveryMemberIsWaitedFor(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := newHost(t)
		f := h.start("f")
		silent := h.site.open()
		if err := silent.Join(t.Context(), "silent.1"); err != nil {
			t.Fatal(err)
		}
		if _, err := silent.Update(t.Context(), func(s *State) error {
			return rules{}.register(s, "silent.1", Frontend{Backends: []string{"a", "b"}})
		}); err != nil {
			t.Fatal(err)
		}
		f.mustFail(toB, "no report from frontend silent.1")
		if row := f.Snapshot().Roles["ma01"]; row.Epoch != 1 {
			t.Errorf("the role was held: %+v", row)
		}
		h.site.observe(func(_, now *State) {
			row := now.Roles["ma01"]
			if row.Request != nil {
				rules{}.report(now, "silent.1", "ma01", row.Request.Number, Report{}, nil)
			}
		})
		f.mustFail(toB, "no ack from frontend silent.1")
		f.stop()
	})
}

func TestSafety14WipedStore(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := newHost(t)
		f := h.start("f")
		f.mustSwitch(toB) // ma01 is on b in epoch 2
		f.enter("alice").Leave(proven)
		h.site.replace(emptyState())
		f.until(func(s *State) bool { return s.Roles["ma01"].Doubt != nil && len(s.Frontends) == 1 })
		synctest.Wait()
		if row := h.site.get().Roles["ma01"]; row.Doubt == nil || row.Doubt.Known != 2 || row.Phase == PhaseOpen {
			t.Errorf("the store has %+v, want it in doubt", row)
		}
		// Who has a snapshot goes on; who has none serves nobody.
		s := f.enter("alice")
		if s.Backend != "b" {
			t.Errorf("alice entered %s", s.Backend)
		}
		h.opt.Local = newMemLocal()
		g := h.start("g")
		if _, err := g.Enter(t.Context(), "alice"); !errors.Is(err, ErrInDoubt) {
			t.Errorf("a frontend without a snapshot: %v, want ErrInDoubt", err)
		}
		g.mustFail(SwitchRequest{Role: "ma01", To: "a"}, "roles init")
		// The operator decides; alice must have left b before a opens.
		done := make(chan error, 1)
		go func() {
			_, err := g.InitRole(context.Background(), "ma01", "a", "test", false)
			done <- err
		}()
		select {
		case <-s.Revoked():
		case err := <-done:
			t.Fatal("alice may stay on b: ", err)
		}
		s.Leave(proven)
		if err := <-done; err != nil {
			t.Fatal(err)
		}
		for _, p := range []*process{f, g} {
			s := p.enter("alice")
			if s.Backend != "a" || s.Epoch != 3 {
				t.Errorf("alice entered %s in epoch %d, want a in 3", s.Backend, s.Epoch)
			}
			s.Leave(proven)
		}
		f.stop()
		g.stop()
	})
}

// A frontend that was down comes to a store that was lost, and in which the
// operator has decided: what it kept is of before that.
func TestSafety14DecidedWhileDown(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := newHost(t)
		h.opt.Local = newMemLocal() // a host of its own
		down := h.start("down")
		for range 5 {
			down.mustSwitch(toB)
			down.mustSwitch(SwitchRequest{Role: "ma01", To: "a"})
		}
		synctest.Wait()
		kept := down.Snapshot()
		down.stop()

		opt := h.opt
		h.opt.Local = nil
		f := h.start("f")
		synctest.Wait()
		h.site.replace(emptyState())
		f.until(func(s *State) bool { return s.Roles["ma01"].Doubt != nil })
		synctest.Wait()
		if _, err := f.InitRole(t.Context(), "ma01", "b", "test", false); err != nil {
			t.Fatal(err)
		}
		alice := f.enter("alice")

		h.opt = opt
		g := h.start("g")
		if now := h.site.get(); now.Revision >= kept.Revision || now.Roles["ma01"].Epoch <= kept.Roles["ma01"].Epoch {
			t.Fatalf("this test tests nothing: revision %d, kept %d", now.Revision, kept.Revision)
		}
		again := g.enter("alice")
		if alice.Backend != "b" || again.Backend != "b" {
			t.Errorf("alice is on %s and on %s", alice.Backend, again.Backend)
		}
		alice.Leave(proven)
		again.Leave(proven)
		g.mustSwitch(SwitchRequest{Role: "ma01", To: "a"})
		f.stop()
		g.stop()
	})
}

// The answer to an update of before the loss comes when the frontend knows of the
// loss already.
func TestSafety14AnswerOfBefore(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := newHost(t)
		arrives := make(chan struct{})
		h.site.late = func(now *State) <-chan struct{} {
			if row := now.Roles["ma01"]; row.Epoch == 2 && row.Phase == PhaseOpen {
				return arrives
			}
			return nil
		}
		f := h.start("f")
		f.mustSwitch(toB)
		h.site.replace(emptyState())
		f.until(func(s *State) bool { return s.Roles["ma01"].Doubt != nil })
		time.Sleep(time.Second) // it registers anew
		alice := f.enter("alice")
		id, before := f.ID(), h.site.get()
		close(arrives)
		time.Sleep(time.Minute)
		now := h.site.get()
		if f.ID() != id || len(now.Frontends) != 1 || now.Revision != before.Revision || f.Snapshot().Revision != now.Revision {
			t.Errorf("%s, before %s, goes by revision %d; the store is at %d, before %d, with %v",
				f.ID(), id, f.Snapshot().Revision, now.Revision, before.Revision, sortedKeys(now.Frontends))
		}
		if err := alice.Check(); err != nil || alice.Backend != "b" {
			t.Errorf("alice on %s: %v", alice.Backend, err)
		}
		alice.Leave(proven)
		if _, err := f.InitRole(t.Context(), "ma01", "a", "test", false); err != nil {
			t.Fatal(err)
		}
		f.stop()
	})
}

// The store comes back with a registration that this frontend has had before:
// nobody else could answer for it.
func TestSafety14FormerRegistration(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := newHost(t)
		f := h.start("f")
		synctest.Wait()
		first, backup := f.ID(), h.site.get()
		lost := backup.Clone()
		lost.Revision++
		clear(lost.Frontends)
		h.site.replace(lost)
		synctest.Wait()
		second := f.ID()
		h.site.replace(backup)
		synctest.Wait()
		if now := h.site.get(); second == first || f.ID() == second || len(now.Frontends) != 1 {
			t.Fatalf("%s, before %s and %s, is one of %v", f.ID(), second, first, sortedKeys(now.Frontends))
		}
		if _, err := f.InitRole(t.Context(), "ma01", "b", "test", false); err != nil {
			t.Fatal(err)
		}
		f.enter("alice").Leave(proven)
		f.stop()
	})
}

// A wiped store is not seeded by a start that knows the roles; a restored one
// does not bring a former active back.
func TestSafety14RestartAgainstLostStore(t *testing.T) {
	for name, disaster := range map[string]func(first *State) *State{
		"wiped":    func(*State) *State { return emptyState() },
		"restored": func(first *State) *State { s := first.Clone(); clear(s.Frontends); return s },
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				h := newHost(t)
				f := h.start("f")
				first := h.site.get()
				f.mustSwitch(toB)
				synctest.Wait()
				f.stop()
				h.site.replace(disaster(first))
				f = h.start("f")
				synctest.Wait()
				s := f.enter("alice")
				if s.Backend != "b" {
					t.Errorf("alice entered %s, her mail is on b", s.Backend)
				}
				if row := h.site.get().Roles["ma01"]; row.Doubt == nil {
					t.Errorf("the store has %+v, want it in doubt", row)
				}
				s.Leave(proven)
				f.stop()
				// Also after one more start.
				f = h.start("f")
				s = f.enter("alice")
				if s.Backend != "b" || f.Snapshot().Roles["ma01"].Doubt == nil {
					t.Errorf("after another start: %s, %+v", s.Backend, f.Snapshot().Roles["ma01"])
				}
				s.Leave(proven)
				f.stop()
			})
		})
	}
}
