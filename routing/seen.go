package routing

import (
	"maps"
	"slices"
)

// mostSeen bounds a Seen, of a row and of a gate: what is above it is everybody.
const mostSeen = 5000

// merge returns the union of two sets.
func (s Seen) merge(other Seen) Seen {
	if s.All || other.All {
		return Seen{All: true}
	}
	users := slices.Concat(s.Users, other.Users)
	slices.Sort(users)
	if users = slices.Compact(users); len(users) > mostSeen {
		return Seen{All: true}
	}
	return Seen{Users: users}
}

// handed is what a frontend hands to the store with its ack or its goodbye: what
// may still run of the stays that have ended, and whose they were.
type handed struct {
	residues []Residue
	seen     Seen
}

func (h handed) isEmpty() bool { return len(h.residues) == 0 && !h.seen.All && len(h.seen.Users) == 0 }

// take puts what a frontend has handed in into the row.
func (row *Row) take(h handed) {
	row.Residues = mergeResidues(row.Residues, h.residues)
	row.Seen = row.Seen.merge(h.seen)
}

// take puts what a frontend has handed in into the rows; a role that the store
// does not have has none.
func (s *State) take(hands map[string]handed) {
	for role, hand := range hands {
		if row, ok := s.Roles[role]; ok {
			row.take(hand)
			s.Roles[role] = row
		}
	}
}

// see notes that a user had a stay.
func (g *gate) see(user string) {
	if g.seenAll {
		return
	}
	g.seen[user] = struct{}{}
	if len(g.seen) > mostSeen {
		g.seenAll = true
		clear(g.seen)
	}
}

// handOver takes out of the gate what is to be handed in. arrived or putBack must
// follow: no ack goes out before.
func (g *gate) handOver() handed {
	h := handed{residues: g.list(), seen: Seen{All: g.seenAll, Users: slices.Sorted(maps.Keys(g.seen))}}
	clear(g.residues)
	clear(g.seen)
	g.seenAll = false
	g.underWay++
	return h
}

// arrived: what was handed over is in the store.
func (g *gate) arrived() { g.underWay-- }

// putBack: it did not get there, and waits for the next time.
func (g *gate) putBack(h handed) {
	g.underWay--
	for _, r := range h.residues {
		g.add(r)
	}
	g.seenAll = g.seenAll || h.seen.All
	for _, user := range h.seen.Users {
		g.see(user)
	}
}

// settle ends what handOver began, for several roles: err is the store's answer.
func (t *Table) settle(hands map[string]handed, err error) {
	t.mu.Lock()
	for role, hand := range hands {
		if g := t.gateLocked(role); err == nil {
			g.arrived()
		} else {
			g.putBack(hand)
		}
	}
	t.mu.Unlock()
}
