package integration

import (
	"fmt"
	"maps"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"
)

// parcel is one message on its way to some recipients, and what was said about
// it to each.
type parcel struct {
	id    string
	rcpts []string
	body  string // what follows the header; lines end with CRLF
	// mayBeTwice are the users for whom posthouse has said that it does not know
	// what became of an attempt that it had to answer with 451.
	mayBeTwice []string

	mu   sync.Mutex
	said map[string][]reply // by recipient: the last reply of each attempt
}

var parcelSerial atomic.Int64

// newParcel has a Message-ID and a subject of its own, its id.
func newParcel(rcpts ...string) *parcel {
	id := fmt.Sprintf("parcel-%06d", parcelSerial.Add(1))
	return &parcel{id: id, rcpts: rcpts, body: "This is " + id + ".\r\n.\r\n..\r\nThe end.\r\n", said: map[string][]reply{}}
}

// ownLine is the first line of the message, by which it is told from what is
// put before it on its way.
func (p *parcel) ownLine() string { return "X-Parcel: " + p.id }

// message is complete, so that nobody on its way adds what is missing.
func (p *parcel) message() string {
	return p.ownLine() + "\r\n" +
		"Subject: " + p.id + "\r\n" +
		"Message-ID: <" + p.id + "@client.test>\r\n" +
		"Date: Mon, 23 Nov 2026 12:00:00 +0000\r\n" +
		"From: sender@client.test\r\n" +
		"To: undisclosed-recipients:;\r\n" +
		"\r\n" + p.body
}

const sender = "sender@client.test"

// last returns the newest reply about a recipient.
func (p *parcel) last(rcpt string) reply {
	p.mu.Lock()
	defer p.mu.Unlock()
	said := p.said[rcpt]
	if len(said) == 0 {
		return reply{}
	}
	return said[len(said)-1]
}

// open lists the recipients who have neither been accepted nor refused for
// good.
func (p *parcel) open() []string {
	return slices.DeleteFunc(slices.Clone(p.rcpts), func(rcpt string) bool { return !p.last(rcpt).deferred() })
}

func (p *parcel) record(rcpts []string, said []reply) {
	p.mu.Lock()
	defer p.mu.Unlock()
	for i, rcpt := range rcpts {
		p.said[rcpt] = append(p.said[rcpt], said[i])
	}
}

// loader delivers parcels as an MTA does: over several connections, and again
// to those recipients for whom it was told 4xx or nothing.
type loader struct {
	address     string
	connections int
	pause       time.Duration // before the next attempt; zero is 50ms

	queue   chan *parcel
	quit    chan struct{}
	once    sync.Once
	workers sync.WaitGroup
	left    atomic.Int64 // parcels with open recipients
	lost    atomic.Int64 // transactions that ended without all replies
	slowest atomic.Int64 // transaction, in nanoseconds
}

// start begins to deliver; the end of the test ends it, too.
func (l *loader) start(t testing.TB, parcels []*parcel) {
	if l.pause == 0 {
		l.pause = 50 * time.Millisecond
	}
	l.queue, l.quit = make(chan *parcel, len(parcels)), make(chan struct{})
	for _, p := range parcels {
		l.queue <- p
	}
	l.left.Store(int64(len(parcels)))
	for range l.connections {
		l.workers.Go(l.work)
	}
	t.Cleanup(l.stop)
}

// stop ends the workers, after the transaction that each is in.
func (l *loader) stop() {
	l.once.Do(func() { close(l.quit) })
	l.workers.Wait()
}

func (l *loader) work() {
	var c *lmtp
	defer func() {
		if c != nil {
			c.command(time.Second, "QUIT")
			c.Close()
		}
	}()
	for {
		select {
		case <-l.quit:
			return
		case p := <-l.queue:
			c = l.attempt(c, p)
			if len(p.open()) == 0 {
				l.left.Add(-1)
				continue
			}
			time.AfterFunc(l.pause, func() { l.queue <- p }) // there is room for each
		}
	}
}

// attempt runs one transaction over c, or over a new connection, and returns
// the connection if it is of further use.
func (l *loader) attempt(c *lmtp, p *parcel) *lmtp {
	rcpts := p.open()
	if c == nil {
		var err error
		if c, err = dialLMTP(l.address); err != nil {
			l.lost.Add(1)
			p.record(rcpts, make([]reply, len(rcpts)))
			return nil
		}
	}
	began := time.Now()
	said, err := c.deliver(sender, rcpts, p.message())
	took := int64(time.Since(began))
	for known := l.slowest.Load(); took > known && !l.slowest.CompareAndSwap(known, took); known = l.slowest.Load() {
	}
	p.record(rcpts, said)
	if err != nil {
		l.lost.Add(1)
		c.Close()
		return nil
	}
	return c
}

// finish waits until no recipient is open.
func (l *loader) finish(t testing.TB, limit time.Duration) {
	t.Helper()
	within(t, limit, "every message has its final reply", func() bool { return l.left.Load() == 0 })
	l.stop()
}

// tally counts, over all parcels and attempts, how often something was said;
// ids and user names are left out, so that alike is alike.
func tally(parcels []*parcel) map[string]int {
	counts := map[string]int{}
	for _, p := range parcels {
		p.mu.Lock()
		for _, said := range p.said {
			for _, r := range said {
				words := strings.Fields(r.text)
				counts[fmt.Sprint(r.code, " ", strings.Join(words[:min(len(words), 1)], " "))]++
			}
		}
		p.mu.Unlock()
	}
	return counts
}

// mustBeAccepted asserts that every recipient of every parcel got a 2xx in the
// end.
func mustBeAccepted(t testing.TB, parcels []*parcel) {
	t.Helper()
	for _, p := range parcels {
		for _, rcpt := range p.rcpts {
			if r := p.last(rcpt); !r.accepted() {
				t.Errorf("%s to %s: %v", p.id, rcpt, r)
			}
		}
	}
}

// byRecipient is who must have what.
func byRecipient(parcels []*parcel) map[string][]*parcel {
	all := map[string][]*parcel{}
	for _, p := range parcels {
		for _, rcpt := range p.rcpts {
			all[rcpt] = append(all[rcpt], p)
		}
	}
	return all
}

// localPart is the user of a recipient.
func localPart(rcpt string) string {
	local, _, _ := strings.Cut(rcpt, "@")
	return local
}

// at makes recipients of users.
func at(domain string, users ...string) []string {
	rcpts := make([]string, len(users))
	for i, user := range users {
		rcpts[i] = user + "@" + domain
	}
	return rcpts
}

// tallied writes a tally in a fixed order.
func tallied(counts map[string]int) string {
	var b strings.Builder
	for _, what := range slices.Sorted(maps.Keys(counts)) {
		fmt.Fprintf(&b, "%d × %q; ", counts[what], what)
	}
	return strings.TrimSuffix(b.String(), "; ")
}
