//go:build bench

package integration

import (
	"encoding/json"
	"fmt"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"
)

// TestBenchBigTable: what the number of roles, and of users, costs a switch of one
// of them, and a frontend's memory. Three frontends, etcd of three members, no
// hooks, 100 sessions in the role that is switched.
func TestBenchBigTable(t *testing.T) {
	for _, size := range []struct{ roles, users int }{{1, 1000}, {1000, 1000}, {1000, 44_000}, {1000, 440_000}, {10_000, 44_000}} {
		t.Run(fmt.Sprintf("%d roles, %d users", size.roles, size.users), func(t *testing.T) { benchRoles(t, size.roles, size.users) })
	}
}

func benchRoles(t *testing.T, roles, users int) {
	const sessions, switches = 100, 9
	a, b := newRecorder(t, "a", nextHost(), nil), newRecorder(t, "b", nextHost(), nil)
	etcd := newEtcd(t)
	s := newSite(t, a.backend(), b.backend(), userNames(sessions)...).shared(etcd, "3s")
	s.fast = true
	s.roles = make(map[string]string)
	for i := range roles - 1 {
		s.roles[fmt.Sprintf("role%05d", i)] = "{members: [a, b], active: a}"
	}
	for i := range users - sessions {
		s.users[fmt.Sprintf("user%06d", i)] = fmt.Sprintf("role%05d", i%max(roles-1, 1))
		if roles == 1 {
			s.users[fmt.Sprintf("user%06d", i)] = "ma01"
		}
	}
	var frontends []*posthouse
	var starts []time.Duration
	for range 3 {
		began := time.Now()
		frontends = append(frontends, startFrontend(t, s))
		starts = append(starts, time.Since(began))
	}
	idle := memories(t, frontends)
	var first, whole, spread []time.Duration
	for i := range switches {
		clients := crowdOf(t, frontends, sessions)
		to, p := []*recorder{b, a}[i%2], frontends[(i+1)%3]
		began := time.Now()
		ended := frontends[i%3].startSwitch(t, []string{"b", "a"}[i%2])
		within(t, 20*time.Second, "the role is held", func() bool { return len(p.told(t, "role held")) > i || len(ended) > 0 })
		w, err := imapLogin(p.imap(), p.name, userNames(1)[0], password, 30*time.Second)
		must(t, err)
		first = append(first, time.Since(began))
		result := <-ended
		mustOpen(t, result)
		whole = append(whole, result.took)
		if to.sessions() == 0 {
			t.Error("the first login is not on the new active")
		}
		w.Close()
		for _, c := range clients {
			c.Close()
		}
		within(t, 20*time.Second, "everybody has left", func() bool { return a.sessions()+b.sessions() == 0 })
		var opened []time.Time
		for _, p := range frontends {
			within(t, 20*time.Second, p.name+" has seen it", func() bool { return len(p.told(t, "role opened")) > i })
			opened = append(opened, p.told(t, "role opened")[i])
		}
		slices.SortFunc(opened, time.Time.Compare)
		spread = append(spread, opened[2].Sub(opened[0]))
	}
	mustNeverBeOnBoth(t, a, b)
	t.Logf("%d roles, %d users: start %v; first login on the new active: %s; end of the command: %s; OPEN at the first frontend until the last: %s; memory of the frontends in MB: idle %v, after %d switches %v", roles, users, starts,
		inShort(first), inShort(whole),
		inShort(spread), idle, switches, memories(t, frontends))
}

// crowdOf logs n users in, a third at each frontend.
func crowdOf(t *testing.T, frontends []*posthouse, n int) []*wire {
	t.Helper()
	clients, slots := make([]*wire, n), make(chan struct{}, 16)
	var wg sync.WaitGroup
	for i, user := range userNames(n) {
		slots <- struct{}{}
		wg.Go(func() {
			defer func() { <-slots }()
			p := frontends[i%3]
			w, err := imapLogin(p.imap(), p.name, user, password, 30*time.Second)
			if err != nil {
				t.Errorf("%s: %v", user, err)
			}
			clients[i] = w
		})
	}
	wg.Wait()
	if t.Failed() {
		t.FailNow()
	}
	return clients
}

// memories are what the frontends have for themselves, in MB.
func memories(t *testing.T, frontends []*posthouse) (mb []int64) {
	t.Helper()
	for _, p := range frontends {
		n, err := rssAnon(p.pid())
		must(t, err)
		mb = append(mb, n>>20)
	}
	return mb
}

// told returns when a frontend has logged something of ma01.
func (p *posthouse) told(t *testing.T, what string) (at []time.Time) {
	for line := range strings.Lines(p.output.String()) {
		var entry struct {
			Msg, Role string
			TS        time.Time
		}
		if !strings.Contains(line, what) || json.Unmarshal([]byte(line), &entry) != nil || entry.Msg != what || entry.Role != "ma01" {
			continue
		}
		at = append(at, entry.TS)
	}
	return at
}

// sessions is how many are there now.
func (r *recorder) sessions() int {
	r.mu.Lock()
	defer r.mu.Unlock()
	n := 0
	for c := range r.callers {
		if c.user != "" {
			n++
		}
	}
	return n
}

func mustNeverBeOnBoth(t *testing.T, a, b *recorder) {
	t.Helper()
	onA, _ := a.records()
	onB, _ := b.records()
	for _, found := range onBoth(append(onA, onB...), func(user string) string { return user }) {
		t.Error(found)
	}
}
