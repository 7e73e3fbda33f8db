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

// startOn starts a frontend whose commits late keeps on their way, or whose commits
// fail where it returns an error.
func (h *host) startOn(name string, late func(old, now *State) (<-chan struct{}, error)) *process {
	h.t.Helper()
	opt := h.opt
	store := &lateStore{memStore: h.site.open(), late: late}
	opt.ID, opt.Directory, opt.Local, opt.Store = NewID(name), h.dir, h.local, store
	table, err := Start(h.t.Context(), opt)
	if err != nil {
		h.t.Fatal(err)
	}
	return &process{h, table, store.memStore}
}

// depose lets another frontend be elected; p does not hear of it.
func (p *process) depose() {
	p.store.isDeposed.Store(true)
	<-p.host.site.driving
}

// withHooks are the hooks of ma01, which touch nothing else.
func (h *host) withHooks(l Hooks, has ...Hook) {
	c := h.opt.Roles["ma01"]
	c.Hooks, c.Scope = has, ScopeRole
	h.opt.Roles["ma01"], h.opt.Hooks = c, l
}

// logsInAgain leaves when it is revoked, and comes back; the outcome goes to errs.
func (p *process) logsInAgain(user string, errs chan<- error) {
	s := p.enter(user)
	go func() {
		<-s.Revoked()
		s.Leave(proven)
		again, err := p.Enter(context.Background(), user)
		if err == nil {
			again.Leave(proven)
		}
		errs <- err
	}()
}

// A deposed driver's OPEN is long on its way. Meanwhile its successor has taken the
// switch up, and its promote hook is at work: b does not open under it.
func TestALateOpenIsForItsOwnDriver(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := newHost(t)
		l := &hookLog{site: h.site}
		h.withHooks(l, HookDemote, HookPromote, HookUndoPromote, HookUndoDemote)
		h.site.observe(func(old, now *State) {
			l.mu.Lock()
			defer l.mu.Unlock()
			if old.Roles["ma01"].Phase == PhasePromote && now.Roles["ma01"].Phase == PhaseOpen && l.running > 0 {
				t.Error("b is opened while a hook is at work there")
			}
		})
		arrives := make(chan struct{})
		f := h.startOn("f", func(old, now *State) (<-chan struct{}, error) {
			if old.Roles["ma01"].Phase == PhasePromote && now.Roles["ma01"].Phase == PhaseOpen {
				return arrives, nil
			}
			return nil, nil
		})
		synctest.Wait() // f drives
		g := h.start("g")
		ended := f.goSwitch(toB)
		synctest.Wait()
		l.mu.Lock()
		l.slow = map[Hook]time.Duration{HookPromote: 5 * time.Second} // when g drives
		l.mu.Unlock()
		f.depose()
		time.Sleep(time.Second)
		close(arrives)
		if err := <-ended; err != nil {
			t.Error(err)
		}
		if rec := g.Snapshot().History[0]; rec.Attempt != 2 {
			t.Errorf("%+v", rec)
		}
		g.stop()
		f.stop()
	})
}

// A deposed driver writes down what it has found. Its successor compares more
// users by then: the old result is not theirs.
func TestALateComparisonIsForItsOwnDriver(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h, l := newHost(t), &compareLog{}
		l.site = h.site
		h.withHooks(l, HookCatchUp)
		first := h.start("first")
		first.mustSwitch(toB) // from now on Seen says who was seen
		first.stop()
		l.of = nil

		arrives := make(chan struct{})
		f := h.startOn("f", func(old, now *State) (<-chan struct{}, error) {
			was, is := old.Roles["ma01"].Request, now.Roles["ma01"].Request
			if was != nil && is != nil && is.Comparison != nil && is.Comparison.Found != "" && was.Comparison.Found == "" {
				return arrives, nil
			}
			return nil, nil
		})
		synctest.Wait() // f drives
		g, x := h.start("g"), h.start("x")
		g.enter("alice").Leave(proven)
		ended := f.goSwitch(toA)
		synctest.Wait() // f has compared alice
		x.enter("bob").Leave(proven)
		x.stop() // its goodbye hands bob in
		l.mu.Lock()
		l.compare = func(context.Context, HookCall) (Seen, string, error) {
			time.Sleep(10 * time.Second)
			return Seen{Users: []string{"bob"}}, "1 differs", nil
		}
		l.mu.Unlock()
		f.depose()
		time.Sleep(5 * time.Second) // g compares both
		close(arrives)
		time.Sleep(time.Second)
		if q := g.Snapshot().Roles["ma01"].Request; q == nil || q.Comparison == nil || q.Comparison.Found != "" {
			t.Errorf("the comparison of both has not ended: %+v", q)
		}
		if err := <-ended; err != nil {
			t.Error(err)
		}
		if rec := g.Snapshot().History; rec[len(rec)-1].Compared != "1 differs" {
			t.Errorf("%+v", rec[len(rec)-1])
		}
		g.stop()
		f.stop()
	})
}

// A driver that finds a switch in other hands ends its hook there and then: the
// other one's is at work.
func TestADeposedDriverEndsItsHook(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := newHost(t)
		l := &hookLog{site: h.site, slow: map[Hook]time.Duration{HookDemote: 3 * time.Second}}
		h.withHooks(l, HookDemote, HookUndoDemote)
		f := h.start("f")
		synctest.Wait() // f drives
		g := h.start("g")
		ended := f.goSwitch(toB)
		synctest.Wait()
		f.depose()
		synctest.Wait()
		l.mu.Lock()
		if len(l.ran) != 2 || l.running != 1 {
			t.Errorf("hooks called: %d, at work: %d", len(l.ran), l.running)
		}
		l.mu.Unlock()
		if err := <-ended; err != nil {
			t.Error(err)
		}
		g.stop()
		f.stop()
	})
}

// The store does not take that a second driver takes the switch up: it tries
// again before it does anything, so that its hooks have a number of their own.
func TestNoHookBeforeTakingUp(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := newHost(t)
		var attempts []int
		l := &hookLog{site: h.site, slow: map[Hook]time.Duration{HookDemote: 3 * time.Second}}
		l.do = map[Hook]func(HookCall){HookDemote: func(c HookCall) { attempts = append(attempts, c.Attempt) }}
		h.withHooks(l, HookDemote, HookUndoDemote)
		f := h.start("f")
		synctest.Wait()
		failures := 1
		g := h.startOn("g", func(old, now *State) (<-chan struct{}, error) {
			was, is := old.Roles["ma01"].Switch, now.Roles["ma01"].Switch
			if was != nil && is != nil && is.Attempt == was.Attempt+1 && failures > 0 {
				failures--
				return nil, errors.New("the leader changed")
			}
			return nil, nil
		})
		ended := g.goSwitch(toB)
		time.Sleep(time.Second)
		f.kill() // its hook may be an orphan
		if err := <-ended; err != nil {
			t.Error(err)
		}
		if !slices.Equal(attempts, []int{2}) {
			t.Errorf("hooks that came to their end were of attempts %v", attempts)
		}
		g.stop()
	})
}

// The frontend that held a role dies at once: the time until another drives counts
// for those who wait.
func TestTheFirstDriversTimeCounts(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := newHost(t)
		h.withHooks(&hookLog{site: h.site, slow: map[Hook]time.Duration{HookDemote: time.Hour}}, HookDemote)
		f := h.start("f")
		synctest.Wait()
		g := h.start("g")
		held := make(chan struct{})
		h.site.observe(func(old, now *State) {
			if old.Roles["ma01"].Phase == PhaseOpen && now.Roles["ma01"].Phase == PhaseHold {
				close(held)
			}
		})
		errs := make(chan error, 1)
		g.logsInAgain("alice", errs)
		ended := g.goSwitch(toB)
		<-held
		f.store.isDeposed.Store(true) // nobody else drives before its lease has run out
		f.kill()
		time.Sleep(10 * time.Second)
		<-h.site.driving
		if err := <-ended; err == nil {
			t.Error("the switch has succeeded")
		}
		if err := <-errs; err != nil {
			t.Errorf("alice was refused: %v", err)
		}
		g.stop()
	})
}

// What the store does not take from one switch keeps no other from going on.
func TestOneSwitchDoesNotStopOthers(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := newHost(t)
		for role, c := range h.opt.Roles {
			c.Hooks, c.Scope, c.Active = []Hook{HookDemote}, ScopeRole, "a"
			h.opt.Roles[role] = c
		}
		h.opt.Hooks = &hookLog{site: h.site, slow: map[Hook]time.Duration{HookDemote: 3 * time.Second}}
		f := h.startOn("f", func(old, now *State) (<-chan struct{}, error) {
			if now.Roles["ma02"].Phase == PhaseHold && old.Roles["ma02"].Phase == PhaseOpen {
				return nil, errors.New("it does not fit")
			}
			return nil, nil
		})
		synctest.Wait()
		ended := f.goSwitch(toB)
		time.Sleep(time.Second)
		other := f.goSwitch(SwitchRequest{Role: "ma02", To: "b"})
		if err := <-ended; err != nil {
			t.Error(err)
		}
		if err := f.Abort(t.Context(), AbortRequest{Role: "ma02"}); err != nil {
			t.Error(err)
		}
		if err := <-other; err == nil || !strings.Contains(err.Error(), "aborted") {
			t.Error(err)
		}
		f.stop()
	})
}

// A hook has shown that a is off, and the store does not take it, because an ack
// is missing still: it is run again.
func TestWhatAHookHasShownIsWrittenDown(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := newHost(t)
		l := &hookLog{slow: map[Hook]time.Duration{HookFence: 5 * time.Second}}
		f := h.startWith(l, HookFence, HookUndoDemote)
		g := h.start("g")
		s := g.enter("alice")
		go func() { // g is taken for dead, and drains
			<-s.Revoked()
			time.Sleep(8 * time.Second)
			s.Leave(proven)
		}()
		if _, err := h.site.open().Update(t.Context(), func(s *State) error { return rules{}.bury(s, g.ID(), time.Now()) }); err != nil {
			t.Fatal(err)
		}
		if err := f.failover(false, "b"); err != nil {
			t.Error(err)
		}
		g.stop()
		f.stop()
	})
}

// The operator says that b is down: nobody waits any longer for the hook that would
// undo b's promotion.
func TestWhatIsGivenUpIsNotUndone(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := newHost(t)
		l := &hookLog{slow: map[Hook]time.Duration{HookUndoPromote: time.Hour}, fail: map[Hook]error{HookPromote: errors.New("exit status 1")}}
		f := h.startWith(l, AllHooks...)
		ended := f.goSwitch(toB)
		time.Sleep(5 * time.Second)
		if err := f.Abort(t.Context(), AbortRequest{Role: "ma01", ConfirmedDown: true}); err != nil {
			t.Fatal(err)
		}
		begun := time.Now()
		if err := <-ended; err == nil || time.Since(begun) > 2*time.Second {
			t.Errorf("a was opened %v later: %v", time.Since(begun), err)
		}
		f.stop()
	})
}

// That demote has ended is written down late. It does not run again meanwhile: it would
// be cut off when the next phase comes.
func TestALateStepCutsNoHookOff(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := newHost(t)
		l := &hookLog{site: h.site, slow: map[Hook]time.Duration{HookDemote: 3 * time.Second, HookPromote: time.Second}}
		h.withHooks(l, HookDemote, HookPromote, HookUndoDemote, HookUndoPromote)
		f := h.start("f")
		ended := f.goSwitch(toB)
		time.Sleep(2900 * time.Millisecond)
		h.site.fail(errors.New("no answer"))
		time.Sleep(2 * time.Second)
		h.site.fail(nil)
		number := h.site.get().Roles["ma01"].Switch.Number
		if _, err := h.site.open().Update(t.Context(), func(s *State) error { // it has been on its way
			if err := (rules{}).ran(s, "ma01", number, HookRun{Hook: HookDemote, Attempt: 1, Began: time.Now().Add(-5 * time.Second)}); err != nil {
				return err
			}
			return rules{}.advance(s, "ma01", PhaseDemote, time.Now())
		}); err != nil {
			t.Fatal(err)
		}
		if err := <-ended; err != nil {
			t.Error(err)
		}
		if rec := f.Snapshot().History[0]; !slices.Equal(l.ran, []Hook{HookDemote, HookPromote}) || len(rec.Runs) != 2 {
			t.Errorf("hooks %v ran, and the history has %+v", l.ran, rec.Runs)
		}
		f.stop()
	})
}

// A hook's end counts for its own phase only.
func TestTheEndOfAnEarlierPhase(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := newHost(t)
		l := &hookLog{site: h.site, slow: map[Hook]time.Duration{HookPromote: 5 * time.Second}}
		h.withHooks(l, HookDemote, HookPromote, HookUndoDemote, HookUndoPromote)
		f := h.start("f")
		ended := f.goSwitch(toB)
		time.Sleep(time.Second) // promote is at work
		d := newDriver(f.Table)
		sw := f.Snapshot().Roles["ma01"].Switch
		d.token = sw.Driver
		d.switches[sw.Number] = &driving{number: sw.Number, roles: []string{"ma01"}, isMine: true, since: time.Now(), hook: HookDemote, in: PhaseDemote}
		d.hookEnded(t.Context(), hookEnd{number: sw.Number, run: HookRun{Hook: HookDemote, Began: time.Now()}})
		if row := h.site.get().Roles["ma01"]; row.Phase != PhasePromote || len(row.Switch.Runs) != 1 {
			t.Errorf("demote's end has led to %s while promote runs: %+v", row.Phase, row.Switch)
		}
		if err := <-ended; err != nil {
			t.Error(err)
		}
		f.stop()
	})
}
