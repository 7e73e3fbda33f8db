package routing

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"sync"
	"testing"
	"time"
)

// witness sees where users are: on two backends of a role, never.
type witness struct {
	mu sync.Mutex
	on map[string]map[string]int // user → backend → sessions
}

func (w *witness) move(user, backend string, by int) error {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.on[user] == nil {
		w.on[user] = make(map[string]int)
	}
	if w.on[user][backend] += by; w.on[user][backend] == 0 {
		delete(w.on[user], backend)
	}
	if len(w.on[user]) > 1 {
		return fmt.Errorf("%s is active on %v", user, w.on[user])
	}
	return nil
}

// Gate, Leave and switches of two frontends against each other. With -race it
// catches a gate that is read without the lock; the witness catches an Enter
// that looks up and registers in two steps.
func TestStressNobodyOnTwoBackends(t *testing.T) {
	h := newHost(t)
	f, g := h.start("f"), h.start("g")
	w := &witness{on: make(map[string]map[string]int)}
	ctx, cancel := context.WithCancel(t.Context())
	var sessions sync.WaitGroup
	for i := range 16 {
		p := []*process{f, g}[i%2]
		sessions.Go(func() { churn(ctx, t, p, w, []string{"alice", "bob", "carol"}[i%3]) })
	}
	const switches = 40
	for i := range switches {
		req := SwitchRequest{Role: "ma01", To: []string{"b", "a"}[i%2], Who: "test"}
		p := []*process{f, g}[i%2]
		if _, err := p.Switch(ctx, req, nil); err != nil {
			t.Fatalf("switch %d: %v", i, err)
		}
	}
	cancel()
	sessions.Wait()
	f.stop()
	g.stop()
	if row := h.site.get().Roles["ma01"]; row.Epoch != 1+switches || len(row.Residues) > 0 {
		t.Errorf("at the end: %+v", row)
	}
}

// churn logs a user in and out until ctx ends.
func churn(ctx context.Context, t *testing.T, p *process, w *witness, user string) {
	for ctx.Err() == nil {
		s, err := p.Enter(ctx, user)
		if err != nil {
			if !errors.Is(err, context.Canceled) {
				t.Errorf("Enter(%s): %v", user, err)
			}
			return
		}
		if err := w.move(user, s.Backend, +1); err != nil {
			t.Error(err)
		}
		timer := time.NewTimer(time.Duration(rand.IntN(2000)) * time.Microsecond)
		select {
		case <-s.Revoked():
		case <-timer.C:
		case <-ctx.Done():
		}
		timer.Stop()
		if err := w.move(user, s.Backend, -1); err != nil {
			t.Error(err)
		}
		s.Leave(End{Proven: true})
	}
}
