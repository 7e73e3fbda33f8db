package integration

import (
	"io"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"
)

// TestLMTPAddresses (safety 29): however a recipient is spelt, it is the
// directory's user, on the active backend of that user's role, in one mailbox.
func TestLMTPAddresses(t *testing.T) {
	t.Parallel()
	pair, d := newCyrusPair(t, "u0001"), newDovecot(t)
	pair.b.setPrimary(t, true) // mail that comes to the wrong side is seen there
	s := takesMail(newSite(t, pair.a.backend(), pair.b.backend(), "u0001"), "postmaster: u0001", "catch_all: u0011")
	s.addRole("ma02", "c", d.backend(), "u0011")
	p := startFrontend(t, s)
	to := map[string][]string{
		"u0001": {"u0001@example.org", "U0001@EXAMPLE.ORG", "u0001@another.example", `"u0001"@example.org`, `"u\0001"@example.org`,
			"u0001+lists@example.org", "U0001+A+B@example.org", "@relay.test:u0001@example.org",
			"u0001", "postmaster", "postmaster@example.org", "Postmaster@Example.Org", "u0001@[127.0.0.1]"},
		"u0011": {"u0011@example.org", "u0011+x@example.org", `"u0011+with space"@example.org`, "nobody@example.org", `"no body"@example.org`, "info+u0001@example.org"},
	}
	server := map[string]mailServer{"u0001": pair.a, "u0011": d}
	for user, spellings := range to {
		l := mustDialLMTP(t, p.lmtp())
		var sent []*parcel
		for _, rcpt := range spellings {
			m := newParcel(rcpt)
			said, err := l.deliver(sender, m.rcpts, m.message())
			must(t, err)
			m.record(m.rcpts, said)
			if !said[0].accepted() {
				t.Errorf("%s: %v", rcpt, said[0])
			}
			sent = append(sent, m)
		}
		all := newParcel(spellings...) // in one transaction: a reply for each spelling
		said, err := l.deliver(sender, all.rcpts, all.message())
		must(t, err)
		must(t, l.silent())
		for i, r := range said {
			if !r.accepted() {
				t.Errorf("%s, with the others: %v", spellings[i], r)
			}
		}
		has := subjectsOf(t, server[user], user)
		for _, m := range sent {
			if n := count(has, m.id); n != 1 {
				t.Errorf("%s: the message is there %d times", m.rcpts[0], n)
			}
		}
		if n := count(has, all.id); n == 0 || n > len(spellings) {
			t.Errorf("%s has the message to all spellings %d times", user, n)
		}
	}
	lab.syslog.settle(t, pair.b.prefix)
	if strayed := pair.b.deliveriesSince(t, time.Time{}); len(strayed) > 0 {
		t.Errorf("mail came to the replica: %+v", strayed)
	}
}

func count(all []string, one string) int {
	return len(slices.DeleteFunc(slices.Clone(all), func(s string) bool { return s != one }))
}

// TestLMTPSwitchBeforeDot: a delivery is in the middle of its message when the
// role is moved. It does not hold the switch up, its recipient is told 451, and
// nobody has half a message; the next attempt goes to the new active.
func TestLMTPSwitchBeforeDot(t *testing.T) {
	t.Parallel()
	moved := func(t *testing.T, a, b mailServer, p *posthouse, change func()) {
		l := mustDialLMTP(t, p.lmtp())
		m := newParcel("u0001@example.org")
		half := begin(t, l, m)
		result := p.switchTo(t, "b")
		mustOpen(t, result)
		if result.took > 3*time.Second {
			t.Errorf("the delivery held the switch up: %v", result)
		}
		if r := p.mustBeOn(t, "b"); len(r.Residues) > 0 {
			t.Errorf("residues: %+v", r.Residues)
		}
		_, err := io.WriteString(l, stuffed(m.message())[half:]+".\r\n")
		must(t, err)
		asked := time.Now()
		r, err := l.reply(lmtpLimit)
		must(t, err)
		if r.code != 451 || time.Since(asked) > time.Second {
			t.Errorf("told %v after %v, want 451 at once", r, time.Since(asked))
		}
		must(t, l.silent())
		for name, server := range map[string]mailServer{"a": a, "b": b} {
			if has := subjectsOf(t, server, "u0001"); len(has) > 0 {
				t.Errorf("%s has got %q", name, has)
			}
		}
		change()
		said, err := l.deliver(sender, m.rcpts, m.message()) // on the same connection
		must(t, err)
		if !said[0].accepted() {
			t.Errorf("the next attempt: %v", said[0])
		}
		mustHold(t, b, "u0001", m)
		mustHold(t, a, "u0001")
	}
	t.Run("cyrus", func(t *testing.T) {
		pair := newCyrusPair(t, "u0001")
		p := startFrontend(t, paced(takesMail(newSite(t, pair.a.backend(), pair.b.backend(), "u0001"))))
		moved(t, pair.a, pair.b, p, func() {
			pair.a.stopSync(t)
			pair.b.setPrimary(t, true)
		})
	})
	t.Run("dovecot", func(t *testing.T) {
		a, b := newDovecot(t), newDovecot(t)
		p := startFrontend(t, paced(takesMail(newSite(t, a.backend(), b.backend(), "u0001"))))
		moved(t, a, b, p, func() {})
	})
}

// begin sends half of a message and returns how many octets that is.
func begin(t *testing.T, l *lmtp, m *parcel) (half int) {
	t.Helper()
	m.body = lines(m.id, 200_000)
	said, err := l.envelope(sender, m.rcpts)
	must(t, err)
	for i, r := range said {
		if !r.accepted() {
			t.Fatalf("RCPT %s: %v", m.rcpts[i], r)
		}
	}
	r, err := l.command(lmtpLimit, "DATA")
	must(t, err)
	if r.code != 354 {
		t.Fatalf("DATA: %v", r)
	}
	half = len(m.message()) / 2
	_, err = io.WriteString(l, m.message()[:half])
	must(t, err)
	return half
}

// TestLMTPSwitchAfterDot: the backend has the whole message and works on it when
// the role is moved. The switch waits, and does not open b while the outcome is
// unknown: the recipient is told 451, a residue remains, and the message, which
// is on a in the end, is not lost.
func TestLMTPSwitchAfterDot(t *testing.T) {
	t.Parallel()
	pair := newCyrusPair(t, "u0001", "u0002")
	p := startFrontend(t, paced(takesMail(newSite(t, pair.a.backend(), pair.b.backend(), "u0001", "u0002"))))
	l := mustDialLMTP(t, p.lmtp())
	m := newParcel("u0001@example.org")
	half := begin(t, l, m)
	thaw := pair.a.freezeDelivery(t, int64(half)/2)
	_, err := io.WriteString(l, m.message()[half:]+".\r\n")
	must(t, err)
	within(t, 5*time.Second, "posthouse has passed the dot on and waits", func() bool {
		return slices.ContainsFunc(p.sessions(t), func(v sessionView) bool {
			return strings.Contains(v.Action, "replies to the message")
		})
	})

	ended := p.startSwitch(t, "b")
	within(t, 5*time.Second, "the role is on hold", func() bool { return p.role(t).Phase == "hold" })
	// A delivery that comes during the hold waits, and goes on after the abort.
	late := newParcel("u0002@example.org")
	other := &loader{address: p.lmtp(), connections: 1}
	other.start(t, []*parcel{late})
	remains(t, time.Second, "the switch waits for the backend", func() bool { return len(ended) == 0 })
	if accepts(pair.b.lmtp()) {
		t.Fatal("b listens: a delivery there would not be seen as one")
	}
	r, err := l.reply(lmtpLimit)
	must(t, err)
	if r.code != 451 {
		t.Errorf("the recipient is told %v, want 451", r)
	}
	must(t, l.silent())
	result := <-ended
	mustFail(t, result, "u0001")
	if result.took > 9*time.Second {
		t.Errorf("the budget is 6s: %v", result)
	}
	if r := p.mustBeOn(t, "a"); len(r.Residues) != 1 || r.Residues[0].User != "u0001" || r.Residues[0].Backend != "a" {
		t.Errorf("residues: %+v", r.Residues)
	}
	other.finish(t, 20*time.Second)
	mustBeAccepted(t, []*parcel{late})
	mustHold(t, pair.a, "u0002", late)

	mustFail(t, p.switchTo(t, "b"), "residue")
	thaw()
	within(t, 10*time.Second, "the message is on a", func() bool { return len(subjectsOf(t, pair.a, "u0001")) == 1 })
	mustHold(t, pair.a, "u0001", m)
	mustOpen(t, p.switchTo(t, "b", "--confirmed-clean"))
	if r := p.mustBeOn(t, "b"); len(r.Residues) > 0 {
		t.Errorf("confirmed clean, yet residues: %+v", r.Residues)
	}
	pair.change(t)
	mustHold(t, pair.b, "u0001", m)
	l = mustDialLMTP(t, p.lmtp())
	again := newParcel("u0001@example.org", "u0002@example.org")
	said, err := l.deliver(sender, again.rcpts, again.message())
	must(t, err)
	again.record(again.rcpts, said)
	mustBeAccepted(t, []*parcel{again})
	mustHold(t, pair.b, "u0001", m, again)
	mustHold(t, pair.b, "u0002", late, again)
}

// freezeDelivery waits until one lmtpd has read more than low octets of the
// message in hand, and stops it.
func (c *cyrus) freezeDelivery(t testing.TB, low int64) (thaw func()) {
	t.Helper()
	pid := 0
	within(t, 10*time.Second, "an lmtpd has the first half of the message", func() bool {
		for _, p := range c.lmtpds() {
			if readBy(p) > low {
				pid = p
			}
		}
		return pid != 0
	})
	must(t, syscall.Kill(pid, syscall.SIGSTOP))
	thaw = func() { syscall.Kill(pid, syscall.SIGCONT) }
	t.Cleanup(thaw)
	return thaw
}
