//go:build bench

package integration

import (
	"os"
	"path/filepath"
	"testing"
	"time"
)

// byHand is what an administrator of a Cyrus pair does to change the primary in
// good order: stop it with its sync_client, send what that has not sent, and start
// the replica as primary. It returns how long that took; what comes after it (the
// old one starts as replica) keeps nobody waiting.
func (p *cyrusPair) byHand(t testing.TB) time.Duration {
	t.Helper()
	old, next := p.a, p.b
	if next.primary {
		old, next = next, old
	}
	began := time.Now()
	old.stopSync(t)
	old.stop(t)
	for _, log := range []string{"log-run", "log"} {
		path := filepath.Join(old.dir, "conf/sync", log)
		if os.Rename(path, path+".flush") != nil {
			continue // there is none
		}
		if out, err := runTool(t, 60*time.Second, nil, old.argv("sync_client", "-o", "-r", "-f", path+".flush")...); err != nil {
			t.Fatalf("sync_client -r -f: %v: %s", err, out)
		}
	}
	next.stop(t)
	next.primary = true
	next.start(t)
	took := time.Since(began)
	old.primary = false
	old.start(t)
	next.startSync(t)
	return took
}

// TestBenchHooks: what a switch with the shipped hooks costs beside the same work by
// hand, on two mirrored pairs of 50 users each, in turn: without anything to send,
// and right after 500 messages have come in. Nobody else is at work.
func TestBenchHooks(t *testing.T) {
	const rounds = 9
	users := userNames(50)
	hand := newCyrusPair(t, users...)
	h, a, b := newHookedPair(t, users...)
	s := newSite(t, a.backend(), b.backend(), users...).shared(newEtcd(t), "3s")
	s.fast = true
	s.useHooks(h)
	frontends := []*posthouse{startFrontend(t, s), startFrontend(t, s), startFrontend(t, s)}

	took := map[string][]time.Duration{}
	for i := range 2 * rounds {
		load := []string{"idle", "500 messages"}[i%2]
		from, to := []hookedCyrus{a, b}[i%2], []string{"b", "a"}[i%2]
		primary := hand.a
		if hand.b.primary {
			primary = hand.b
		}
		if i%2 == 1 {
			deliverMany(t, primary.lmtp(), 10, users...)
		}
		took["by hand, "+load] = append(took["by hand, "+load], hand.byHand(t))
		if i%2 == 1 {
			deliverMany(t, from.lmtp(), 10, users...)
		}
		result := frontends[i%3].switchTo(t, to)
		mustOpen(t, result)
		took["switch with hooks, "+load] = append(took["switch with hooks, "+load], result.took)
		for _, p := range frontends {
			within(t, 30*time.Second, p.name+" has the role open", func() bool { return p.role(t).Phase == "open" })
		}
	}
	for _, what := range []string{"by hand, idle", "switch with hooks, idle", "by hand, 500 messages", "switch with hooks, 500 messages"} {
		t.Logf("%-33s %s", what, inShort(took[what]))
	}
	stdout, _, _ := frontends[0].cli(t, "switches")
	t.Logf("the last ones:\n%s", tail(stdout, 1500))
}
