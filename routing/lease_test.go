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

// Safety 10: who cannot renew its lease has nobody inside when it ends, lets
// nobody in, and goes on when it can renew it again.
func TestSafety10LeaseThatCannotBeRenewed(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := newHost(t)
		h.lease, h.opt.DrainTimeout = 30*time.Second, 10*time.Second
		f := h.start("f")
		stay := f.enter("alice")
		began := time.Now()
		time.Sleep(15 * time.Second)
		f.store.renew(30 * time.Second)
		<-stay.Revoked()
		if took := time.Since(began); took < 35*time.Second-time.Millisecond || took > 36*time.Second {
			t.Errorf("revoked after %v, want 35s: drain_timeout before the end of the lease", took)
		}
		if err := stay.Check(); !errors.Is(err, ErrRevoked) {
			t.Errorf("Check = %v", err)
		}
		stay.Leave(End{Proven: true})

		entered := make(chan time.Duration)
		go func() {
			f.enter("bob").Leave(End{Proven: true})
			entered <- time.Since(began)
		}()
		time.Sleep(7 * time.Second)
		f.store.renew(30 * time.Second)
		if at := <-entered; at < 42*time.Second {
			t.Errorf("entered after %v, without a lease", at)
		}
		f.stop()
	})
}

// A process that was stopped past its lease runs on where it was: just before it
// admits a client it must look at the clock, as no timer has run yet.
func TestSafety10ClockIsReadBeforeAdmitting(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := newHost(t)
		h.lease = time.Minute
		f := h.start("f")
		stay := f.enter("alice")
		if err := stay.Check(); err != nil {
			t.Fatal(err)
		}
		f.store.renew(-time.Second) // and heedDeadline sleeps on
		if err := stay.Check(); !errors.Is(err, ErrRevoked) {
			t.Errorf("Check = %v", err)
		}
		if _, err := f.Enter(t.Context(), "bob", NoWait()); !errors.Is(err, ErrHeld) {
			t.Errorf("Enter = %v", err)
		}
		stay.Leave(End{Proven: true})
		f.stop()
	})
}

// Who serves nobody says so, to who asks for its health, its roles or a user, for
// as long as that is so.
func TestNotReadyWhileNobodyEnters(t *testing.T) {
	for name, c := range map[string]struct{ lose, regain func(f *process) }{
		"without a lease": {
			func(f *process) { f.store.renew(-time.Second) },
			func(f *process) { f.store.renew(time.Hour) },
		},
		"without a registration": {
			func(f *process) {
				f.host.site.fail(errors.New("etcd: no leader")) // it cannot register anew
				s := f.host.site.get().Clone()
				s.Revision++
				delete(s.Frontends, f.ID())
				f.host.site.replace(s)
			},
			func(f *process) { f.host.site.fail(nil) },
		},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				h := newHost(t)
				h.lease = time.Hour
				f := h.start("f")
				check := func(serves bool) {
					t.Helper()
					synctest.Wait()
					s, err := f.Enter(t.Context(), "alice", NoWait())
					if (err == nil) != serves {
						t.Fatalf("a login: %v", err)
					}
					if err == nil {
						s.Leave(proven)
					}
					blocked, parks := f.Roles()[0].Blocked, f.Explain(t.Context(), "alice").Parks
					if ready := f.Ready(); (ready == nil) != serves || (blocked == "") != serves || parks != blocked {
						t.Errorf("a login gets %v, and it is ready: %v; blocked: %q; parks: %q", err, ready, blocked, parks)
					}
				}
				check(true)
				c.lose(f)
				check(false)
				c.regain(f)
				time.Sleep(time.Minute)
				check(true)
				f.stop()
			})
		})
	}
}

// declaredStore is the store of a frontend of which others were told that it has
// ended.
type declaredStore struct {
	*memStore
	ended string
}

func (s declaredStore) Gone(ctx context.Context, ids []string) ([]string, error) {
	gone, err := s.memStore.Gone(ctx, ids)
	if slices.Contains(ids, s.ended) {
		gone = append(gone, s.ended)
	}
	return gone, err
}

// Somebody was told that a frontend has ended, and has not buried it. Nobody else
// is there to do so: it does it itself, ends its sessions and goes on under
// another ID. What it had inside is waited for.
func TestSafety10DeclaredEndedButNotBuried(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := newHost(t)
		opt := h.opt
		opt.ID, opt.Directory, opt.Local = NewID("f"), h.dir, h.local
		store := declaredStore{h.site.open(), opt.ID}
		opt.Store = store
		table, err := Start(t.Context(), opt)
		if err != nil {
			t.Fatal(err)
		}
		f := &process{h, table, store.memStore}
		stay := f.enter("alice")
		time.Sleep(time.Minute)
		if registered := sortedKeys(h.site.get().Frontends); f.ID() == opt.ID || !slices.Equal(registered, []string{f.ID()}) {
			t.Errorf("%s goes on as %s; registered: %v", opt.ID, f.ID(), registered)
		}
		if err := stay.Check(); !errors.Is(err, ErrRevoked) {
			t.Errorf("its session: %v", err)
		}
		f.mustFail(toB, "may still run on a")
		stay.Leave(proven)
		f.enter("bob").Leave(proven)
		f.stop()
	})
}

// A start that is refused has written down who has ended all the same: they were
// told to have, and nobody else may come by.
func TestRefusedStartBuries(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := newHost(t)
		h.start("f").kill()
		h.opt.Backends["a"] = map[string]string{"imap": "10.0.0.99:143"}
		if _, err := h.tryStart("g"); err == nil || !strings.Contains(err.Error(), "new backend name") {
			t.Fatalf("a start with another address of a: %v", err)
		}
		s := h.site.get()
		if len(s.Frontends) != 0 || len(s.Roles["ma01"].Residues) != 1 {
			t.Errorf("registered: %v; residues: %v", s.Frontends, s.Roles["ma01"].Residues)
		}
	})
}
