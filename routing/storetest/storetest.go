// Package storetest is the contract of routing.Store as a test suite. Every
// implementation passes it.
package storetest

import (
	"context"
	"errors"
	"fmt"
	"reflect"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/posthouse/posthouse/routing"
)

// patience bounds every wait: what takes longer never comes.
const patience = 20 * time.Second

// prompt is how soon others see a change. The contract says "whenever", the
// design needs well under a second: a switch waits for the slowest.
const prompt = time.Second

// Opener makes a new, empty store and returns a func that opens one more
// handle to it. Each handle stands for a process of its own. The opener closes
// what the test leaves open in t.Cleanup; closing twice must be harmless.
type Opener func(t *testing.T) func() routing.Store

// Run tests an implementation.
func Run(t *testing.T, open Opener) {
	for _, c := range []struct {
		name string
		test func(*testing.T, func() routing.Store)
	}{
		{"Load/Empty", loadEmpty},
		{"Load/EverythingSurvives", loadEverything},
		{"Load/Linearizable", loadLinearizable},
		{"Update/RevisionGrowsByOne", updateRevision},
		{"Update/SeesTheNewest", updateSeesNewest},
		{"Update/RefusesByTheNewest", updateRefusesByNewest},
		{"Update/ErrorWritesNothing", updateError},
		{"Update/ChangeIsPrivate", updateIsPrivate},
		{"Update/EndedContext", updateEndedContext},
		{"Update/NoneIsLost", updateNoneIsLost},
		{"Watch/FirstAtOnce", watchFirst},
		{"Watch/PromptForAll", watchPrompt},
		{"Watch/NewestOnly", watchNewest},
		{"Watch/SilentWithoutChange", watchSilent},
		{"Watch/EndsWithContext", watchEnds},
		{"Join/TwiceRefused", joinTwice},
		{"Join/RefusedForEver", joinForEver},
		{"Join/RaceHasOneWinner", joinRace},
		{"Gone/OnlyProven", goneOnlyProven},
		{"Gone/AfterClose", goneAfterClose},
		{"Campaign/HandsOver", campaignHandsOver},
		{"Campaign/EndsWithContext", campaignContext},
		{"Campaign/EndsWithClose", campaignClose},
		{"Campaign/OneAtATime", campaignExclusive},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			c.test(t, open(t))
		})
	}
}

func within(t *testing.T, d time.Duration) context.Context {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), d)
	t.Cleanup(cancel)
	return ctx
}

func update(t *testing.T, s routing.Store, change func(*routing.State)) *routing.State {
	t.Helper()
	state, err := s.Update(within(t, patience), func(s *routing.State) error {
		change(s)
		return nil
	})
	if err != nil {
		t.Fatalf("Update: %v", err)
	}
	return state
}

func bump(s *routing.State) { s.Switches++ }

func load(t *testing.T, s routing.Store) *routing.State {
	t.Helper()
	state, err := s.Load(within(t, patience))
	if err != nil {
		t.Fatalf("Load: %v", err)
	}
	return state
}

func join(t *testing.T, s routing.Store, id string) {
	t.Helper()
	if err := s.Join(within(t, patience), id); err != nil {
		t.Fatalf("Join(%s): %v", id, err)
	}
}

// receive returns the next State of a watch.
func receive(t *testing.T, ch <-chan *routing.State, d time.Duration) *routing.State {
	t.Helper()
	select {
	case s, ok := <-ch:
		if !ok {
			t.Fatal("the watch has ended")
		}
		return s
	case <-time.After(d):
		t.Fatalf("no State within %v", d)
	}
	return nil
}

// full has every field of a State set.
func full() *routing.State {
	at := time.Date(2026, 8, 21, 12, 0, 0, 123456789, time.UTC)
	sw := routing.Switch{
		Number: 7, To: "b", Who: "root", Why: `disk <"&> ü`, Started: at, Attempt: 2,
		Begun: []routing.Phase{routing.PhaseDemote}, AbortWhy: "timeout",
		Steps: []routing.Step{{Phase: routing.PhaseHold, At: at}}, Roles: []string{"ma01", "ma02"}, Hooks: []routing.Hook{routing.HookDemote},
		Runs:  []routing.HookRun{{Hook: routing.HookDemote, Attempt: 1, Began: at, Took: time.Second, Output: "x\ny", Error: "exit status 1"}},
		Stuck: "hook promote failed", Compared: "1 equal", Failover: true, AcceptLoss: true,
	}
	req := routing.Request{
		Number: 8, To: "b", Who: "root", Why: "x", Asked: at, Roles: []string{"ma02"}, Hooks: []routing.Hook{routing.HookProve}, PlanOnly: true,
		Comparison: &routing.Comparison{Of: routing.Seen{Users: []string{"u"}}, Found: "x", Ended: at, Failed: true},
		Reports:    map[string]routing.Report{"f1": {Sessions: 3, Crowded: "2 logins", Unreachable: "imap: refused", Closed: true}},
	}
	return &routing.State{
		Roles: map[string]routing.Row{"ma01": {
			Members: []string{"a", "b"}, Active: "a", Epoch: 1 << 60, Phase: routing.PhaseHold, Switch: &sw,
			Residues: []routing.Residue{{Backend: "a", User: "alice@example.org", Frontend: "f1", Since: at, Why: "reset"}},
			Seen:     routing.Seen{Users: []string{"alice@example.org"}}, Stale: map[string]routing.Stale{"b": {Number: 3, Since: at}},
		}, "ma02": {Members: []string{"a", "b"}, Active: "a", Epoch: 1, Phase: routing.PhaseOpen, Request: &req, Seen: routing.Seen{All: true}}},
		Frontends: map[string]routing.Frontend{"f1": {
			Backends: []string{"a", "b"}, Floors: map[string]uint64{"ma01": 5}, BootID: "boot", Since: at,
		}},
		Overrides: map[string]string{"bob@example.org": "ma02"},
		Backends:  map[string]map[string]string{"a": {"imap": "10.0.0.11:143"}},
		Settings:  map[string]string{"normalise": "precis"},
		Switches:  7,
		History:   []routing.SwitchRecord{{Switch: sw, Role: "ma01", From: "b", Epochs: map[string]uint64{"ma01": 4}, Ended: at, Done: true}},
	}
}

func loadEmpty(t *testing.T, open func() routing.Store) {
	s := load(t, open())
	if s.Revision != 0 || len(s.Roles)+len(s.Frontends)+len(s.Backends) != 0 {
		t.Fatalf("an empty store gave %+v", s)
	}
	if s.Roles == nil || s.Frontends == nil || s.Backends == nil {
		t.Fatal("a rule that writes into an empty State would panic: its maps are nil")
	}
}

func loadEverything(t *testing.T, open func() routing.Store) {
	want := full()
	committed := update(t, open(), func(s *routing.State) { *s = *full() })
	want.Revision = 1
	if !reflect.DeepEqual(committed, want) {
		t.Errorf("Update returned\n%+v, want\n%+v", committed, want)
	}
	if got := load(t, open()); !reflect.DeepEqual(got, want) {
		t.Errorf("Load returned\n%+v, want\n%+v", got, want)
	}
}

// What any Update returned before Load was called is in it.
func loadLinearizable(t *testing.T, open func() routing.Store) {
	writer, readers := open(), []routing.Store{open(), open()}
	var committed atomic.Uint64
	done := make(chan struct{})
	var wg sync.WaitGroup
	for _, r := range readers {
		wg.Go(func() {
			for {
				select {
				case <-done:
					return
				default:
				}
				least := committed.Load()
				s, err := r.Load(t.Context())
				if err != nil {
					t.Errorf("Load: %v", err)
					return
				}
				if s.Revision < least {
					t.Errorf("Load gave revision %d after Update had returned %d", s.Revision, least)
					return
				}
			}
		})
	}
	for range 50 {
		committed.Store(update(t, writer, bump).Revision)
	}
	close(done)
	wg.Wait()
}

func updateRevision(t *testing.T, open func() routing.Store) {
	a, b := open(), open()
	for i := range uint64(6) {
		s := a
		if i%2 == 1 {
			s = b
		}
		changed := uint64(99)
		got := update(t, s, func(s *routing.State) {
			changed = s.Revision
			s.Revision = 4711 // not the caller's to set
		})
		if changed != i || got.Revision != i+1 {
			t.Errorf("revision %d after update %d, which was of revision %d", got.Revision, i+1, changed)
		}
	}
	if got := load(t, b).Revision; got != 6 {
		t.Errorf("revision %d after 6 updates", got)
	}
}

func updateSeesNewest(t *testing.T, open func() routing.Store) {
	a, b := open(), open()
	update(t, a, func(s *routing.State) { s.Overrides = map[string]string{"u": "r1"} })
	for i := range 10 {
		seen := ""
		update(t, b, func(s *routing.State) {
			seen = s.Overrides["u"]
			s.Overrides["u"] = "r2"
		})
		if seen != "r1" {
			t.Errorf("change %d of b, which was committed, has not seen what a had committed: %q", i, seen)
		}
		if got := load(t, a).Overrides["u"]; got != "r2" {
			t.Errorf("a reads %q", got)
		}
		update(t, a, func(s *routing.State) { s.Overrides["u"] = "r1" })
	}
}

// What b knows is not the newest: it is not for that State to refuse anything.
func updateRefusesByNewest(t *testing.T, open func() routing.Store) {
	a, b := open(), open()
	for i := range uint64(10) {
		load(t, b)
		update(t, a, bump)
		if _, err := b.Update(within(t, patience), func(s *routing.State) error {
			if s.Switches != i+1 {
				return fmt.Errorf("%d switches", s.Switches)
			}
			return nil
		}); err != nil {
			t.Errorf("refused after %d by an older State: %v", i+1, err)
		}
	}
}

func updateError(t *testing.T, open func() routing.Store) {
	s := open()
	want := errors.New("refused by a rule")
	_, err := s.Update(within(t, patience), func(s *routing.State) error {
		s.Switches = 99
		return fmt.Errorf("wrapped: %w", want)
	})
	if !errors.Is(err, want) {
		t.Errorf("Update returned %v, want the error of change", err)
	}
	if got := load(t, s); got.Revision != 0 || got.Switches != 0 {
		t.Errorf("a refused change was written: %+v", got)
	}
}

// What change keeps of its copy is no way into the committed State.
func updateIsPrivate(t *testing.T, open func() routing.Store) {
	s := open()
	var kept *routing.State
	got := update(t, s, func(st *routing.State) { *st, kept = *full(), st })
	kept.Roles["ma01"] = routing.Row{Active: "evil"}
	kept.Switches = 4711
	if got.Roles["ma01"].Active != "a" || got.Switches != 7 {
		t.Error("the State that Update returned is the one that change had")
	}
	if load(t, s).Roles["ma01"].Active != "a" {
		t.Error("the store changed without an Update")
	}
}

func updateEndedContext(t *testing.T, open func() routing.Store) {
	s := open()
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := s.Update(ctx, func(s *routing.State) error { bump(s); return nil }); !errors.Is(err, context.Canceled) {
		t.Errorf("Update with an ended context returned %v", err)
	}
	if got := load(t, s).Revision; got != 0 {
		t.Errorf("and committed revision %d", got)
	}
}

// 8 handles × 15 updates, each of them counted once and in its own revision.
func updateNoneIsLost(t *testing.T, open func() routing.Store) {
	const writers, each = 8, 15
	var mu sync.Mutex
	revisions := map[uint64]bool{}
	var wg sync.WaitGroup
	for i := range writers {
		s := open()
		name := fmt.Sprint("w", i)
		wg.Go(func() {
			for range each {
				got, err := s.Update(t.Context(), func(s *routing.State) error {
					row := s.Roles[name]
					row.Epoch++
					s.Roles[name] = row
					s.Switches++
					return nil
				})
				if err != nil {
					t.Errorf("Update: %v", err)
					return
				}
				mu.Lock()
				if revisions[got.Revision] {
					t.Errorf("revision %d was committed twice", got.Revision)
				}
				revisions[got.Revision] = true
				mu.Unlock()
			}
		})
	}
	wg.Wait()
	got := load(t, open())
	if got.Revision != writers*each || got.Switches != writers*each {
		t.Errorf("revision %d, counter %d after %d updates", got.Revision, got.Switches, writers*each)
	}
	for name, row := range got.Roles {
		if row.Epoch != each {
			t.Errorf("%d of %d updates of %s are there", row.Epoch, each, name)
		}
	}
}

func watchFirst(t *testing.T, open func() routing.Store) {
	s := open()
	if got := receive(t, s.Watch(t.Context()), patience); got.Revision != 0 {
		t.Errorf("the first State of an empty store has revision %d", got.Revision)
	}
	update(t, s, bump)
	if got := receive(t, s.Watch(t.Context()), patience); got.Revision != 1 {
		t.Errorf("the first State has revision %d, want 1", got.Revision)
	}
}

func watchPrompt(t *testing.T, open func() routing.Store) {
	a, b := open(), open()
	watches := []<-chan *routing.State{a.Watch(t.Context()), b.Watch(t.Context()), b.Watch(t.Context())}
	for _, w := range watches {
		receive(t, w, patience)
	}
	for range 5 {
		want := update(t, a, bump).Revision
		begin := time.Now()
		for i, w := range watches {
			if got := receive(t, w, prompt); got.Revision != want {
				t.Errorf("watch %d sent revision %d, want %d", i, got.Revision, want)
			}
		}
		if took := time.Since(begin); took > prompt {
			t.Errorf("the watches took %v", took)
		}
	}
}

// Who does not read gets the newest afterwards, not the queue of all.
func watchNewest(t *testing.T, open func() routing.Store) {
	writer, w := open(), open().Watch(t.Context())
	receive(t, w, patience)
	const updates = 20
	for range updates {
		update(t, writer, bump)
	}
	var got []uint64
	for len(got) == 0 || got[len(got)-1] != updates {
		got = append(got, receive(t, w, patience).Revision)
	}
	if !slices.IsSorted(got) || len(slices.Compact(slices.Clone(got))) != len(got) {
		t.Errorf("revisions came as %v", got)
	}
	// One may have been on its way, and one more been read just before the last.
	if len(got) > 5 {
		t.Errorf("a slow reader got %d of %d States: %v", len(got), updates, got)
	}
}

func watchSilent(t *testing.T, open func() routing.Store) {
	s := open()
	update(t, s, bump)
	w := s.Watch(t.Context())
	receive(t, w, patience)
	_, _ = s.Update(t.Context(), func(*routing.State) error { return errors.New("refused") })
	select {
	case got := <-w:
		t.Errorf("revision %d came without a change", got.Revision)
	case <-time.After(1500 * time.Millisecond): // longer than a store polls
	}
}

func watchEnds(t *testing.T, open func() routing.Store) {
	s := open()
	ctx, cancel := context.WithCancel(t.Context())
	read, unread := s.Watch(ctx), s.Watch(ctx)
	receive(t, read, patience)
	cancel()
	for _, w := range []<-chan *routing.State{read, unread} {
		deadline := time.After(patience)
		for open := true; open; {
			select {
			case _, open = <-w:
			case <-deadline:
				t.Fatal("the channel is not closed after its context has ended")
			}
		}
	}
}
