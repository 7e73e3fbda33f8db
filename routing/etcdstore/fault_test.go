package etcdstore

import (
	"context"
	"os"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/posthouse/posthouse/routing"
)

// Each member in turn is killed and comes back: nobody notices.
func TestMinorityStops(t *testing.T) {
	t.Parallel()
	c := newCluster(t, 3)
	opt := Options{Endpoints: c.urls(), Leased: true}
	a, b := openStore(t, t.TempDir(), opt), openStore(t, t.TempDir(), opt)
	joinAs(t, b, "f-b")
	w := b.Watch(t.Context())
	n := uint64(0)
	for _, m := range c {
		m.kill()
		for range 3 {
			n++
			update(t, a, bump)
			until(t, w, "a change while a member is down", switches(n))
		}
		m.start()
		c.healthy()
	}
	if alive, err := a.Alive(within(t, patient), []string{"f-b"}); err != nil || len(alive) != 1 {
		t.Errorf("Alive = %v, %v", alive, err)
	}
	if late := time.Since(b.Deadline()); late > 0 {
		t.Errorf("the deadline has passed by %v", late)
	}
}

// Without etcd there are errors that name it, within the caller's time; when
// it is back all goes on from where it was.
func TestAllStop(t *testing.T) {
	t.Parallel()
	c := newCluster(t, 3)
	opt := Options{Endpoints: c.urls(), Lease: 2 * time.Second, Leased: true}
	a, b := openStore(t, t.TempDir(), opt), openStore(t, t.TempDir(), opt)
	update(t, a, bump)
	joinAs(t, b, "f-b")
	office, resign, err := b.Campaign(within(t, patient))
	if err != nil {
		t.Fatal(err)
	}
	defer resign()
	w := b.Watch(t.Context())
	until(t, w, "the first", switches(1))
	for _, m := range c {
		m.kill()
	}
	_, err = a.Load(within(t, 300*time.Millisecond))
	mustName(t, "Load", err, c)
	_, err = a.Update(within(t, 300*time.Millisecond), bump)
	mustName(t, "Update", err, c)
	mustName(t, "Join", a.Join(within(t, 300*time.Millisecond), "f-a"), c)
	_, err = a.Gone(within(t, 300*time.Millisecond), []string{"f-b"})
	mustName(t, "Gone", err, c)
	_, _, err = a.Campaign(within(t, 300*time.Millisecond))
	mustName(t, "Campaign", err, c)
	select {
	case <-office.Done():
	case <-time.After(patient):
		t.Error("the office outlives its lease")
	}
	eventually(t, "the deadline passed", func() bool { return time.Now().After(b.Deadline()) })

	for _, m := range c {
		m.start()
	}
	c.healthy()
	joinAs(t, a, "f-a") // the same ID: nobody has it
	if got := update(t, a, bump); got.Revision != 2 {
		t.Errorf("revision %d after the outage, want 2", got.Revision)
	}
	until(t, w, "a change after the outage", switches(2))
	eventually(t, "the deadline moved on", func() bool { return time.Now().Before(b.Deadline()) })
}

func mustName(t *testing.T, what string, err error, c cluster) {
	t.Helper()
	if err == nil || !strings.Contains(err.Error(), c[0].url) {
		t.Errorf("%s without etcd: %v, want an error that names the endpoints", what, err)
	} else if !strings.Contains(err.Error(), "connection") {
		t.Errorf("%s without etcd: %v: does not say why", what, err)
	}
}

// A member that has frozen keeps its connections open and says nothing.
func TestMemberFreezes(t *testing.T) {
	t.Parallel()
	c := newCluster(t, 3)
	opt := Options{Endpoints: c.urls()}
	a, b := openStore(t, t.TempDir(), opt), openStore(t, t.TempDir(), opt)
	w := b.Watch(t.Context())
	until(t, w, "the first", switches(0))
	n := uint64(0)
	for _, m := range c {
		m.signal(syscall.SIGSTOP)
		for range 2 {
			n++
			begin := time.Now()
			update(t, a, bump)
			wrote := time.Since(begin)
			until(t, w, "a change while a member is frozen", switches(n))
			t.Logf("%s frozen: %v to write, %v until another had it", m.name, wrote, time.Since(begin))
		}
		m.signal(syscall.SIGCONT)
		c.healthy()
	}
}

// What a watch missed is gone from etcd when it comes back.
func TestCompactionDuringPause(t *testing.T) {
	t.Parallel()
	c := newCluster(t, 1)
	way := newCable(t, c[0])
	a := openStore(t, t.TempDir(), Options{Endpoints: c.urls()})
	b := openStore(t, t.TempDir(), Options{Endpoints: []string{way.url}})
	w := b.Watch(t.Context())
	update(t, a, bump)
	until(t, w, "the first", switches(1))
	way.cut()
	for range 5 {
		update(t, a, bump)
	}
	if _, err := c.client().Compact(within(t, patient), a.known().rev); err != nil {
		t.Fatal(err)
	}
	way.mend()
	until(t, w, "what was missed", switches(6))
	begin := time.Now()
	update(t, a, bump)
	until(t, w, "the next", switches(7))
	t.Logf("after compaction the watch delivers within %v", time.Since(begin))
}

// etcd gets the data of an hour ago, or none.
func TestEtcdGoesBack(t *testing.T) {
	t.Parallel()
	for name, restore := range map[string]bool{"restored": true, "wiped": false} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			c := newCluster(t, 1)
			opt := Options{Endpoints: c.urls()}
			a := openStore(t, t.TempDir(), opt)
			update(t, a, bump)
			c[0].kill()
			backup := t.TempDir()
			if err := os.CopyFS(backup, os.DirFS(c[0].dir)); err != nil {
				t.Fatal(err)
			}
			c[0].start()
			for range 5 {
				update(t, a, bump)
			}
			w := a.Watch(t.Context())
			until(t, w, "the newest", switches(6))

			c[0].kill()
			if err := os.RemoveAll(c[0].dir); err != nil {
				t.Fatal(err)
			}
			want := uint64(0)
			if restore {
				want = 1
				if err := os.CopyFS(c[0].dir, os.DirFS(backup)); err != nil {
					t.Fatal(err)
				}
			}
			c[0].start()
			until(t, w, "the older state", func(s *routing.State) bool { return s.Revision == want && s.Switches == want })
			if got := load(t, a); got.Revision != want {
				t.Errorf("Load gives revision %d, want %d", got.Revision, want)
			}
			if got := update(t, a, bump); got.Revision != want+1 {
				t.Errorf("Update gives revision %d, want %d", got.Revision, want+1)
			}
			until(t, w, "a change after that", switches(want+1))
		})
	}
}

// The answer to a commit is lost: the next try finds that it was ours.
// Mutation: leave the look at Writers out, and the change is made twice.
func TestLostAnswer(t *testing.T) {
	t.Parallel()
	c := newCluster(t, 1)
	way := newCable(t, c[0])
	a := openStore(t, t.TempDir(), Options{Endpoints: []string{way.url}})
	b := openStore(t, t.TempDir(), Options{Endpoints: c.urls()})
	for round, others := range []int{0, 1, 5} {
		before := load(t, b).Switches
		load(t, a)
		var once sync.Once
		got, err := a.Update(within(t, patient), func(s *routing.State) error {
			once.Do(func() {
				way.silence()
				go func() {
					eventually(t, "the commit arrived", func() bool { return load(t, b).Switches > before })
					for range others {
						update(t, b, bump)
					}
					way.cut()
					way.mend()
				}()
			})
			return bump(s)
		})
		if err != nil {
			t.Fatal(err)
		}
		if got.Switches != before+1 {
			t.Errorf("round %d: Update returned %d, want %d", round, got.Switches, before+1)
		}
		if now := load(t, b).Switches; now != before+1+uint64(others) {
			t.Errorf("round %d: %d changes are there, %d were made", round, now-before, 1+others)
		}
	}
}

// No answer comes at all.
func TestUnknownOutcome(t *testing.T) {
	t.Parallel()
	c := newCluster(t, 1)
	way := newCable(t, c[0])
	a := openStore(t, t.TempDir(), Options{Endpoints: []string{way.url}})
	load(t, a)
	_, err := a.Update(within(t, 1500*time.Millisecond), func(s *routing.State) error {
		way.silence()
		return bump(s)
	})
	if err == nil || !strings.Contains(err.Error(), "not known") || !strings.Contains(err.Error(), way.url) {
		t.Errorf("Update = %v, want that it is not known whether it was committed", err)
	}
	b := openStore(t, t.TempDir(), Options{Endpoints: c.urls()})
	if got := load(t, b).Switches; got != 1 {
		t.Errorf("%d changes are there", got)
	}
}

// Open needs no etcd, and Close waits for none.
func TestWithoutEtcd(t *testing.T) {
	t.Parallel()
	opt := Options{Endpoints: freeURLs(t, 1)}
	for name, o := range map[string]Options{"open": opt, "user": {Endpoints: opt.Endpoints, User: "u", Password: "p"}} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			s := openStore(t, t.TempDir(), o)
			w := s.Watch(t.Context())
			begin := time.Now()
			_, err := s.Load(context.Background())
			if took := time.Since(begin); took > 2*patience {
				t.Errorf("Load without a deadline took %v", took)
			}
			if err == nil || !strings.Contains(err.Error(), o.Endpoints[0]) || !strings.Contains(err.Error(), "refused") {
				t.Errorf("Load = %v", err)
			}
			select {
			case <-w:
				t.Error("a watch sent something out of nothing")
			default:
			}
			begin = time.Now()
			if err := s.Close(); err != nil {
				t.Error(err)
			}
			if took := time.Since(begin); took > 2*farewell+time.Second {
				t.Errorf("Close took %v", took)
			}
			if _, err := s.Load(t.Context()); err == nil {
				t.Error("a closed store can be read")
			}
			if _, open := <-s.Watch(t.Context()); open {
				t.Error("a closed store can be watched")
			}
			if err := s.Join(t.Context(), "f"); err == nil {
				t.Error("a closed store can be joined")
			}
		})
	}
}

// What was heard long ago is no ground for a transaction: with etcd away it would not
// be known whether it was committed, and behind many commits neither.
func TestUpdateReadsFirst(t *testing.T) {
	t.Parallel()
	c := newCluster(t, 1)
	way := newCable(t, c[0])
	a := openStore(t, t.TempDir(), Options{Endpoints: []string{way.url}})
	b := openStore(t, t.TempDir(), Options{Endpoints: c.urls()})
	update(t, a, bump)
	for range writersKept + 6 {
		update(t, b, bump)
	}
	time.Sleep(freshFor)
	way.silence()
	go func() {
		time.Sleep(300 * time.Millisecond)
		way.cut()
		way.mend()
	}()
	update(t, a, bump)

	time.Sleep(freshFor)
	c[0].kill()
	_, err := a.Update(within(t, 1500*time.Millisecond), func(s *routing.State) error { s.Switches++; return nil })
	if err == nil || !strings.Contains(err.Error(), "reading the role table") || strings.Contains(err.Error(), "not known") {
		t.Error(err)
	}
}
