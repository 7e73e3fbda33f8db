package integration

import (
	"testing"
	"time"
)

// TestServers shows that the laboratory itself works: every stock client does
// its work on each real server directly, with no posthouse in between, and what
// happens on Cyrus a reaches its replica b.
func TestServers(t *testing.T) {
	t.Parallel()
	t.Run("cyrus", func(t *testing.T) {
		users := userNames(30)
		pair := newCyrusPair(t, users...)
		t.Run("a", func(t *testing.T) { everyWay(t, pair.a.service(), users, pair.a.deliver) })
		within(t, 10*time.Second, "what was appended on a is on b", func() bool {
			n, err := pair.b.as(t, users[0]).count("INBOX")
			return err == nil && n == 2
		})
	})
	t.Run("dovecot", func(t *testing.T) {
		d := newDovecot(t)
		everyWay(t, d.service(), userNames(30), d.deliver)
	})
}
