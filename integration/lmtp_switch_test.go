package integration

import (
	"slices"
	"strings"
	"testing"
	"time"
)

// TestDeliverAndSwitch: a loader delivers 10000 messages, some to several
// roles, while role ma01 goes back and forth twenty times between the members
// of a replicated Cyrus pair. Who was told 250 has the message in the end, once;
// who was told 4xx is tried again, and nobody is told 5xx.
//
// posthouse has no hooks here, so the test plays the operator's part while the
// role is on hold: an idle session, whose process on the backend stands still,
// keeps it there until the mail is over on the other side and the LMTP service
// has moved with the primary's part.
func TestDeliverAndSwitch(t *testing.T) {
	const messages, switches = 10_000, 20
	users := userNames(15)
	first, holder, second, third := users[:8], users[8], users[9:12], users[12:]
	pair := newCyrusPair(t, users[:9]...)
	c, d := newDovecot(t), newDovecot(t)
	s := takesMail(newSite(t, pair.a.backend(), pair.b.backend(), users[:9]...))
	s.addRole("ma02", "c", c.backend(), second...)
	s.addRole("ma03", "d", d.backend(), third...)
	p := startFrontend(t, s)

	parcels := manyParcels(messages, first, second, third)
	l := &loader{address: p.lmtp(), connections: 12}
	began := time.Now()
	l.start(t, parcels)
	var longest time.Duration
	for i := range switches {
		due := messages - int64(i+1)*messages/(switches+1)
		within(t, 60*time.Second, "the loader gets on", func() bool { return l.left.Load() <= due })
		took := switchMidMail(t, p, pair, holder)
		longest = max(longest, took)
	}
	if l.left.Load() == 0 {
		t.Error("the loader was through before the last switch: nothing was shown")
	}
	l.finish(t, 120*time.Second)
	took := time.Since(began)
	mustBeAccepted(t, parcels)

	active := pair.primary()
	p.mustBeOn(t, map[bool]string{true: "a", false: "b"}[active == pair.a])
	twice := 0
	for rcpt, sent := range byRecipient(parcels) {
		user := localPart(rcpt)
		var server mailServer = active
		if slices.Contains(second, user) {
			server = c
		} else if slices.Contains(third, user) {
			server = d
		}
		twice += mustHave(t, server, user, sent)
	}
	t.Logf("%d messages in %v, %d switches, the longest hold %v; slowest transaction %v; %d connections lost; %d duplicates; %s",
		messages, took.Round(time.Millisecond), switches, longest.Round(time.Millisecond), time.Duration(l.slowest.Load()).Round(time.Millisecond),
		l.lost.Load(), twice, tallied(tally(parcels)))
	if twice > 0 {
		t.Errorf("%d messages are there twice", twice)
	}
}

// manyParcels: half of them are for the first role, and every tenth for two or
// three roles.
func manyParcels(n int, first, second, third []string) []*parcel {
	parcels := make([]*parcel, n)
	for i := range parcels {
		a, b, c := first[i%len(first)], second[i%len(second)], third[i%len(third)]
		switch i % 20 {
		case 0, 1, 2, 3, 4:
			parcels[i] = newParcel(at("example.org", b)...)
		case 5, 6, 7, 8, 9:
			parcels[i] = newParcel(at("example.org", c)...)
		case 10:
			parcels[i] = newParcel(at("example.org", b, a)...)
		case 11:
			parcels[i] = newParcel(at("example.org", a, b, c)...)
		default:
			parcels[i] = newParcel(at("example.org", a)...)
		}
	}
	return parcels
}

// primary is the instance that takes mail.
func (p *cyrusPair) primary() *cyrus {
	if p.b.primary {
		return p.b
	}
	return p.a
}

// switchMidMail moves ma01 to the other member and returns how long that took.
func switchMidMail(t *testing.T, p *posthouse, pair *cyrusPair, holder string) time.Duration {
	t.Helper()
	old, to := pair.a, "b"
	if pair.b.primary {
		old, to = pair.b, "a"
	}
	p.as(t, holder)
	thaw := old.freeze(t, holder)
	began := time.Now()
	ended := p.startSwitch(t, to)
	within(t, 5*time.Second, "the role is on hold", func() bool { return p.role(t).Phase == "hold" })
	old.waitUntilQuiet(t)
	pair.change(t)
	changed := time.Now()
	thaw()
	mustOpen(t, <-ended)
	if late := old.deliveriesSince(t, changed); len(late) > 0 {
		t.Errorf("mail came to %s when it was the replica: %+v", old.prefix, late)
	}
	return time.Since(began)
}

// waitUntilQuiet waits until no lmtpd of the instance is at work: what was in
// its last line of the log is followed by nothing.
func (c *cyrus) waitUntilQuiet(t *testing.T) {
	t.Helper()
	last := -1
	within(t, 10*time.Second, c.prefix+" takes no more mail", func() bool {
		n := len(c.deliveriesSince(t, time.Time{}))
		still := n == last
		last = n
		return still && !becomes(100*time.Millisecond, func() bool { return len(c.deliveriesSince(t, time.Time{})) != last })
	})
}

// deliveriesSince are the messages that lmtpd has stored, by the log.
func (c *cyrus) deliveriesSince(t *testing.T, since time.Time) []logLine {
	t.Helper()
	return slices.DeleteFunc(lab.syslog.of(c.prefix), func(l logLine) bool {
		return l.process != "lmtp" || !strings.HasPrefix(l.text, "auditlog: append ") || !l.at.After(since)
	})
}

// mustHave asserts that user's INBOX has all that was sent, and returns how
// many messages are there more than once.
func mustHave(t *testing.T, server mailServer, user string, sent []*parcel) (twice int) {
	t.Helper()
	times := map[string]int{}
	for _, subject := range subjectsOf(t, server, user) {
		times[subject]++
	}
	missing := 0
	for _, p := range sent {
		if times[p.id] == 0 {
			if missing++; missing <= 5 {
				t.Errorf("%s: accepted, but not there: %s", user, p.id)
			}
		}
		if times[p.id] > 1 {
			twice++
		}
	}
	if missing > 5 {
		t.Errorf("%s: %d messages are not there", user, missing)
	}
	return twice
}
