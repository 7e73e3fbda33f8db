package storetest

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/posthouse/posthouse/routing"
)

func joinTwice(t *testing.T, open func() routing.Store) {
	a, b := open(), open()
	join(t, a, "f1-aaaa")
	for name, s := range map[string]routing.Store{"the same": a, "another": b} {
		if err := s.Join(within(t, patience), "f1-aaaa"); err == nil {
			t.Errorf("%s handle joined under an ID that lives", name)
		}
	}
	join(t, b, "f1-bbbb")
	// A frontend whose registration was lost takes a new ID.
	join(t, a, "f1-cccc")
}

// An ID is never reused: not after its process has ended, not after others
// came and went.
func joinForEver(t *testing.T, open func() routing.Store) {
	a, b := open(), open()
	join(t, a, "f1-aaaa")
	if err := a.Close(); err != nil {
		t.Fatal(err)
	}
	for i := range 5 {
		join(t, b, fmt.Sprint("f2-", i))
		if err := b.Join(within(t, patience), "f1-aaaa"); err == nil {
			t.Fatal("an ID that was used before was accepted")
		}
	}
}

func joinRace(t *testing.T, open func() routing.Store) {
	var winners atomic.Int32
	var wg sync.WaitGroup
	for range 6 {
		s := open()
		wg.Go(func() {
			if s.Join(t.Context(), "f1-aaaa") == nil {
				winners.Add(1)
			}
		})
	}
	wg.Wait()
	if n := winners.Load(); n != 1 {
		t.Errorf("%d handles joined under one ID", n)
	}
}

// One that lives is not gone, and of one that never joined nothing is proven.
func goneOnlyProven(t *testing.T, open func() routing.Store) {
	a, b := open(), open()
	join(t, a, "f1-aaaa")
	join(t, b, "f2-bbbb")
	for _, s := range []routing.Store{a, b, open()} {
		gone, err := s.Gone(within(t, patience), []string{"f1-aaaa", "f2-bbbb", "f3-never"})
		if err != nil || len(gone) != 0 {
			t.Errorf("Gone = %v, %v; want none", gone, err)
		}
	}
}

func goneAfterClose(t *testing.T, open func() routing.Store) {
	a, b := open(), open()
	join(t, a, "f1-aaaa")
	join(t, a, "f1-bbbb")
	join(t, b, "f2-cccc")
	if err := a.Close(); err != nil {
		t.Fatal(err)
	}
	ids := []string{"f2-cccc", "f1-bbbb", "f1-aaaa"}
	deadline := time.After(patience)
	again := time.NewTicker(20 * time.Millisecond)
	defer again.Stop()
	for range again.C {
		gone, err := b.Gone(within(t, patience), ids)
		if err != nil {
			t.Fatal(err)
		}
		if slices.Contains(gone, "f2-cccc") {
			t.Fatal("one that lives is said to be gone")
		}
		if slices.Sort(gone); slices.Equal(gone, []string{"f1-aaaa", "f1-bbbb"}) {
			break
		}
		select {
		case <-deadline:
			t.Fatalf("Gone = %v long after Close", gone)
		default:
		}
	}
	if alive, err := b.Alive(within(t, patience), append(ids, "f3-never")); err != nil || !slices.Equal(alive, []string{"f2-cccc"}) {
		t.Errorf("Alive = %v, %v; want f2-cccc alone", alive, err)
	}
}

func campaign(t *testing.T, s routing.Store, ctx context.Context) func() {
	t.Helper()
	_, release, err := s.Campaign(ctx)
	if err != nil {
		t.Fatalf("Campaign: %v", err)
	}
	return release
}

// blocked checks that nobody else can become the driver now.
func blocked(t *testing.T, stores ...routing.Store) {
	t.Helper()
	for _, s := range stores {
		_, release, err := s.Campaign(within(t, 250*time.Millisecond))
		if err == nil {
			release()
			t.Error("two are the driver at once")
		} else if !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("Campaign ended with %v, want its context's error", err)
		}
	}
}

func campaignHandsOver(t *testing.T, open func() routing.Store) {
	a, b := open(), open()
	release := campaign(t, a, within(t, patience))
	blocked(t, a, b)
	next := make(chan func())
	go func() {
		_, r, err := b.Campaign(within(t, patience))
		if err != nil {
			t.Errorf("Campaign: %v", err)
			r = func() {}
		}
		next <- r
	}()
	release()
	begin := time.Now()
	second := <-next
	if took := time.Since(begin); took > prompt {
		t.Errorf("the hand-over took %v", took)
	}
	release() // the first one's again: must not free the second
	blocked(t, a)
	second()
	campaign(t, a, within(t, patience))()
}

func campaignContext(t *testing.T, open func() routing.Store) {
	a, b := open(), open()
	// The context bounds the wait, not the office.
	ctx, cancel := context.WithCancel(t.Context())
	release := campaign(t, a, ctx)
	cancel()
	blocked(t, b)
	release()
	if _, r, err := b.Campaign(ctx); err == nil {
		r()
		t.Error("an ended context made a driver")
	}
}

func campaignClose(t *testing.T, open func() routing.Store) {
	a, b := open(), open()
	office, release, err := a.Campaign(within(t, patience))
	if err != nil {
		t.Fatalf("Campaign: %v", err)
	}
	if office.Err() != nil {
		t.Error("the office ended before it began")
	}
	if err := a.Close(); err != nil {
		t.Fatal(err)
	}
	select {
	case <-office.Done():
	case <-time.After(patience):
		t.Error("the office outlives the store")
	}
	campaign(t, b, within(t, patience))()
	release()
}

func campaignExclusive(t *testing.T, open func() routing.Store) {
	var inside, turns atomic.Int32
	var wg sync.WaitGroup
	for range 4 {
		s := open()
		wg.Go(func() {
			for range 3 {
				_, release, err := s.Campaign(within(t, patience))
				if err != nil {
					t.Errorf("Campaign: %v", err)
					return
				}
				if n := inside.Add(1); n != 1 {
					t.Errorf("%d drivers at once", n)
				}
				turns.Add(1)
				inside.Add(-1)
				release()
			}
		})
	}
	wg.Wait()
	if n := turns.Load(); n != 12 {
		t.Errorf("%d of 12 turns came", n)
	}
}
