package routing

import (
	"encoding/json"
	"fmt"
	"slices"
	"strings"
	"time"
)

// The explorer searches every state that frontends, drivers, operators, hooks,
// crashes and late events can reach, and looks for one user who can have effects
// on two backends of a role (I1), for mail that the active lacks (I2), for two
// backends, or none, that serve (explorer_hooks_test.go), and for states from
// which no way leads back to an open role. It calls the real
// rules (switch.go, failover.go, request.go, roster.go) and the real decisions of
// the gate (gate.go). What it leaves out is time: everything may be late, as when
// the store is away, but for what clocks promise (explorer_lease_test.go). Every
// driver's step is tried everywhere: that is their crash and restart at every
// point.
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
	hooks     []Hook
	failovers int
	abandons  int  // by an operator who knows that the new active is down
	drivers   bool // a second one, whose step may be long on its way
	lost      int  // messages of frontends that are long on their way, their answers lost
	requests  bool // switches begin with a request and a comparison
	reports   bool // whose reports may be long on their way
	mail      bool // who lacks what, too
	leases    int  // that end others' registrations
	stops     int  // of a process by SIGSTOP; of its machine, clock and all, if paused
	paused    bool
	deaths    int  // of backends, for good
	sticks    bool // switches may wait for the operator
	orphans   int  // hooks that hang, and go on when nobody waits for them any more
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

	effectStops     = "demote, fence: nothing of the old active runs on"
	effectStep      = "a driver's step is for its own switch only"
	effectRan       = "a driver leaves a phase when its hook is done"
	effectUndo      = "an abort undoes what was begun"
	effectAckEpoch  = "ack: it is for one epoch only"
	effectAckSeen   = "ack: who was seen goes with it"
	effectByeSeen   = "goodbye: who was seen goes with it"
	effectBurySeen  = "bury: anybody may have been seen"
	effectStands    = "report: who is inside counts as seen again"
	effectCompared  = "comparison: whose work may run on is looked at again"
	effectFailover  = "failover: the old active is stale"
	effectEntry     = "lease: nobody enters when it is over"
	effectMargin    = "lease: it is over for its holder first"
	effectNoWay     = "abort: not once a promotion has begun that cannot be undone"
	effectReopen    = "abort: the epoch is not that of before"
	effectFirst     = "a step is written before its hook runs"
	effectFirstUndo = "an abort is written before anything is undone"
	effectTakeOver  = "failover: it takes over the switch that is under way"
	effectResume    = "a switch that waits for the operator can be resumed"
	effectAbandon   = "a switch whose new active is dead can be turned back"
	effectOrphan    = "hooks: an older call is refused"
	effectShared    = "an ID is one process's"
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
	saw      bool     // the user was seen: not yet handed over
	isOver   bool     // its lease is, by its own clock
	asleep   bool     // it is stopped
	sent     opID     // a message that is long on its way, and waited for no more
	reports  opID     // a report whose answer it waits for
}

// node is one state of the world.
type node struct {
	store  uint16
	procs  [2]proc
	ghosts uint8 // bits by backend: work that runs on though its stay has ended
	hosts  hosts
	late   opID // the step of a driver that is long on its way
	// What may still happen.
	holds, starts, crashes, fences, failovers, lost, stops, ends, abandons, deaths, orphans uint8
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

// opID is the number of a storeOp on its way; 0 if there is none.
type opID uint16

// storeOp is a rule with its arguments.
type storeOp struct {
	kind     string
	proc, id uint8
	epoch    uint8
	residues uint8
	backend  uint8
	saw      bool
	number   uint8 // of a switch or request
	phase    Phase
	hook     Hook
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
	ops      []storeOp
	opIDs    map[storeOp]opID
	looks    map[lookAt]seen
	decides  map[decideAt][]decision
	steps    map[storeStep]int // to; -1: refused
	nodes    map[node]int32
	order    []node
	parents  []int32
	how      []step
	edges    []int32 // what can follow on each node
	ways     []int32 // where those of a node begin
	current  int32
	violated int32
	fault    string
}

var explorerTime = time.Date(2026, 1, 1, 0, 0, 0, 0, time.UTC)

func explore(sc scenario, m mutation) *explorer {
	e := &explorer{scenario: sc, r: rules{without: m.rule}, ids: make(map[string]uint16), steps: make(map[storeStep]int),
		ops: make([]storeOp, 1), opIDs: make(map[storeOp]opID), looks: make(map[lookAt]seen), decides: make(map[decideAt][]decision), nodes: make(map[node]int32), violated: -1}
	if m.rule == "" {
		e.effect = m.name
	}
	s := emptyState()
	s.Roles["r"] = Row{Members: []string{"a", "b"}, Active: "a", Epoch: 1, Phase: PhaseOpen}
	n := node{holds: uint8(sc.holds), starts: uint8(sc.starts), crashes: uint8(sc.crashes), fences: uint8(sc.fences),
		failovers: uint8(sc.failovers), lost: uint8(sc.lost), stops: uint8(sc.stops), ends: uint8(sc.leases), abandons: uint8(sc.abandons),
		deaths: uint8(sc.deaths), orphans: uint8(sc.orphans), hosts: hosts{up: 1 << backendA}}
	n.store = e.intern(s)
	e.current = -1
	e.visit(n, step{})
	for i := 0; i < len(e.order) && e.violated < 0; i++ {
		e.current = int32(i)
		e.ways = append(e.ways, int32(len(e.edges)))
		e.expand(e.order[i])
	}
	if e.violated < 0 {
		e.findWedge()
	}
	return e
}

// visit adds a node, and stops the search if it is a fault.
func (e *explorer) visit(n node, how step) {
	if e.mail {
		e.write(&n)
	}
	at, known := e.nodes[n]
	if !known {
		at = int32(len(e.order))
		e.nodes[n] = at
	}
	if e.current >= 0 {
		e.edges = append(e.edges, at)
	}
	if known {
		return
	}
	e.order = append(e.order, n)
	e.parents = append(e.parents, e.current)
	e.how = append(e.how, how)
	if e.violated < 0 {
		if e.fault = e.faultOf(n); e.fault != "" {
			e.violated = at
		}
	}
}

func (e *explorer) faultOf(n node) string {
	if n.effects(backendA) && n.effects(backendB) {
		return "a user can have effects on two backends"
	}
	return e.hostFault(n)
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
	s.History, s.Revision = nil, 0
	row := s.Roles["r"]
	if sw := row.Switch; sw != nil {
		row.Switch = &Switch{Number: sw.Number, To: sw.To, Begun: sw.Begun, Hooks: sw.Hooks, Failover: sw.Failover, AcceptLoss: sw.AcceptLoss,
			AcceptStale: sw.AcceptStale, Stuck: sw.Stuck}
	}
	if !e.drivers && !e.requests && e.orphans == 0 { // the number tells nobody anything
		s.Switches = 0
		if row.Switch != nil {
			row.Switch.Number = 0
		}
	}
	for member := range row.Stale {
		row.Stale[member] = Stale{}
	}
	if !e.mail {
		row.Seen = Seen{}
	}
	if q := row.Request; q != nil {
		q.Asked, q.Roles, q.Hooks = time.Time{}, nil, nil
		if q.Comparison != nil {
			q.Comparison = &Comparison{Of: q.Comparison.Of, Found: q.Comparison.Found}
		}
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

// frontendID is what a process calls itself.
func (e *explorer) frontendID(proc, nonce uint8) string {
	if e.effect == effectShared {
		proc = 0
	}
	return frontendID(proc, nonce)
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

// send numbers an operation.
func (e *explorer) send(op storeOp) opID {
	id, known := e.opIDs[op]
	if !known {
		id = opID(len(e.ops))
		e.ops = append(e.ops, op)
		e.opIDs[op] = id
	}
	return id
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
	id, now := e.frontendID(op.proc, op.id), explorerTime
	row := s.Roles["r"]
	before, seenBefore := slices.Clone(row.Residues), row.Seen
	restore := func(residues, seen string) {
		row := s.Roles["r"]
		if e.effect == residues {
			row.Residues = before
		}
		if e.effect == seen {
			row.Seen = seenBefore
		}
		s.Roles["r"] = row
	}
	hand := handed{residues: residuesOf(op.residues)}
	if op.saw {
		hand.seen.Users = []string{"u"}
	}
	switch op.kind {
	case "hold", "hold, confirmed clean":
		if op.kind != "hold" {
			s.clean([]string{"r"})
		}
		err := e.r.hold(s, []string{"r"}, order{to: other(row.Active), hooks: e.hooks}, now)
		if row := s.Roles["r"]; err == nil && e.effect == effectEpoch {
			row.Epoch--
			s.Roles["r"] = row
		}
		return err
	case "abort":
		return e.abort(s, row)
	case "age":
		return e.r.ageOut(s, func(_ string, r Residue) bool { return r.Backend == backendName[op.backend] })
	case "register":
		f := Frontend{Backends: []string{"a", "b"}}
		if op.epoch != 0 {
			f.Floors = map[string]uint64{"r": uint64(op.epoch)}
		}
		return e.r.register(s, id, f)
	case "ack":
		defer restore(effectAck, effectAckSeen)
		if e.effect == effectAckEpoch {
			op.epoch = uint8(row.Epoch)
		}
		return e.r.ack(s, id, "r", uint64(op.epoch), hand)
	case "goodbye":
		defer restore(effectGoodbye, effectByeSeen)
		e.r.goodbye(s, id, map[string]handed{"r": hand})
		return nil
	case "bury":
		defer restore(effectBury, effectBurySeen)
		return e.r.bury(s, id, now)
	case "fence":
		delete(s.Frontends, id)
		return nil
	case "failover", "failover, loss accepted", "failover, stale accepted":
		if row.Switch != nil && e.effect == effectTakeOver {
			return errNothing
		}
		o := order{to: other(row.Active), hooks: e.hooks, acceptLoss: op.kind != "failover", acceptStale: op.kind == "failover, stale accepted"}
		return e.r.failover(s, []string{"r"}, o, now)
	case "abandon":
		return e.r.abandon(s, "r", "", now)
	case "resume":
		return e.r.resume(s, "r")
	case "rejoin":
		if _, err := e.r.rejoining(s, "r", other(row.Active), "", ScopeRole); err != nil {
			return err
		}
		return e.r.rejoined(s, "r", other(row.Active), row.Active, s.Roles["r"].Stale[other(row.Active)], true)
	}
	if e.requests {
		if err, ok := e.applyRequest(s, op, id, hand); ok {
			return err
		}
	}
	return e.applyStep(s, op)
}

func other(backend string) string { return backendName[3-backendNumber(backend)] }

func backendNumber(name string) uint8 { return uint8(slices.Index(backendName, name)) }

// lookAt is who looks at which state of the store.
type lookAt struct {
	store    uint16
	proc, id uint8
}

// look is what a frontend sees of a state of the store.
func (e *explorer) look(store uint16, proc, id uint8) seen {
	at := lookAt{store, proc, id}
	v, known := e.looks[at]
	if !known {
		v = e.lookUp(at)
		e.looks[at] = v
	}
	return v
}

func (e *explorer) lookUp(at lookAt) seen {
	s := e.states[at.store]
	row := s.Roles["r"]
	v := seen{open: row.Phase == PhaseOpen, active: backendNumber(row.Active), epoch: uint8(row.Epoch)}
	if f, ok := s.Frontends[e.frontendID(at.proc, at.id)]; ok {
		v.registered, v.floor = true, uint8(f.Floors["r"])
	}
	return v
}
