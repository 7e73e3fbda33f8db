package integration

import (
	"fmt"
	"net"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"
)

// visit is one session of a user as a backend itself logged it.
type visit struct {
	user, backend, session string
	service                string    // "imap", "pop3", "sieve"
	from, to               time.Time // zero to: still there
	effects                int       // log lines about changes that it made
	lastEffect             time.Time
}

// Cyrus 3.6 logs the login with its session id, with `auditlog: yes` each
// change with the same id, and at the very end, in every service, the traffic:
//
//	login: localhost [127.0.0.1] u0001 PLAIN+TLS User logged in SESSIONID=<…>
//	auditlog: append sessionid=<…> mailbox=<user.u0001> …
//	auditlog: traffic sessionid=<…> bytes_in=<156> bytes_out=<1083>
//
// A process that was killed logs no end: its sessions ended at the latest when
// the instance started anew. Should one have outlived that, its changes tell.
//
// timsieved logs neither the session id at login nor the traffic: its changes
// are known by the process, and its sessions have no end in the log, so they
// are judged by their changes only.
var (
	loginLine   = regexp.MustCompile(`^login: .*?\[[^\]]*\] (\S+) .*User logged in(?:.*SESSIONID=<([^>]+)>)?`)
	auditLine   = regexp.MustCompile(`^auditlog: (\S+) .*?sessionid=<([^>]+)>`)
	replication = []string{"cyrus", "repl", "proxy"} // not users
)

// visits returns what the instance's log says so far, in order of login. A replica's
// port for reading ("look") is left out: posthouse lets nobody in there, and who
// compares both members is on both.
func (c *cyrus) visits(t testing.TB) []visit {
	t.Helper()
	lab.syslog.settle(t, c.prefix)
	var all []visit
	at := map[string]int{} // session, or timsieved's process → index in all
	key := func(l logLine, session string) string {
		if l.process == "sieve" {
			return "process " + l.pid
		}
		return session
	}
	for _, l := range lab.syslog.of(c.prefix) {
		if l.process == "ctl_cyrusdb" && l.text == "recovering cyrus databases" {
			for i := range all {
				if all[i].to.IsZero() {
					all[i].to = l.at
				}
			}
		}
		if m := loginLine.FindStringSubmatch(l.text); m != nil && l.process != "look" && !slices.Contains(replication, m[1]) {
			at[key(l, m[2])] = len(all)
			all = append(all, visit{user: m[1], backend: c.prefix, session: m[2], service: l.process, from: l.at})
		}
		m := auditLine.FindStringSubmatch(l.text)
		if m == nil {
			continue
		}
		i, known := at[key(l, m[2])]
		switch {
		case !known:
		case m[1] == "traffic":
			all[i].to = l.at
		default:
			all[i].effects++
			all[i].lastEffect = l.at
		}
	}
	return all
}

// logLag is how long after the last reply to its client a Cyrus process may
// take until it has logged the end of the session: it closes the connection
// first, and on two busy cores it waits for its turn. It applies to the end of
// a session only; for effects there is no such allowance.
const logLag = time.Second

// mustNotOverlap asserts by the logs of both that no user was on a and on b at
// once: no change on one after a login on the other, as long as a session on
// the first lasted, and no two sessions at once.
func mustNotOverlap(t testing.TB, a, b *cyrus) {
	t.Helper()
	if both := overlaps(a.visits(t), b.visits(t)); len(both) > 0 {
		t.Errorf("the backends' logs show users on both:\n%s", strings.Join(both, "\n"))
	}
}

func overlaps(on, other []visit) []string {
	var both []string
	for _, v := range on {
		for _, w := range other {
			if v.user != w.user {
				continue
			}
			first, second := v, w
			if w.from.Before(v.from) {
				first, second = w, v
			}
			switch {
			case first.lastEffect.After(second.from):
				both = append(both, fmt.Sprintf("%s changed something on %s %v after logging in on %s",
					v.user, first.backend, first.lastEffect.Sub(second.from), second.backend))
			case first.service == "sieve":
			case first.to.IsZero():
				both = append(both, fmt.Sprintf("%s never left %s and is on %s", v.user, first.backend, second.backend))
			case first.to.Sub(second.from) > logLag:
				both = append(both, fmt.Sprintf("%s left %s %v after logging in on %s",
					v.user, first.backend, first.to.Sub(second.from), second.backend))
			}
		}
	}
	return both
}

// users lists the distinct users among visits, sorted.
func usersOf(visits []visit) []string {
	var users []string
	for _, v := range visits {
		users = append(users, v.user)
	}
	slices.Sort(users)
	return slices.Compact(users)
}

// TestVisits shows that the evidence is good: a user who really is on both
// instances at once is found, and one who is on one after the other is not.
func TestVisits(t *testing.T) {
	t.Parallel()
	pair := newCyrusPair(t, "u0001", "u0002")
	onA := pair.a.as(t, "u0001")
	onB := pair.b.as(t, "u0001")
	_, _, err := onA.imap(5*time.Second, "CREATE both")
	must(t, err)
	for _, w := range []*wire{onA, onB} {
		w.imap(5*time.Second, "LOGOUT")
	}
	pair.a.deliver(t, "u0002", "one after the other")
	within(t, 5*time.Second, "u0002 has left a", func() bool {
		last := pair.a.visits(t)
		return !last[len(last)-1].to.IsZero()
	})
	pair.b.as(t, "u0002").imap(5*time.Second, "LOGOUT")

	both := overlaps(pair.a.visits(t), pair.b.visits(t))
	if len(both) != 1 || !strings.Contains(both[0], "u0001 changed something") {
		t.Fatalf("found %q", both)
	}
}

// TestVisitsEndWithTheInstance: a process that was killed says nothing, and its
// session counts as one that goes on until its instance starts anew.
func TestVisitsEndWithTheInstance(t *testing.T) {
	t.Parallel()
	killed := &cyrus{prefix: filepath.Base(newDir(t, "killed-"))}
	says := func(line string) {
		conn, err := net.Dial("unixgram", lab.syslog.socket)
		must(t, err)
		defer conn.Close()
		_, err = conn.Write([]byte("<22>Jan  1 00:00:00 " + killed.prefix + "/" + line))
		must(t, err)
	}
	says("imap[7]: login: localhost [127.0.0.1] u0001 PLAIN User logged in SESSIONID=<s7>")
	if all := killed.visits(t); len(all) != 1 || !all[0].to.IsZero() {
		t.Fatalf("before: %v", all)
	}
	says("ctl_cyrusdb[8]: recovering cyrus databases")
	if all := killed.visits(t); len(all) != 1 || all[0].to.IsZero() {
		t.Fatalf("after: %v", all)
	}
}
