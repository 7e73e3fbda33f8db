package routing

import (
	"context"
	"fmt"
	"maps"
	"math/rand/v2"
	"net/netip"
	"strings"
	"time"
)

// Parking bounds the logins that wait for roles at a time, in one frontend. A
// login above a limit gets ErrHeld at once.
type Parking struct {
	Total      int // default 20000
	Role       int // for one role; default 10000
	User       int // for one user; default 50
	Address    int // from one address, see From; default 500
	Unverified int // that nobody has verified yet, see Unverified; default 100
	// EntryRate is how many parked logins enter a role in a second once it is
	// open: each waits for a time of its own. Default 1000.
	EntryRate int
}

func (p *Parking) complete() {
	for _, limit := range []struct {
		of      *int
		missing int
	}{{&p.Total, 20000}, {&p.Role, 10000}, {&p.User, 50}, {&p.Address, 500}, {&p.Unverified, 100}, {&p.EntryRate, 1000}} {
		if *limit.of == 0 {
			*limit.of = limit.missing
		}
	}
}

// slot is what a parked login takes one of.
type slot struct{ kind, name string }

// The kinds of slots.
const (
	slotTotal      = "in all"
	slotRole       = "for role"
	slotUser       = "for user"
	slotAddress    = "from"
	slotUnverified = "that nobody has verified"
)

func (p Parking) limit(kind string) int {
	switch kind {
	case slotRole:
		return p.Role
	case slotUser:
		return p.User
	case slotAddress:
		return p.Address
	case slotUnverified:
		return p.Unverified
	}
	return p.Total
}

// From says where the client is, so that one address cannot take all places of
// those who wait.
func From(address netip.Addr) EnterOption {
	return func(l *login) {
		if address.IsValid() {
			l.client.from = address.String()
		}
	}
}

// Unverified is for logins whose password only the backend can judge
// (`auth: backend`): few of them may wait, as anybody could be one (safety 31).
func Unverified() EnterOption { return func(l *login) { l.client.isUnverified = true } }

// key is that of the limit in the configuration.
func (s slot) key() string {
	switch s.kind {
	case slotRole:
		return "max_parked_per_role"
	case slotUser:
		return "max_parked_per_user"
	case slotAddress:
		return "max_parked_per_ip"
	case slotUnverified:
		return "max_parked_unverified"
	}
	return "max_parked"
}

// client is who logs in, as far as the limits go by it.
type client struct {
	from         string // its address; "" for deliveries
	isUnverified bool
}

// slots are what a login to a role takes while it is parked.
func (c client) slots(role, user string) []slot {
	slots := []slot{{slotTotal, ""}, {slotRole, role}, {slotUser, user}}
	if c.from != "" {
		slots = append(slots, slot{slotAddress, c.from})
	}
	if c.isUnverified {
		slots = append(slots, slot{slotUnverified, ""})
	}
	return slots
}

// crowdedLocked says which limits are in the way if everybody who is inside these
// roles logs in again at once; "" if none is. Deliveries do not count: what is
// told to try again there is no login.
func (t *Table) crowdedLocked(roles []string) string {
	taken := maps.Clone(t.slots)
	for _, role := range roles {
		for s := range t.gateLocked(role).stays {
			if s.client.from == "" {
				continue
			}
			for _, slot := range s.client.slots(role, s.User) {
				taken[slot]++
			}
		}
	}
	worst := make(map[string]slot) // by kind
	for s, n := range taken {
		if w, is := worst[s.kind]; n > t.opt.Parking.limit(s.kind) && (!is || n > taken[w] || n == taken[w] && s.name < w.name) {
			worst[s.kind] = s
		}
	}
	var texts []string
	for _, kind := range sortedKeys(worst) {
		s := worst[kind]
		texts = append(texts, fmt.Sprintf("%d logins %s and places for %d (limits.%s)", taken[s], strings.TrimSpace(kind+" "+s.name), t.opt.Parking.limit(kind), s.key()))
	}
	return strings.Join(texts, ", ")
}

// parkLocked takes the slots of a login that is to wait at g, or says which there
// are none of.
func (t *Table) parkLocked(l *login, g *gate, user string) error {
	slots := l.client.slots(g.role, user)
	for _, s := range slots {
		if n := t.slots[s]; n >= t.opt.Parking.limit(s.kind) {
			return fmt.Errorf("%w: role %s: %d logins are parked %s %s", ErrHeld, g.role, n, s.kind, s.name)
		}
	}
	for _, s := range slots {
		t.slots[s]++
	}
	l.gate, l.slots = g, slots
	g.parked[l] = struct{}{}
	return nil
}

func (t *Table) unparkLocked(l *login) {
	if l.gate == nil {
		return
	}
	delete(l.gate.parked, l)
	for _, s := range l.slots {
		if t.slots[s]--; t.slots[s] == 0 {
			delete(t.slots, s)
		}
	}
	l.gate, l.slots = nil, nil
}

// takeTurn spreads those whom one event has woken, so that the new active is not
// run down by all of them at once. It fails with ctx, or when the Table closes.
func (t *Table) takeTurn(ctx context.Context, l *login) error {
	t.mu.Lock()
	woken := 0
	if l.gate != nil {
		woken = l.gate.woken
	}
	t.mu.Unlock()
	spread := time.Duration(woken) * time.Second / time.Duration(t.opt.Parking.EntryRate)
	if spread <= 0 {
		return nil
	}
	turn := time.NewTimer(rand.N(spread))
	defer turn.Stop()
	select {
	case <-turn.C:
		return nil
	case <-t.closing:
		return ErrClosed
	case <-ctx.Done():
		return ctx.Err()
	}
}
