package spool

import (
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"
)

// Two messages share a Disk that holds one of them: the second's slow reader
// drops out, the fast ones get everything, and a later message finds the octets
// free again.
func TestDiskIsBoundedForAllMessages(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		body := message(400 << 10)
		disk := NewDisk(500 << 10)
		pass := func(slowAfter time.Duration) (s *Spool, fast, slow *heard) {
			s = New(Options{Dir: t.TempDir(), MaxLag: time.Second, Disk: disk})
			toFast, toSlow := s.NewReader(), s.NewReader()
			var wg sync.WaitGroup
			wg.Go(func() { fast = drain(toFast, nil) })
			wg.Go(func() {
				time.Sleep(slowAfter)
				slow = drain(toSlow, nil)
			})
			send(t, s, body, 7000)
			if used := disk.used.Load(); used > 500<<10 {
				t.Errorf("%d octets are on disk", used)
			}
			wg.Wait()
			return s, fast, slow
		}
		first, fast, slow := pass(time.Minute)
		whole(t, "fast", fast, body)
		whole(t, "slow", slow, body)
		second, fast, slow := pass(time.Minute)
		whole(t, "fast", fast, body)
		if slow.err == nil || !strings.Contains(slow.err.Error(), "no more than 512000 octets") {
			t.Errorf("the slow reader got %d octets and %v", len(slow.body), slow.err)
		}
		closed(t, second)
		closed(t, first)
		if used := disk.used.Load(); used != 0 {
			t.Errorf("%d octets were not given back", used)
		}
		third, fast, slow := pass(time.Minute)
		whole(t, "fast", fast, body)
		whole(t, "slow", slow, body)
		closed(t, third)
	})
}
