package routing

import (
	"cmp"
	"fmt"
	"maps"
	"slices"
)

// presence is what a frontend knows of itself in one role when it decides.
type presence struct {
	// registered: the snapshot that the row is from has this frontend.
	registered bool
	floor      uint64 // its floor in that snapshot
	below      int    // its stays in an epoch below the row's
	elsewhere  int    // its stays on another backend than the row's active
	onDisk     bool   // a start from disk would see the held row
	underWay   int    // how much that it has handed over has not arrived in the store yet
}

// A gateGuard is one condition of a decision of the gate. in returns "" if it
// holds, else what is in the way.
type gateGuard struct {
	name string
	in   func(row Row, p presence) string
}

// admitGuards must all hold for a login to enter; while one does not, it parks.
var admitGuards = []gateGuard{
	// Who is not registered gives no ack, and nobody waits for it (9, 11).
	{"the snapshot knows this frontend", func(_ Row, p presence) string {
		if p.registered {
			return ""
		}
		return "this frontend is not registered in the role table yet"
	}},
	{"the role is open", func(row Row, _ presence) string {
		if row.Phase == PhaseOpen {
			return ""
		}
		if row.Switch == nil {
			return "the role is on hold"
		}
		return fmt.Sprintf("switch %d to %s is in phase %s", row.Switch.Number, row.Switch.To, row.Phase)
	}},
	// Safety 5.
	{"no stay of this frontend is on another backend", func(row Row, p presence) string {
		if p.elsewhere == 0 {
			return ""
		}
		return fmt.Sprintf("%d sessions of this frontend still drain from another backend", p.elsewhere)
	}},
}

// ackGuards must all hold before a frontend raises its floor to the row's
// epoch.
var ackGuards = []gateGuard{
	{"nobody is inside below the epoch", func(_ Row, p presence) string {
		if p.below == 0 {
			return ""
		}
		return fmt.Sprintf("%d sessions still drain", p.below)
	}},
	// Safety 6.
	{"the held row is on disk", func(_ Row, p presence) string {
		if p.onDisk {
			return ""
		}
		return "the held row is not on this frontend's disk yet"
	}},
	// Safety 1, 23: what may still run, and who was seen, must be in the row first.
	{"all that was handed over has arrived", func(_ Row, p presence) string {
		if p.underWay == 0 {
			return ""
		}
		return "an earlier report of this frontend is on its way to the store"
	}},
}

// admit decides on a login that goes by row: "" if it enters, else why it
// parks. Whether the row is in doubt is judged before (isUnknown).
func (r rules) admit(row Row, p presence) (in string) {
	return r.judge(admitGuards, row, p)
}

// mayAck decides whether this frontend can promise now that nobody is inside
// below row's epoch: "" if so. wantsAck is judged before.
func (r rules) mayAck(row Row, p presence) (in string) {
	return r.judge(ackGuards, row, p)
}

func (r rules) judge(guards []gateGuard, row Row, p presence) string {
	for _, g := range guards {
		if g.name == r.without {
			continue
		}
		if in := g.in(row, p); in != "" {
			return in
		}
	}
	return ""
}

// wantsAck says whether the row waits for this frontend.
func wantsAck(row Row, p presence) bool {
	return p.registered && row.Phase != PhaseOpen && row.Doubt == nil && p.floor < row.Epoch
}

// isUnknown says whether a frontend cannot know who serves the role: its row is
// in doubt, and it has no snapshot of the highest epoch known.
func isUnknown(row Row) bool { return row.Doubt != nil && row.Active == "" }

// revokes says whether a stay must end now. A stay on the active survives an
// aborted switch that this frontend did not see.
func revokes(row Row, backend string, epoch uint64) bool {
	return backend != row.Active || row.Phase != PhaseOpen && epoch < row.Epoch
}

// isHeldOnDisk says whether a start from disk parks where row parks.
func isHeldOnDisk(row, disk Row) bool {
	return disk.Epoch > row.Epoch || disk.Epoch == row.Epoch && disk.Phase != PhaseOpen
}

// gate is what one frontend keeps of one role. Table.mu guards it.
type gate struct {
	role   string
	stays  map[*Stay]struct{}
	places map[place]int // how many stays are where: a handful of entries
	parked map[*login]struct{}
	// residues of ended stays, not yet handed to the store.
	residues map[residueKey]Residue
	// seen are the users who had stays, not yet handed in; any if seenAll.
	seen    map[string]struct{}
	seenAll bool
	// underWay counts the hands that were taken out and have neither arrived in
	// the store nor come back.
	underWay int
	// wake is closed, and replaced, when a parked login should look again.
	wake  chan struct{}
	woken int // how many logins the last wake has woken
}

type place struct {
	backend string
	epoch   uint64
}

type residueKey struct{ backend, user string }

func newGate(role string) *gate {
	return &gate{role: role, stays: make(map[*Stay]struct{}), places: make(map[place]int),
		parked: make(map[*login]struct{}), residues: make(map[residueKey]Residue), seen: make(map[string]struct{}), wake: make(chan struct{})}
}

// presence counts the gate's stays against row.
func (g *gate) presence(row Row, registered bool, floor uint64, disk Row) presence {
	p := presence{registered: registered, floor: floor, onDisk: isHeldOnDisk(row, disk), underWay: g.underWay}
	for at, n := range g.places {
		p.count(row, at, n)
	}
	return p
}

// count adds n stays in one place.
func (p *presence) count(row Row, at place, n int) {
	if at.epoch < row.Epoch {
		p.below += n
	}
	if at.backend != row.Active {
		p.elsewhere += n
	}
}

// floor is the epoch below which nobody is inside; ok is false if nobody is.
func (g *gate) floor() (floor uint64, ok bool) {
	for at := range g.places {
		if !ok || at.epoch < floor {
			floor, ok = at.epoch, true
		}
	}
	return floor, ok
}

// add keeps the later of two equal residues (compare mergeResidues).
func (g *gate) add(r Residue) {
	k := residueKey{r.Backend, r.User}
	if old, ok := g.residues[k]; !ok || r.Since.After(old.Since) {
		g.residues[k] = r
	}
}

func (g *gate) list() []Residue {
	list := slices.Collect(maps.Values(g.residues))
	slices.SortFunc(list, func(a, b Residue) int {
		return cmp.Or(cmp.Compare(a.Backend, b.Backend), cmp.Compare(a.User, b.User))
	})
	return list
}

func (g *gate) wakeAll() {
	g.woken = len(g.parked)
	close(g.wake)
	g.wake = make(chan struct{})
}
