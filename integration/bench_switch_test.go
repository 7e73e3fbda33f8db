//go:build bench

package integration

import (
	"testing"
	"time"
)

// TestBenchSwitch: a role with 2000 live sessions on three frontends, with etcd
// and without hooks, goes to and fro. Measured are the times from the command to
// the first login on the new active, and to the command's end.
func TestBenchSwitch(t *testing.T) {
	const sessions, switches = 2000, 9
	users := userNames(sessions)
	a, b := newRecorder(t, "a", nextHost(), nil), newRecorder(t, "b", nextHost(), nil)
	s := newSite(t, a.backend(), b.backend(), users...).shared(newEtcd(t), "3s")
	s.fast = true
	s.limits = "max_parked_per_ip: 1000" // they all come from one address
	frontends := []*posthouse{startFrontend(t, s), startFrontend(t, s), startFrontend(t, s)}

	var first, whole []time.Duration
	for i := range switches {
		clients := crowdOf(t, frontends, sessions)
		to := []*recorder{b, a}[i%2]
		began := time.Now()
		ended := frontends[i%3].startSwitch(t, []string{"b", "a"}[i%2])
		p := frontends[(i+1)%3]
		within(t, 10*time.Second, "the role is held", func() bool { return p.role(t).Phase != "open" || len(ended) > 0 || to.sessions() > 0 })
		w, err := imapLogin(p.imap(), p.name, users[0], password, 30*time.Second)
		must(t, err)
		first = append(first, time.Since(began))
		result := <-ended
		mustOpen(t, result)
		whole = append(whole, result.took)
		w.Close()
		for _, c := range clients {
			c.Close()
		}
		within(t, 10*time.Second, "everybody has left", func() bool { return a.sessions()+b.sessions() == 0 })
	}
	mustNeverBeOnBoth(t, a, b)
	t.Logf("%d sessions, %d switches; first login on the new active: %s; end of the command: %s", sessions, switches, inShort(first), inShort(whole))
}
