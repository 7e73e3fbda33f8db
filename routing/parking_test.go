package routing

import (
	"errors"
	"fmt"
	"net/netip"
	"strings"
	"testing"
	"testing/synctest"
	"time"
)

// Nobody takes all places of those who wait: not a role, a user, an address, nor
// logins whose password nobody has checked.
func TestParkingLimits(t *testing.T) {
	mallory := netip.MustParseAddr("192.0.2.66")
	for name, c := range map[string]struct {
		limits  Parking
		options []EnterOption
		users   func(n int) string
		reason  string
	}{
		"total":      {Parking{Total: 3}, nil, func(n int) string { return fmt.Sprint("u", n) }, "3 logins are parked in all"},
		"role":       {Parking{Role: 3}, nil, func(n int) string { return fmt.Sprint("u", n) }, "3 logins are parked for role ma01"},
		"user":       {Parking{User: 3}, nil, func(int) string { return "u1" }, "3 logins are parked for user u1"},
		"address":    {Parking{Address: 3}, []EnterOption{From(mallory)}, func(n int) string { return fmt.Sprint("u", n) }, "3 logins are parked from 192.0.2.66"},
		"unverified": {Parking{Unverified: 3}, []EnterOption{Unverified()}, func(n int) string { return fmt.Sprint("u", n) }, "3 logins are parked that nobody has verified"},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				h := newHost(t)
				for n := range 5 {
					h.dir.set(fmt.Sprint("u", n), Entry{fmt.Sprint("u", n), "ma01"})
				}
				h.opt.Parking = c.limits
				f := h.start("f")
				stay := f.enter("alice")
				done := f.goSwitch(toB)
				<-stay.Revoked()
				entered := make(chan error)
				for n := range 3 {
					go func() {
						s, err := f.Enter(t.Context(), c.users(n), c.options...)
						if err == nil {
							s.Leave(proven)
						}
						entered <- err
					}()
				}
				synctest.Wait()
				began := time.Now()
				_, err := f.Enter(t.Context(), c.users(3), c.options...)
				if !errors.Is(err, ErrHeld) || !strings.Contains(err.Error(), c.reason) || time.Since(began) > 0 {
					t.Errorf("%v after %v, want %q", err, time.Since(began), c.reason)
				}
				stay.Leave(proven)
				if err := <-done; err != nil {
					t.Error(err)
				}
				for range 3 {
					if err := <-entered; err != nil {
						t.Error(err)
					}
				}
				f.stop() // checks that every slot was given back
			})
		})
	}
}

// Those who waited come one after the other, and not all at once.
func TestEntryIsSpread(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := newHost(t)
		h.opt.Parking = Parking{User: 1000, EntryRate: 100}
		f := h.start("f")
		stay := f.enter("alice")
		done := f.goSwitch(toB)
		<-stay.Revoked()
		entered := make(chan time.Time, 500)
		for range 500 {
			go func() {
				f.enter("bob").Leave(proven)
				entered <- time.Now()
			}()
		}
		synctest.Wait()
		stay.Leave(proven)
		if err := <-done; err != nil {
			t.Error(err)
		}
		opened, most := time.Now(), 0
		inSecond := make(map[int]int)
		for range 500 {
			at := <-entered
			second := int(at.Sub(opened) / time.Second)
			inSecond[second]++
			most = max(most, inSecond[second])
		}
		if most > 150 || len(inSecond) < 5 {
			t.Errorf("logins in each second: %v, want about 100", inSecond)
		}
		f.stop()
	})
}
