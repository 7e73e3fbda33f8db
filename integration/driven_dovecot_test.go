package integration

import (
	"fmt"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"
)

// TestSwitchesOfADovecotPair: two frontends drive the hooks that we ship for Dovecot,
// while clients append and set flags, and MTAs deliver. Two of the switches are
// turned back, one after DEMOTE and one after PROMOTE; then the active dies.
//
// No login is refused, nobody is on both members, and what was acknowledged is on
// the new active, under the same UID and with its flag.
func TestSwitchesOfADovecotPair(t *testing.T) {
	t.Parallel()
	users := userNames(6)
	s, a, b := newHookedDovecots(t)
	members := map[string]hookedDovecot{"a": a, "b": b}
	for _, d := range members { // from its next start on; rejoin needs the list
		d.listUsers(t, users)
	}
	site := newSite(t, a.backend(), b.backend(), users...)
	site.doors = append(site.doors, `{protocol: lmtp, address: "$HOST:24", tls: off, trusted: ["127.0.0.0/8"]}`)
	site.more = append(site.more, `lmtp: {local_domains: ["*"]}`)
	site.limits = "hold_window: 29s, switch_budget: 27s, entry_rate: 5000"
	s.steer(t)
	w := &witness{users: users, frontends: []*posthouse{s.drivenBy(t, site, "")}}
	w.frontends = append(w.frontends, startFrontend(t, site))
	w.start(t)

	var took []time.Duration
	checked := 0
	active := "a"
	for i, round := range []struct{ to, fails, undone string }{
		{"b", "", ""}, {"a", "catch_up", "undo_demote"}, {"a", "promote", "undo_promote"}, {"a", "", ""},
	} {
		seen := w.session()
		within(t, 60*time.Second, "everybody has been in and appended since", func() bool { return w.everybodySince(seen) || w.complained() })
		mend := s.fails(t, round.fails)
		p := w.frontends[i%2]
		result := p.switchTo(t, round.to)
		mend()
		took = append(took, result.took)
		if round.fails != "" {
			mustFail(t, result, "hook "+round.fails+" failed")
			if ran := readFile(t, s.script+".ran"); !strings.Contains(ran, round.undone+"\n") {
				t.Errorf("%s did not run: %q", round.undone, ran)
			}
		} else {
			mustOpen(t, result)
			active = round.to
		}
		p.mustBeOn(t, active)
		members[active].mustBe(t, s, "master")
		members[map[string]string{"a": "b", "b": "a"}[active]].mustBe(t, s, "replica")
	}
	seen := w.session()
	within(t, 60*time.Second, "everybody has been in and appended since", func() bool { return w.everybodySince(seen) || w.complained() })
	w.stop()
	for _, complaint := range w.complaints {
		t.Error(complaint)
	}
	checked += w.compare(t, a, users)
	mustHaveVisited(t, a, b)

	for _, user := range users {
		a.sync(t, b, user)
	}
	a.die()
	p := w.frontends[1]
	mustOpen(t, p.verb(t, "failover", "ma01", "--to", "b"))
	p.mustBeOn(t, "b")
	b.mustBe(t, s, "master")
	checked += w.compare(t, b, users)
	must(t, p.as(t, users[0]).append(5*time.Second, "INBOX", "since the failover"))
	mustFail(t, p.switchTo(t, "a"), "stale")
	mustOpen(t, p.verb(t, "rejoin", "ma01", "a"))
	a.mustBe(t, s, "replica")
	mustOpen(t, p.switchTo(t, "a"))
	checked += w.compare(t, a, users)
	if has := subjectsOf(t, a, users[0]); !slices.Contains(has, "since the failover") {
		t.Errorf("taken on b since the failover, and not on a: %q", has)
	}
	t.Logf("%d messages acknowledged, %d flagged, %d UIDs compared; %d logins, refused %d; users on both 0 unless said above; command to end: %s",
		len(w.acked), len(w.flagged), checked, w.logins, w.refused, inShort(took))
}

// Dovecot logs a login, with mail_log each change in the session of that login, and
// its end; of lmtp what it has stored. A process that was killed logs no end: its
// sessions ended at the latest when the instance started anew.
var (
	dovecotLine    = regexp.MustCompile(`(?m)^(\S+ \S+) (\S+): (?:Info|Warning): (.*)$`)
	dovecotLogin   = regexp.MustCompile(`^Login: user=<([^>]*)>.* session=<([^>]*)>`)
	dovecotSession = regexp.MustCompile(`^([a-z0-9]+)\(([^)]*)\)<\d+><([^>]*)>$`)
)

// visits returns what the instance's log says so far.
func (d hookedDovecot) visits(t testing.TB) []visit {
	t.Helper()
	var all []visit
	at := map[string]int{} // session → index in all
	for _, line := range dovecotLine.FindAllStringSubmatch(d.logText(), -1) {
		when, err := time.ParseInLocation("2006-01-02 15:04:05.000000", line[1], time.Local)
		must(t, err)
		if line[2] == "master" {
			for i := range all {
				if all[i].to.IsZero() && strings.Contains(line[3], "starting up") {
					all[i].to = when
				}
			}
		}
		if m := dovecotLogin.FindStringSubmatch(line[3]); m != nil {
			at[m[2]] = len(all)
			all = append(all, visit{user: m[1], backend: d.name, session: m[2], service: strings.TrimSuffix(line[2], "-login"), from: when})
		}
		m := dovecotSession.FindStringSubmatch(line[2])
		if m == nil {
			continue
		}
		if m[1] == "lmtp" {
			all = append(all, visit{user: m[2], backend: d.name, session: m[3], service: "lmtp", from: when, to: when, effects: 1, lastEffect: when})
		}
		i, known := at[m[3]]
		switch {
		case !known:
		case strings.HasPrefix(line[3], "Disconnected"):
			all[i].to = when
		default:
			all[i].effects++
			all[i].lastEffect = when
		}
	}
	return all
}

// mustHaveVisited asserts by the logs of both that users, deliveries and changes
// were on each, and no user on both at once.
func mustHaveVisited(t testing.TB, a, b hookedDovecot) {
	t.Helper()
	on, other := a.visits(t), b.visits(t)
	for _, visits := range [][]visit{on, other} {
		for _, service := range []string{"imap", "lmtp"} {
			if !slices.ContainsFunc(visits, func(v visit) bool { return v.service == service && v.effects > 0 }) {
				t.Errorf("one log shows no work of %s", service)
			}
		}
	}
	if both := overlaps(on, other); len(both) > 0 {
		t.Errorf("the backends' logs show users on both:\n%s", strings.Join(both, "\n"))
	}
}

// TestVisitsOfDovecot shows that the evidence is good: who is on both at once is
// found, and who is on one after the other is not.
func TestVisitsOfDovecot(t *testing.T) {
	t.Parallel()
	log := func(name string, lines ...string) hookedDovecot {
		d := hookedDovecot{&dovecot{daemon: &daemon{dir: newDir(t, "log-")}}, name}
		writeFile(t, filepath.Join(d.dir, "log"), "2026-11-23 12:00:"+strings.Join(lines, "\n2026-11-23 12:00:")+"\n")
		return d
	}
	const login = " imap-login: Info: Login: user=<%s>, method=PLAIN, rip=127.0.0.1, lip=127.0.0.2, mpid=7, TLS, session=<%s>"
	a := log("a", "01.000000"+fmt.Sprintf(login, "u0001", "s1"), "01.500000 imap(u0001)<7><s1>: Info: Disconnected: Logged out in=1 out=1",
		"02.000000"+fmt.Sprintf(login, "u0002", "s2"), "04.100000 imap(u0002)<8><s2>: Info: save: box=INBOX, uid=1, msgid=, size=9",
		"05.000000"+fmt.Sprintf(login, "u0003", "s3"), "08.000000 lmtp(u0001)<9><l1>: Info: save: box=INBOX, uid=2, msgid=, size=9",
		"09.000000 master: Info: Dovecot v2.3.19.1 (9b53102964) starting up without any protocols (core dumps disabled)")
	b := log("b", "02.000000"+fmt.Sprintf(login, "u0001", "t1"), "07.000000 imap(u0001)<7><t1>: Info: Disconnected: Logged out in=1 out=1",
		"04.000000"+fmt.Sprintf(login, "u0002", "t2"), "06.000000"+fmt.Sprintf(login, "u0003", "t3"),
		"09.500000 lmtp(u0003)<9><l2>: Info: save: box=INBOX, uid=2, msgid=, size=9")
	both := overlaps(a.visits(t), b.visits(t))
	want := []string{"u0002 changed something on a 100ms after logging in on b", "u0003 left a 3s after logging in on b"}
	if !slices.Equal(both, want) {
		t.Errorf("found %q, want %q", both, want)
	}
}
