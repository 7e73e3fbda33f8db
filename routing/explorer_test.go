package routing

import (
	"encoding/json"
	"fmt"
	"maps"
	"slices"
	"strings"
	"testing"
	"time"
)

// The explorer searches every state that frontends, drivers, operators, crashes
// and late events can reach, and looks for one user who can have effects on two
// backends of a role (I1). It calls the real rules (switch.go, roster.go) and
// the real decisions of the gate (gate.go). What it leaves out is time and what
// cannot matter to I1. Drivers have no state of their own, every step of theirs
// is tried everywhere: that is their crash and restart at every point.
//
// States of the store are interned: a rule runs once per state and arguments.

// scenario says what may happen.
type scenario struct {
	name      string
	frontends int // processes; at most 2
	holds     int // switches begun
	starts    int // of a frontend, the first two included
	crashes   int
	unproven  bool // sessions may end without proof
	disk      bool // the first process starts from its disk too, without the store
	late      bool // the first process may get a watch event after newer ones were read
	fences    int  // registrations that get lost while the process runs
	noticed   bool // and no role opens before the process has registered anew
	hooks     bool // all hooks are there
}

// mutation takes one guard or one effect away.
type mutation struct {
	name string
	rule string // a guard of rules: not applied
	on   string // the scenario in which it must be missed
}

var (
	effectLeave   = "leave: an end without proof leaves a residue"
	effectAck     = "ack: residues go with it"
	effectGoodbye = "goodbye: residues go with it"
	effectBury    = "bury: leaves an unknown residue"
	effectEpoch   = "hold: the epoch grows"
	effectInherit = "abort: residues outlive the switch"
	effectOlder   = "install: a snapshot does not go back"
	effectFloors  = "register: stays that still drain keep the floor down"
	effectOffline = "start from disk: inherits an unknown residue"
	effectProven  = "residues are cleared by proof only"
)

const (
	noBackend = iota
	backendA
	backendB
)

var backendName = []string{"", "a", "b"}

// seen is what a frontend goes by: the part of a State that its gate reads.
type seen struct {
	open       bool
	active     uint8
	epoch      uint8
	registered bool
	floor      uint8
}

func (v seen) row() Row {
	r := Row{Phase: PhaseHold, Active: backendName[v.active], Epoch: uint64(v.epoch)}
	if v.open {
		r.Phase = PhaseOpen
	}
	return r
}

// proc is one frontend process.
type proc struct {
	id       uint8    // nonce of its ID; 0 while it does not run
	last     uint8    // the ID it had last
	enrolled bool     // it has registered once
	view     seen     // its snapshot
	mail     seen     // a watch event that is still on its way
	disk     seen     // what a start from disk would see
	stays    [3]uint8 // by backend: the epoch of a stay there, 0 if none
	residues uint8    // bits by backend: not yet handed over
}

// node is one state of the world.
type node struct {
	store  uint16
	procs  [2]proc
	ghosts uint8 // bits by backend: work that runs on though its stay has ended
	// What may still happen.
	holds, starts, crashes, fences uint8
}

// step says how a node came about: cheap to make, printed for a trace only.
type step struct {
	what  string // with {f} for the process, {b} the backend, {e} the epoch
	proc  uint8
	on    int
	epoch uint8
}

func (s step) String() string {
	text := strings.NewReplacer("{f}", fmt.Sprintf("f%d", s.proc), "{b}", backendName[s.on], "{e}", fmt.Sprint(s.epoch))
	return text.Replace(s.what)
}

// storeOp is a rule with its arguments.
type storeOp struct {
	kind     string
	proc, id uint8
	epoch    uint8
	residues uint8
	backend  uint8
}

type storeStep struct {
	from uint16
	op   storeOp
}

type explorer struct {
	scenario
	r      rules
	effect string // the effect that is taken away

	states   []*State
	ids      map[string]uint16
	steps    map[storeStep]int // to; -1: refused
	nodes    map[node]int32
	order    []node
	parents  []int32
	how      []step
	current  int32
	violated int32
}

var explorerTime = time.Date(2026, 1, 1, 0, 0, 0, 0, time.UTC)

func explore(sc scenario, m mutation) *explorer {
	e := &explorer{scenario: sc, r: rules{without: m.rule}, ids: make(map[string]uint16), steps: make(map[storeStep]int),
		nodes: make(map[node]int32), violated: -1}
	if m.rule == "" {
		e.effect = m.name
	}
	s := emptyState()
	s.Roles["r"] = Row{Members: []string{"a", "b"}, Active: "a", Epoch: 1, Phase: PhaseOpen}
	n := node{holds: uint8(sc.holds), starts: uint8(sc.starts), crashes: uint8(sc.crashes), fences: uint8(sc.fences)}
	n.store = e.intern(s)
	e.current = -1
	e.visit(n, step{})
	for i := 0; i < len(e.order) && e.violated < 0; i++ {
		e.current = int32(i)
		e.expand(e.order[i])
	}
	return e
}

// visit adds a node, and stops the search if it breaks I1.
func (e *explorer) visit(n node, how step) {
	if _, known := e.nodes[n]; known {
		return
	}
	at := int32(len(e.order))
	e.nodes[n] = at
	e.order = append(e.order, n)
	e.parents = append(e.parents, e.current)
	e.how = append(e.how, how)
	if e.violated < 0 && n.effects(backendA) && n.effects(backendB) {
		e.violated = at
	}
}

// effects says whether anything for the user can still happen on a backend.
func (n node) effects(backend int) bool {
	return n.ghosts&(1<<backend) != 0 || n.procs[0].stays[backend] != 0 || n.procs[1].stays[backend] != 0
}

// trace tells how the violation came about.
func (e *explorer) trace() string {
	var steps []string
	for at := e.violated; at > 0; at = e.parents[at] {
		steps = append(steps, e.how[at].String())
	}
	slices.Reverse(steps)
	return strings.Join(steps, "; ")
}

// intern numbers the states of the store; what cannot matter is left out.
func (e *explorer) intern(s *State) uint16 {
	s.History, s.Switches, s.Revision = nil, 0, 0
	row := s.Roles["r"]
	if row.Switch != nil {
		row.Switch = &Switch{To: row.Switch.To, Begun: row.Switch.Begun}
	}
	slices.SortFunc(row.Residues, func(a, b Residue) int { return strings.Compare(a.Backend, b.Backend) })
	row.Residues = slices.CompactFunc(row.Residues, func(a, b Residue) bool { return a.Backend == b.Backend })
	for i, r := range row.Residues {
		row.Residues[i] = Residue{Backend: r.Backend}
	}
	if len(row.Residues) == 0 {
		row.Residues = nil
	}
	s.Roles["r"] = row
	key, err := json.Marshal(s)
	if err != nil {
		panic(err)
	}
	if id, known := e.ids[string(key)]; known {
		return id
	}
	id := uint16(len(e.states))
	e.ids[string(key)] = id
	e.states = append(e.states, s)
	return id
}

func frontendID(proc, nonce uint8) string { return fmt.Sprintf("f%d.%d", proc, nonce) }

func (e *explorer) has() []Hook {
	if e.hooks {
		return AllHooks
	}
	return nil
}

// store applies a rule; ok is false if it refuses.
func (e *explorer) store(from uint16, op storeOp) (to uint16, ok bool) {
	step := storeStep{from, op}
	known, done := e.steps[step]
	if !done {
		known = -1
		s := e.states[from].Clone()
		if e.apply(s, op) == nil {
			known = int(e.intern(s))
		}
		e.steps[step] = known
	}
	return uint16(max(known, 0)), known >= 0
}

func residuesOf(bits uint8) []Residue {
	var list []Residue
	for _, b := range []int{backendA, backendB} {
		if bits&(1<<b) != 0 {
			list = append(list, Residue{Backend: backendName[b], User: "u"})
		}
	}
	return list
}

func (e *explorer) apply(s *State, op storeOp) error {
	id, now := frontendID(op.proc, op.id), explorerTime
	row := s.Roles["r"]
	before := slices.Clone(row.Residues)
	restore := func(effect string) {
		if e.effect == effect {
			row := s.Roles["r"]
			row.Residues = before
			s.Roles["r"] = row
		}
	}
	switch op.kind {
	case "hold", "hold, confirmed clean":
		if op.kind != "hold" {
			s.clean([]string{"r"})
		}
		err := e.r.hold(s, []string{"r"}, order{to: backendName[3-backendNumber(row.Active)], hooks: e.has()}, now)
		if row := s.Roles["r"]; err == nil && e.effect == effectEpoch {
			row.Epoch--
			s.Roles["r"] = row
		}
		return err
	case "advance":
		return e.r.advance(s, "r", row.Phase, now)
	case "abort":
		err := e.r.abort(s, "r", "", now)
		if row := s.Roles["r"]; err == nil && e.effect == effectInherit {
			row.Residues = nil
			s.Roles["r"] = row
		}
		return err
	case "undone":
		return e.r.undone(s, "r", row.Switch.Begun[len(row.Switch.Begun)-1])
	case "reopen":
		return e.r.reopen(s, "r", now)
	case "age":
		return e.r.ageOut(s, func(_ string, r Residue) bool { return r.Backend == backendName[op.backend] })
	case "register":
		f := Frontend{Backends: []string{"a", "b"}}
		if op.epoch != 0 {
			f.Floors = map[string]uint64{"r": uint64(op.epoch)}
		}
		return e.r.register(s, id, f)
	case "ack":
		defer restore(effectAck)
		return e.r.ack(s, id, "r", uint64(op.epoch), handed{residues: residuesOf(op.residues)})
	case "goodbye":
		defer restore(effectGoodbye)
		return e.r.goodbye(s, id, map[string]handed{"r": {residues: residuesOf(op.residues)}})
	case "bury":
		defer restore(effectBury)
		return e.r.bury(s, id, now)
	case "fence":
		delete(s.Frontends, id)
		return nil
	}
	panic(op.kind)
}

func backendNumber(name string) uint8 { return uint8(slices.Index(backendName, name)) }

// look is what a frontend sees of a state of the store.
func (e *explorer) look(store uint16, proc, id uint8) seen {
	s := e.states[store]
	row := s.Roles["r"]
	v := seen{open: row.Phase == PhaseOpen, active: backendNumber(row.Active), epoch: uint8(row.Epoch)}
	if f, ok := s.Frontends[frontendID(proc, id)]; ok {
		v.registered, v.floor = true, uint8(f.Floors["r"])
	}
	return v
}

var scenarios = []scenario{
	{name: "two switches, residues", frontends: 2, holds: 2, starts: 2, unproven: true},
	{name: "crashes and late joiners", frontends: 2, holds: 2, starts: 3, crashes: 1},
	{name: "late events", frontends: 2, holds: 2, starts: 2, late: true},
	{name: "starts from disk", frontends: 2, holds: 2, starts: 2, crashes: 1, disk: true},
	{name: "registration lost", frontends: 1, holds: 2, starts: 1, fences: 1},
	{name: "registration lost, and noticed", frontends: 2, holds: 1, starts: 2, fences: 1, noticed: true},
	{name: "everything, one switch", frontends: 2, holds: 1, starts: 2, crashes: 1, unproven: true, disk: true, late: true},
	{name: "hooks", frontends: 2, holds: 1, starts: 3, crashes: 1, unproven: true, hooks: true},
}

// mutations lists every guard that I1 rests on, and where it is missed.
func mutations() []mutation {
	list := []mutation{
		{effectLeave, "", "two switches, residues"},
		{effectAck, "", "two switches, residues"},
		{effectGoodbye, "", "two switches, residues"},
		{effectBury, "", "crashes and late joiners"},
		{effectEpoch, "", "two switches, residues"},
		{effectInherit, "", "two switches, residues"},
		{effectOlder, "", "late events"},
		{effectFloors, "", "registration lost, and noticed"},
		{effectOffline, "", "starts from disk"},
		{effectProven, "", "two switches, residues"},
	}
	on := map[string]string{
		openGuards[0].name:  "two switches, residues",
		openGuards[1].name:  "two switches, residues",
		admitGuards[0].name: "crashes and late joiners",
		admitGuards[1].name: "two switches, residues",
		admitGuards[2].name: "registration lost",
		ackGuards[0].name:   "two switches, residues",
		ackGuards[1].name:   "starts from disk",
	}
	for _, name := range slices.Sorted(maps.Keys(on)) {
		list = append(list, mutation{name, name, on[name]})
	}
	return list
}

func TestExplorer(t *testing.T) {
	for _, sc := range scenarios {
		t.Run(sc.name, func(t *testing.T) {
			t.Parallel()
			begin := time.Now()
			e := explore(sc, mutation{})
			t.Logf("%d states of the world, %d of the store, %v", len(e.order), len(e.states), time.Since(begin).Round(time.Millisecond))
			if e.violated >= 0 {
				t.Errorf("a user can have effects on two backends: %s", e.trace())
			}
		})
	}
}

// Each guard is needed: without it the search finds a violation.
func TestExplorerMissesEachGuard(t *testing.T) {
	for _, m := range mutations() {
		t.Run(m.name, func(t *testing.T) {
			t.Parallel()
			for _, sc := range scenarios {
				if sc.name != m.on {
					continue
				}
				e := explore(sc, m)
				if e.violated < 0 {
					t.Fatalf("%d states without the guard, and I1 holds in all of them: the guard or the explorer is wrong", len(e.order))
				}
				t.Logf("after %d states: %s", len(e.order), e.trace())
			}
		})
	}
}
