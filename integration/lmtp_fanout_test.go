package integration

import (
	"slices"
	"testing"
	"time"
)

// estate is a site with three roles on three backends: ma01 and ma02 each on a
// Cyrus with a replica, ma03 on a Dovecot; ten users in each.
type estate struct {
	*site
	first, second *cyrusPair
	third         *dovecot
	users         []string // in order of their roles
	sent          []*parcel
}

func newEstate(t testing.TB) *estate {
	t.Helper()
	users := userNames(30)
	e := &estate{first: newCyrusPair(t, users[:10]...), second: newCyrusPair(t, users[10:20]...), third: newDovecot(t), users: users}
	e.site = newSite(t, e.first.a.backend(), e.first.b.backend(), users[:10]...)
	e.addRole("ma02", "c", e.second.a.backend(), users[10:20]...)
	e.addRole("ma03", "e", e.third.backend(), users[20:]...)
	return e
}

// server is where a user's mail is.
func (e *estate) server(user string) mailServer {
	switch i := slices.Index(e.users, user); {
	case i < 10:
		return e.first.a
	case i < 20:
		return e.second.a
	default:
		return e.third
	}
}

// TestPostfixFanOut: a real Postfix hands over one message for thirty
// recipients on three backends, in one transaction. It is in thirty mailboxes,
// octet by octet. Then the first backend stands still in the middle of a
// message: who is on the others has it in time, who is on the first has it
// later; nothing bounces, nothing is lost, and nothing comes twice unless
// posthouse has said, by a residue, that it does not know.
func TestPostfixFanOut(t *testing.T) {
	e := newEstate(t)
	takesMail(e.site, "reply_timeout: 15s")
	e.limits = "write_timeout: 15s" // longer than the others may have to wait
	p := startFrontend(t, e.site)
	mx := startPostfix(t, "inet:"+p.lmtp())

	m := newParcel(at("example.org", e.users...)...)
	e.sent = append(e.sent, m)
	mx.send(t, m)
	mx.waitEmpty(t, 20*time.Second)
	mx.mustNotBounce(t)
	if n, again := len(mx.sent()), mx.deferred(); n != 30 || len(again) > 0 {
		t.Errorf("%d recipients were sent at once, want 30; deferred: %+v", n, again)
	}
	for _, user := range e.users {
		e.mustHold(t, user)
	}
	// More than the kernel keeps between posthouse and a backend: the dot
	// cannot be there.
	t.Run("60 MB", func(t *testing.T) {
		if m := e.stall(t, p, mx, 60<<20, []string{"u0001", "u0011", "u0021"}); len(m.mayBeTwice) > 0 {
			t.Error("a residue, although the backend cannot have seen the dot")
		}
	})
	t.Run("5 MB", func(t *testing.T) { e.stall(t, p, mx, 5<<20, e.users) })
	mx.mustNotBounce(t)
}

// stall delivers messages of size octets until the first backend is caught in
// the middle of one, which it returns.
func (e *estate) stall(t *testing.T, p *posthouse, mx *postfix, size int, users []string) *parcel {
	t.Helper()
	for range 5 {
		m := newParcel(at("example.org", users...)...)
		m.body = lines(m.id, size)
		e.sent = append(e.sent, m)
		if e.stallAndDeliver(t, p, mx, m) {
			return m
		}
	}
	t.Fatal("the backend was never caught in the middle of the message")
	return nil
}

// mustHold asserts that a user has all that was sent to it, once.
func (e *estate) mustHold(t *testing.T, user string) {
	t.Helper()
	mustHold(t, e.server(user), user, e.sentTo(user)...)
}

func (e *estate) sentTo(user string) []*parcel { return byRecipient(e.sent)[user+"@example.org"] }

// onFirst says whether a recipient is on the first backend.
func (e *estate) onFirst(rcpt string) bool { return slices.Contains(e.users[:10], localPart(rcpt)) }

// stallAndDeliver stops the first backend in the middle of m and asserts what
// must come of it; false says that the message was already through.
func (e *estate) stallAndDeliver(t *testing.T, p *posthouse, mx *postfix, m *parcel) bool {
	t.Helper()
	before := len(mx.sent())
	handed := make(chan struct{})
	go func() { defer close(handed); mx.send(t, m) }()
	thaw, read := e.first.a.freezeMidway(t, 200_000, 20*time.Second)
	<-handed
	if read == 0 || read > int64(len(m.message()))*3/4 {
		t.Logf("stopped after %d octets: too late", read)
		thaw()
		mx.waitEmpty(t, 60*time.Second)
		return false
	}
	began := time.Now()
	stalled, healthy := 0, map[string]bool{}
	for _, rcpt := range m.rcpts {
		if e.onFirst(rcpt) {
			stalled++
		} else {
			healthy[localPart(rcpt)] = true
		}
	}
	within(t, 12*time.Second, "who is on the other backends has the message", func() bool {
		return slices.Contains(subjectsOf(t, e.second.a, "u0011"), m.id) && slices.Contains(subjectsOf(t, e.third, "u0021"), m.id)
	})
	inMailboxes := time.Since(began)
	within(t, 60*time.Second, "Postfix knows about all", func() bool {
		q := mx.queue(t)
		return len(mx.sent()) == before+len(healthy) && len(q) == 1 && len(q[0].Recipients) == stalled && q[0].Recipients[0].Reason != ""
	})
	t.Logf("the first stood still after %d octets; the others had the message after %v, Postfix their replies after %v",
		read, inMailboxes, time.Since(began))
	for user := range healthy { // these have it once, whatever becomes of the others
		e.mustHold(t, user)
	}
	for _, h := range mx.deferred() {
		if !e.onFirst(h.to) {
			t.Errorf("deferred, and not on the first backend: %+v", h)
		}
	}

	for _, r := range p.role(t).Residues { // the end of the message was in the kernel's buffers
		m.mayBeTwice = append(m.mayBeTwice, r.User)
		t.Logf("the outcome is unknown, and a residue says so: %+v", r)
	}
	thaw()
	mx.waitEmpty(t, 60*time.Second)
	for _, rcpt := range m.rcpts {
		e.mustHold(t, localPart(rcpt))
	}
	return true
}
