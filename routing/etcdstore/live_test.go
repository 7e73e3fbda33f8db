package etcdstore

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"

	"github.com/posthouse/posthouse/routing"
	"github.com/posthouse/posthouse/routing/statedir"
)

const short = 2 * time.Second // a lease

func TestJoinRefusesNames(t *testing.T) {
	t.Parallel()
	c := newCluster(t, 1)
	opt := Options{Endpoints: c.urls()}
	s := openStore(t, t.TempDir(), opt)
	for _, id := range []string{"", ".", "..", "../x", "a/b", ".hidden", "a b", "a\x00", strings.Repeat("a", 201)} {
		if err := s.Join(within(t, patient), id); err == nil {
			t.Errorf("ID %q was accepted", id)
		}
	}
	update(t, s, func(s *routing.State) error {
		s.Frontends["f-registered"] = routing.Frontend{}
		return nil
	})
	if err := s.Join(within(t, patient), "f-registered"); err == nil {
		t.Error("a registered ID was accepted")
	}
	// It never joined as far as etcd knows: that proves nothing.
	leased := openStore(t, t.TempDir(), Options{Endpoints: c.urls(), Leased: true})
	if gone, err := leased.Gone(within(t, patient), []string{"f-registered"}); err != nil || len(gone) != 0 {
		t.Errorf("Gone = %v, %v", gone, err)
	}
}

// A lease that etcd has ended is replaced, and alive/ID comes back.
func TestLeaseLost(t *testing.T) {
	t.Parallel()
	c := newCluster(t, 1)
	opt := Options{Endpoints: c.urls(), Lease: short, Leased: true}
	a, b := openStore(t, t.TempDir(), opt), openStore(t, t.TempDir(), opt)
	if a.Deadline().IsZero() || a.Deadline().After(time.Now()) {
		t.Errorf("before Join the deadline is %v", a.Deadline())
	}
	joinAs(t, a, "f-a")
	before := a.Deadline()
	if left := time.Until(before); left <= 0 || left > short-time.Second {
		t.Errorf("%v are left of a lease of %v", left, short)
	}
	lease := leaseOf(a)
	if _, err := c.client().Revoke(within(t, patient), lease); err != nil {
		t.Fatal(err)
	}
	isAlive := func() bool {
		alive, err := b.Alive(within(t, patient), []string{"f-a", "f-x"})
		if err != nil {
			t.Fatal(err)
		}
		return slices.Equal(alive, []string{"f-a"})
	}
	if isAlive() {
		t.Error("alive without a lease")
	}
	eventually(t, "it lives again", isAlive)
	if leaseOf(a) == lease {
		t.Error("it lives on a lease that has ended")
	}
	if err := a.Join(within(t, patient), "f-a"); err == nil {
		t.Error("an ID that lives was joined again")
	}
}

func leaseOf(s *Store) clientv3.LeaseID {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.live.lease
}

// stall keeps s from renewing its lease until resume is called, as a process
// that was stopped does.
func stall(s *Store) (resume func()) {
	s.live.busy <- struct{}{}
	return func() { <-s.live.busy }
}

// In stable mode silence proves nothing about another machine. If leased it
// does, and cannot be taken back. Mutation: let revive not compare used/ID.
func TestSafety8Silence(t *testing.T) {
	t.Parallel()
	c := newCluster(t, 1)
	for _, leased := range []bool{false, true} {
		t.Run(fmt.Sprint("leased=", leased), func(t *testing.T) {
			t.Parallel()
			opt := Options{Endpoints: c.urls(), Prefix: newPrefix(), Lease: short, Leased: leased}
			path := t.TempDir()
			a, sibling, b := openStore(t, path, opt), openStore(t, path, opt), openStore(t, t.TempDir(), opt)
			joinAs(t, a, "f-a")
			resume := stall(a)
			eventually(t, "the lease ran out", func() bool {
				alive, err := b.Alive(within(t, patient), []string{"f-a"})
				return err == nil && len(alive) == 0
			})
			if leased && time.Now().Before(a.Deadline()) {
				t.Error("the lease ran out before the deadline")
			}
			var want []string
			if leased {
				want = []string{"f-a"}
			}
			for _, s := range []*Store{b, sibling} {
				if gone, err := s.Gone(within(t, patient), []string{"f-a", "f-never"}); err != nil || !slices.Equal(gone, want) {
					t.Errorf("Gone = %v, %v; want %v", gone, err, want)
				}
			}
			resume()
			back := func() bool {
				alive, err := b.Alive(within(t, patient), []string{"f-a"})
				return err == nil && len(alive) == 1
			}
			if !leased {
				eventually(t, "it lives again", back)
				return
			}
			eventually(t, "it knows", func() bool {
				a.mu.Lock()
				defer a.mu.Unlock()
				return a.live.ids["f-a"] == nil
			})
			if back() {
				t.Error("what was said to have ended lives")
			}
			if !time.Now().After(a.Deadline()) {
				t.Error("it has a deadline to come")
			}
			if gone, err := b.Gone(within(t, patient), []string{"f-a"}); err != nil || !slices.Equal(gone, want) {
				t.Errorf("then Gone = %v, %v", gone, err)
			}
			joinAs(t, a, "f-a2")
			if !time.Now().Before(a.Deadline()) {
				t.Error("the new ID has no time left")
			}
		})
	}
}

// nobody is a directory without users.
type nobody struct{}

func (nobody) Lookup(context.Context, string) (routing.Entry, error) {
	return routing.Entry{}, routing.ErrUnknownUser
}

// A frontend is silent for longer than its lease. Another one that starts is told
// that it has ended, and fails to start. The first goes on under another ID.
func TestSafety8DeclaredByARefusedStart(t *testing.T) {
	t.Parallel()
	c := newCluster(t, 1)
	opt := Options{Endpoints: c.urls(), Lease: short, Leased: true}
	a, b := openStore(t, t.TempDir(), opt), openStore(t, t.TempDir(), opt)
	start := func(id string, s *Store, address string) (*routing.Table, error) {
		return routing.Start(within(t, patient), routing.Options{ID: id, Store: s, Directory: nobody{}, Local: s.opt.Dir,
			Backends: map[string]map[string]string{"a": {"imap": address}},
			Roles:    map[string]routing.RoleConfig{"ma01": {Members: []string{"a"}, Active: "a"}}})
	}
	table, err := start("f-a", a, "192.0.2.1:143")
	if err != nil {
		t.Fatal(err)
	}
	defer table.Close(t.Context())
	resume := stall(a)
	eventually(t, "the lease ran out", func() bool {
		alive, err := b.Alive(within(t, patient), []string{"f-a"})
		return err == nil && len(alive) == 0
	})
	// It asks too, and is not the one to say so of itself.
	if gone, err := a.Gone(within(t, patient), []string{"f-a"}); err != nil || len(gone) > 0 {
		t.Errorf("by its own word it has ended: %v, %v", gone, err)
	}
	if _, err := start("f-b", b, "192.0.2.99:143"); err == nil {
		t.Fatal("started with another address of a")
	}
	resume()
	eventually(t, "it is registered again, with time left", func() bool {
		_, is := table.Snapshot().Frontends[table.ID()]
		return is && table.ID() != "f-a" && time.Now().Before(a.Deadline())
	})
}

// A process was killed: the kernel gave its flock back, and its lease runs on
// for a while. A sibling waits for that, another machine in vain.
func TestGoneAfterDeath(t *testing.T) {
	t.Parallel()
	c := newCluster(t, 1)
	opt := Options{Endpoints: c.urls(), Lease: short}
	path := t.TempDir()
	a, sibling, far := openStore(t, path, opt), openStore(t, path, opt), openStore(t, t.TempDir(), opt)
	joinAs(t, a, "f-a")
	defer stall(a)()
	a.mu.Lock()
	a.live.ids["f-a"].lock.Unlock()
	a.mu.Unlock()
	gone := func(s *Store) bool {
		ids, err := s.Gone(within(t, patient), []string{"f-a"})
		if err != nil {
			t.Fatal(err)
		}
		return len(ids) > 0
	}
	if gone(sibling) {
		t.Error("its lease runs, and it is said to be gone")
	}
	eventually(t, "it is gone", func() bool { return gone(sibling) })
	if gone(far) {
		t.Error("another machine says that it is gone")
	}
}

// etcd says nothing for longer than a lease: the deadline passes, and comes
// back with etcd. A frontend that is stopped has no say.
func TestDeadlineWhileEtcdIsStopped(t *testing.T) {
	t.Parallel()
	c := newCluster(t, 1)
	s := openStore(t, t.TempDir(), Options{Endpoints: c.urls(), Lease: 3 * time.Second, Leased: true})
	stable := openStore(t, t.TempDir(), Options{Endpoints: c.urls()})
	joinAs(t, s, "f-a")
	joinAs(t, stable, "f-b")
	if !stable.Deadline().IsZero() {
		t.Error("a deadline in stable mode")
	}
	first := s.Deadline()
	eventually(t, "the lease was renewed", func() bool { return s.Deadline().After(first) })
	c[0].signal(syscall.SIGSTOP)
	begin := time.Now()
	eventually(t, "the deadline passed", func() bool { return time.Now().After(s.Deadline()) })
	if took := time.Since(begin); took > 3*time.Second {
		t.Errorf("that took %v of a lease of 3 s", took)
	}
	c[0].signal(syscall.SIGCONT)
	eventually(t, "the deadline moved on", func() bool { return time.Now().Before(s.Deadline()) })
}

// Of those who have ended long ago only so many traces are kept.
func TestJoinSweeps(t *testing.T) {
	t.Parallel()
	c := newCluster(t, 1)
	s := openStore(t, t.TempDir(), Options{Endpoints: c.urls()})
	joinAs(t, s, "f-living")
	update(t, s, func(s *routing.State) error {
		s.Frontends["f-00001"] = routing.Frontend{}
		return nil
	})
	client := c.client()
	var ops []clientv3.Op
	for i := range statedir.GoneKept + 50 {
		ops = append(ops, clientv3.OpPut(s.usedKey(fmt.Sprintf("f-%05d", i)), "somebody"))
		if len(ops) == opsMax || i == statedir.GoneKept+49 {
			if _, err := client.Txn(within(t, patient)).Then(ops...).Commit(); err != nil {
				t.Fatal(err)
			}
			ops = nil
		}
	}
	joinAs(t, s, "f-new")
	used, err := s.list(within(t, patient), s.usedKey(""))
	if err != nil {
		t.Fatal(err)
	}
	if len(used) < statedir.GoneKept || len(used) > statedir.GoneKept+3 {
		t.Errorf("%d traces are left, want about %d", len(used), statedir.GoneKept)
	}
	for _, id := range []string{"f-living", "f-00001", "f-new", fmt.Sprintf("f-%05d", statedir.GoneKept+49)} {
		if !slices.Contains(used, id) {
			t.Errorf("%s could be used again", id)
		}
	}
}
