package routing

import (
	"errors"
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
