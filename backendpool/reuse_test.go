package backendpool

import (
	"context"
	"errors"
	"math/rand/v2"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"
)

// line stands for a connection.
type line struct {
	name    string
	closed  atomic.Bool
	onClose func() // may be nil
}

func (l *line) Close() error {
	if l.onClose != nil {
		l.onClose()
	}
	if l.closed.Swap(true) {
		panic(l.name + " is closed twice")
	}
	return nil
}

// lines are some of them, all in use from r.
func lines(t *testing.T, r *Reuse[*line], backend string, names ...string) []*line {
	t.Helper()
	var all []*line
	for _, name := range names {
		if c, reused, err := r.Get(t.Context(), backend); c != nil || reused || err != nil {
			t.Fatalf("%v, %v, %v", c, reused, err)
		}
		all = append(all, &line{name: name})
	}
	return all
}

// counts checks the gauges.
func counts(t *testing.T, r *Reuse[*line], backend string, inUse, idle int) {
	t.Helper()
	if u, i := r.Counts(backend); u != inUse || i != idle {
		t.Errorf("%d in use and %d idle, want %d and %d", u, i, inUse, idle)
	}
	if err := r.Check(); err != nil {
		t.Error(err)
	}
}

func TestReuseTakesTheLastUsed(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := NewReuse[*line](3, time.Minute)
		defer r.Close()
		counts(t, r, "a", 0, 0)
		all := lines(t, r, "a", "one", "two", "three")
		for _, l := range all {
			r.Put("a", l)
		}
		counts(t, r, "a", 0, 3)
		for _, want := range []string{"three", "two", "one"} {
			c, reused, err := r.Get(t.Context(), "a")
			if err != nil || !reused || c.name != want {
				t.Fatalf("%v, %v, %v, want %s", c, reused, err, want)
			}
		}
		counts(t, r, "a", 3, 0)
		lines(t, r, "b", "another backend's")
		counts(t, r, "b", 1, 0)
		for range all {
			r.Drop("a")
		}
		r.Drop("b")
		counts(t, r, "a", 0, 0)
	})
}

func TestReuseServesInOrder(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := NewReuse[*line](2, time.Minute)
		defer r.Close()
		all := lines(t, r, "a", "one", "two")
		type got struct {
			who    int
			c      *line
			reused bool
		}
		served := make(chan got, 3)
		for who := range 3 {
			go func() {
				c, reused, err := r.Get(t.Context(), "a")
				if err != nil {
					t.Error(err)
				}
				served <- got{who, c, reused}
			}()
			synctest.Wait()
		}
		if len(served) > 0 {
			t.Error("more than two")
		}
		counts(t, r, "a", 2, 0)
		for who, give := range []func(){
			func() { r.Put("a", all[1]) }, func() { r.Drop("a") }, func() { r.Put("a", all[1]) },
		} {
			give()
			synctest.Wait()
			counts(t, r, "a", 2, 0)
			g := <-served
			want := got{who, all[1], true}
			if who == 1 {
				want = got{who: who}
			}
			if g != want {
				t.Errorf("%+v, want %+v", g, want)
			}
		}
		r.Drop("a")
		r.Drop("a")
		counts(t, r, "a", 0, 0)
	})
}

func TestReuseSaysWhichLimit(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := NewReuse[*line](1, time.Minute)
		defer r.Close()
		one := lines(t, r, "a", "one")[0]
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		began := time.Now()
		_, _, err := r.Get(ctx, "a")
		if time.Since(began) != time.Second || !errors.Is(err, context.DeadlineExceeded) ||
			err.Error() != "backend a: all 1 connections (lmtp.max_connections) are in use: context deadline exceeded" {
			t.Errorf("%v after %v", err, time.Since(began))
		}
		counts(t, r, "a", 1, 0)
		r.Put("a", one) // nobody waits any more
		counts(t, r, "a", 0, 1)
	})
}

// A right that is handed over while its taker's ctx ends is not lost.
// Mutation: a forgo that only leaves the queue.
func TestReuseForgoesWhatCameTooLate(t *testing.T) {
	for _, put := range []bool{true, false} {
		synctest.Test(t, func(t *testing.T) {
			r := NewReuse[*line](1, time.Minute)
			defer r.Close()
			one := lines(t, r, "a", "one")[0]
			ctx, cancel := context.WithCancel(t.Context())
			done := make(chan error)
			go func() {
				_, _, err := r.Get(ctx, "a")
				done <- err
			}()
			synctest.Wait()
			r.mu.Lock() // Get has seen the end of ctx and wants to leave the queue …
			cancel()
			var none *line
			if put {
				none = one
			}
			if !r.backends["a"].serveLocked(none, put) { // … but it was its turn
				t.Error("nobody waits")
			}
			r.mu.Unlock()
			if err := <-done; !errors.Is(err, context.Canceled) {
				t.Error(err)
			}
			counts(t, r, "a", 0, map[bool]int{true: 1}[put])
		})
	}
}

func TestReuseClosesWhatIsIdle(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := NewReuse[*line](3, time.Minute)
		defer r.Close()
		all := lines(t, r, "a", "one", "two", "three")
		state := func() (s []bool) {
			synctest.Wait()
			for _, l := range all {
				s = append(s, l.closed.Load())
			}
			return s
		}
		began := time.Now()
		at := func(when time.Duration, want ...bool) {
			t.Helper()
			time.Sleep(time.Until(began.Add(when)))
			if got := state(); !slices.Equal(got, want) {
				t.Errorf("after %v: %v, want %v", when, got, want)
			}
		}
		r.Put("a", all[0])
		at(10*time.Second, false, false, false)
		r.Put("a", all[1])
		r.Put("a", all[2])
		at(20*time.Second, false, false, false)
		if c, _, _ := r.Get(t.Context(), "a"); c != all[2] {
			t.Error(c)
		}
		at(time.Minute-1, false, false, false)
		at(time.Minute, true, false, false)
		counts(t, r, "a", 1, 1)
		at(70*time.Second-1, true, false, false)
		at(70*time.Second, true, true, false)
		counts(t, r, "a", 1, 0)
		at(100*time.Second, true, true, false)
		r.Put("a", all[2]) // the timer begins anew
		at(160*time.Second-1, true, true, false)
		at(160*time.Second, true, true, true)
		counts(t, r, "a", 0, 0)
	})
}

// A connection that is used again has all its time before it again. Mutation:
// a Get that leaves the timer running, with one that does not look at the time.
func TestReuseIdlesAnew(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := NewReuse[*line](1, time.Minute)
		one := lines(t, r, "a", "one")[0]
		for range 5 {
			r.Put("a", one)
			time.Sleep(59 * time.Second)
			if c, reused, err := r.Get(t.Context(), "a"); c != one || !reused || err != nil {
				t.Fatalf("%v, %v, %v", c, reused, err)
			}
		}
		time.Sleep(time.Hour)
		if one.closed.Load() {
			t.Error("closed while in use")
		}
		r.Put("a", one)
		r.Close()
	})
}

func TestReuseFresh(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := NewReuse[*line](4, time.Minute)
		all := lines(t, r, "a", "one", "two", "dead", "busy")
		other := lines(t, r, "b", "other")[0]
		r.Put("a", all[0])
		r.Put("a", all[1])
		r.Put("b", other)
		r.Fresh("a")
		r.Fresh("c")
		if !all[0].closed.Load() || !all[1].closed.Load() || all[2].closed.Load() || all[3].closed.Load() || other.closed.Load() {
			t.Error("closed the wrong ones")
		}
		counts(t, r, "a", 2, 0)
		counts(t, r, "b", 0, 1)
		r.Put("a", all[2])
		r.Put("a", all[3])
		r.Close()
	})
}

// A connection that is slow to close counts until it is closed, and holds up
// nobody but who wants its place.
func TestReuseClosesOutsideTheLock(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := NewReuse[*line](1, time.Minute)
		one, hang := lines(t, r, "a", "one")[0], make(chan struct{})
		one.onClose = func() { <-hang }
		r.Put("a", one)
		time.Sleep(time.Minute)
		synctest.Wait()
		counts(t, r, "a", 1, 0)
		lines(t, r, "b", "other")
		got := make(chan bool, 1)
		go func() {
			_, reused, err := r.Get(t.Context(), "a")
			got <- !reused && err == nil
		}()
		synctest.Wait()
		if len(got) > 0 {
			t.Error("two connections are open")
		}
		close(hang)
		if !<-got {
			t.Error("not a right to open one")
		}
		r.Drop("a")
		r.Drop("b")
		counts(t, r, "a", 0, 0)
	})
}

func TestReuseClose(t *testing.T) {
	for _, idle := range []time.Duration{time.Minute, 0} {
		synctest.Test(t, func(t *testing.T) {
			r := NewReuse[*line](2, idle)
			all := lines(t, r, "a", "one", "two")
			r.Put("a", all[0])
			if all[0].closed.Load() != (idle == 0) {
				t.Error("kept where none should be, or the other way round")
			}
			r.Close()
			r.Close()
			r.Put("a", all[1])
			if !all[0].closed.Load() || !all[1].closed.Load() {
				t.Error("not closed")
			}
			counts(t, r, "a", 0, 0)
			lines(t, r, "a", "the last delivery's")
			r.Drop("a")
		})
	}
}

func TestReuseStress(t *testing.T) {
	const most = 3
	r := NewReuse[*line](most, 50*time.Microsecond)
	var open, used atomic.Int64
	var wg sync.WaitGroup
	for i := range 12 {
		random := rand.New(rand.NewPCG(1, uint64(i)))
		wg.Go(func() {
			for range 400 {
				ctx, cancel := context.WithTimeout(t.Context(), time.Duration(random.IntN(300))*time.Microsecond)
				c, reused, err := r.Get(ctx, "a")
				cancel()
				if err != nil {
					continue
				}
				if !reused {
					c = &line{name: "fresh", onClose: func() { open.Add(-1) }}
					if n := open.Add(1); n > most {
						t.Errorf("%d are open", n)
					}
				}
				if c.closed.Load() || used.Add(1) > most {
					t.Error("a closed connection, or too many")
				}
				if random.IntN(50) == 0 {
					r.Fresh("a")
				}
				used.Add(-1)
				if random.IntN(4) > 0 {
					r.Put("a", c)
					continue
				}
				_ = c.Close()
				r.Drop("a")
			}
		})
	}
	wg.Wait()
	if err := r.Check(); err != nil {
		t.Error(err)
	}
	// An expiry may still be closing some; then it gives back their rights.
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	for range most {
		if _, _, err := r.Get(ctx, "a"); err != nil {
			t.Fatal("a right is lost: ", err)
		}
	}
	counts(t, r, "a", most, 0)
	for range most {
		r.Drop("a")
	}
	r.Close()
	counts(t, r, "a", 0, 0)
}
