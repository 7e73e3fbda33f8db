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

// handOver takes out of the gate what is to be handed in; putBack puts it back
// where it did not arrive.
func (g *gate) handOver() handed {
	h := handed{residues: g.list(), seen: Seen{All: g.seenAll, Users: slices.Sorted(maps.Keys(g.seen))}}
	clear(g.residues)
	clear(g.seen)
	g.seenAll = false
	return h
}

func (g *gate) putBack(h handed) {
	for _, r := range h.residues {
		g.add(r)
	}
	g.seenAll = g.seenAll || h.seen.All
	for _, user := range h.seen.Users {
		g.see(user)
	}
}
