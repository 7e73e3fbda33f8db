package integration

import (
	"testing"
	"time"
)

// TestLMTPServers shows that the laboratory's LMTP works with no posthouse in
// between: the loader and a real Postfix deliver to the real servers, every
// message arrives octet by octet and once, and a replica does not listen.
func TestLMTPServers(t *testing.T) {
	t.Parallel()
	users := userNames(30)
	load := func(t *testing.T, server mailServer) {
		var parcels []*parcel
		for i := range 60 {
			parcels = append(parcels, newParcel(at("example.org", users[i%10], users[(i+1)%10])...))
		}
		l := &loader{address: server.lmtp(), connections: 4}
		l.start(t, parcels)
		l.finish(t, 30*time.Second)
		mustBeAccepted(t, parcels)
		for rcpt, sent := range byRecipient(parcels) {
			mustHold(t, server, localPart(rcpt), sent...)
		}
		t.Logf("%s; the slowest transaction took %v", tallied(tally(parcels)), time.Duration(l.slowest.Load()))
	}
	t.Run("cyrus", func(t *testing.T) {
		pair := newCyrusPair(t, users...)
		load(t, pair.a)

		mx := startPostfix(t, "inet:"+pair.a.lmtp())
		m := newParcel(at("example.org", users[10:]...)...)
		mx.send(t, m)
		mx.waitEmpty(t, 20*time.Second)
		mx.mustNotBounce(t)
		if n := len(mx.sent()); n != len(m.rcpts) {
			t.Errorf("%d recipients sent, want %d", n, len(m.rcpts))
		}
		for _, user := range users[10:] {
			mustHold(t, pair.a, user, m)
		}

		if accepts(pair.b.lmtp()) {
			t.Error("the replica listens for LMTP")
		}
		pair.change(t)
		if accepts(pair.a.lmtp()) || !accepts(pair.b.lmtp()) {
			t.Error("after the change the old primary listens for LMTP, or the new one does not")
		}
		mustHold(t, pair.b, users[10], m)
	})
	t.Run("dovecot", func(t *testing.T) { load(t, newDovecot(t)) })
}

// TestPostfixBounces shows that a bounce is seen as one: nobody is at home.
func TestPostfixBounces(t *testing.T) {
	t.Parallel()
	pair := newCyrusPair(t, "u0001")
	mx := startPostfix(t, "inet:"+pair.a.lmtp())
	mx.send(t, newParcel("u0001@example.org", "u0002@example.org"))
	mx.waitEmpty(t, 20*time.Second)
	if b := mx.bounced(); len(b) != 1 || b[0].to != "u0002@example.org" || len(mx.sent()) != 1 {
		t.Errorf("bounced %+v, sent %+v", b, mx.sent())
	}

	pair.a.stop(t)
	mx.send(t, newParcel("u0001@example.org"))
	within(t, 10*time.Second, "the message is deferred", func() bool { return len(mx.deferred()) > 0 })
	if q := mx.queue(t); len(q) != 1 || len(q[0].Recipients) != 1 {
		t.Errorf("the queue: %+v", q)
	}
}
