package routing

import (
	"encoding/json"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"
)

// Safety 14 in an explorer of its own: one switch, a store that is wiped or
// restored to its first state at any point, and the operator's decision. It
// assumes that frontends share the state directory, as those of one host do, or
// come to a store that is not empty any more (one that has been down, to a store
// in which the doubt is marked or the operator has decided), and that nobody
// switches or decides before all running ones have seen that the store went back:
// until then one that the store has lost is not waited for.

type lostProc struct {
	ID    int // 0 while it does not run
	Last  int
	Apart bool // on a host of its own
	View  *State
	Stays [3]uint64 // by backend: the epoch
}

type lostWorld struct {
	Store, Disk  *State
	Procs        [2]lostProc
	Holds, Inits int
	Starts       int
	Restores     int
}

type lostExplorer struct {
	r        rules
	mutation string
	states   map[string]*State // interned: equal States are one pointer
	reads    map[[2]*State]lostRead
	rules    map[lostRule]*State
	worlds   map[lostWorld]bool
	queue    []*lostWorld
	how      map[*lostWorld]lostStep
	violated *lostWorld
	first    *State
}

type lostRule struct {
	on   *State
	name string
}

type lostRead struct {
	view    *State
	isDoubt bool
}

type lostStep struct {
	from *lostWorld
	what string
}

const startsLate = "starts on another host, where it has been down since the beginning"

const (
	mutantForgets = "merge: what a frontend had is compared with the store"
	mutantSeeds   = "seed: not what a snapshot knows"
	mutantFloors  = "register: a row that was kept keeps the floor down"
)

func (e *lostExplorer) visit(w lostWorld, from *lostWorld, how string, args ...any) {
	if e.worlds[w] {
		return
	}
	e.worlds[w] = true
	e.queue = append(e.queue, &w)
	e.how[&w] = lostStep{from, fmt.Sprintf(how, args...)}
	on := func(b int) bool { return w.Procs[0].Stays[b] != 0 || w.Procs[1].Stays[b] != 0 }
	if e.violated == nil && on(backendA) && on(backendB) {
		e.violated = &w
	}
}

// update runs a rule, named with its arguments, on the store, once; nil if it
// refuses.
func (e *lostExplorer) update(s *State, name string, change func(*State) error) *State {
	key := lostRule{s, name}
	if known, ok := e.rules[key]; ok {
		return known
	}
	var next *State
	if private := s.Clone(); change(private) == nil {
		next = e.essence(private)
	}
	e.rules[key] = next
	return next
}

// essence leaves out of a private State what cannot matter. The revision says
// only whether it is from before the disaster (2) or after it (1, 0).
func (e *lostExplorer) essence(s *State) *State {
	s.History, s.Switches = nil, 0
	if row, ok := s.Roles["r"]; ok {
		if row.Switch != nil {
			row.Switch = &Switch{To: row.Switch.To}
		}
		if row.Doubt != nil {
			row.Doubt = &Doubt{Known: row.Doubt.Known}
		}
		s.Roles["r"] = row
	}
	key, err := json.Marshal(s)
	if err != nil {
		panic(err)
	}
	if known, ok := e.states[string(key)]; ok {
		return known
	}
	e.states[string(key)] = s
	return s
}

func (e *lostExplorer) read(kept, fresh *State) (view *State, isDoubt bool) {
	if e.mutation == mutantForgets {
		kept = nil
	}
	pair := [2]*State{kept, fresh}
	known, ok := e.reads[pair]
	if !ok {
		view, doubts := merge(kept, fresh)
		known = lostRead{e.essence(view), len(doubts) > 0}
		e.reads[pair] = known
	}
	return known.view, known.isDoubt
}

func (e *lostExplorer) expand(w *lostWorld) {
	store := func(next *State, how string) {
		if next != nil {
			m := *w
			m.Store = next
			e.visit(m, w, "%s", how)
		}
	}
	now := explorerTime
	row := w.Store.Roles["r"]
	if w.Holds > 0 && row.Active == "a" && e.allRegistered(w) {
		if next := e.update(w.Store, "hold", func(s *State) error {
			return e.r.hold(s, []string{"r"}, order{to: "b"}, now)
		}); next != nil {
			m := *w
			m.Store, m.Holds = next, 0
			e.visit(m, w, "hold")
		}
	}
	if row.Switch != nil && e.allRegistered(w) {
		store(e.update(w.Store, "advance", func(s *State) error { return e.r.advance(s, "r", PhaseHold, now) }), "open")
	}
	if w.Restores > 0 {
		for _, lost := range []*State{e.first.Clone(), emptyState()} {
			lost.Revision = min(e.first.Revision-1, uint64(len(lost.Roles)))
			m := *w
			m.Store, m.Restores = e.essence(lost), 0
			e.visit(m, w, "the store goes back to revision %d", lost.Revision)
		}
	}
	if w.Inits > 0 && e.allNoticed(w) {
		for _, to := range []string{"a", "b"} {
			next := e.update(w.Store, "init "+to, func(s *State) error { return e.r.initRole(s, "r", order{to: to}, []string{"a", "b"}, 0, now) })
			if next != nil {
				m := *w
				m.Store, m.Inits = next, 0
				e.visit(m, w, "roles init --active %s", to)
			}
		}
	}
	for i := range w.Procs {
		e.expandProc(w, i)
	}
}

func (e *lostExplorer) allRegistered(w *lostWorld) bool {
	for i, p := range w.Procs {
		if _, ok := w.Store.Frontends[frontendID(uint8(i), uint8(p.ID))]; p.ID != 0 && !ok {
			return false
		}
	}
	return true
}

func (e *lostExplorer) allNoticed(w *lostWorld) bool {
	for _, p := range w.Procs {
		if p.ID != 0 && p.View.Roles["r"].Doubt == nil {
			return false
		}
	}
	return e.allRegistered(w)
}

func (e *lostExplorer) expandProc(w *lostWorld, i int) {
	p := w.Procs[i]
	visit := func(p lostProc, store, disk *State, how string) {
		m := *w
		m.Procs[i], m.Store, m.Disk = p, store, disk
		e.visit(m, w, "f%d %s", i, how)
	}
	if p.ID == 0 {
		if w.Starts > 0 {
			e.enrol(w, i, w.Starts-1, w.Disk, nil, "starts")
		}
		if w.Starts > 0 && w.Store.Revision == 0 && len(w.Store.Frontends) > 0 {
			e.enrol(w, i, w.Starts-1, nil, nil, "starts on another host")
		}
		if w.Starts > 0 && (w.Inits == 0 || w.Store.Roles["r"].Doubt != nil) {
			e.enrol(w, i, w.Starts-1, e.first, nil, startsLate)
		}
		return
	}
	id := frontendID(uint8(i), uint8(p.ID))
	view, isDoubt := e.read(p.View, w.Store)
	q := p
	q.View = view
	visit(q, w.Store, w.Disk, "reads the store")
	if isDoubt {
		if s := e.update(w.Store, fmt.Sprint("mark ", view.Roles["r"].Epoch), func(s *State) error {
			return e.r.markDoubt(s, "r", view.Roles["r"], id, "went back", explorerTime)
		}); s != nil {
			visit(q, s, w.Disk, "marks its doubt")
		}
	}
	if !p.Apart {
		visit(p, w.Store, p.View, "saves its snapshot")
	}
	at := p.View.Roles["r"]
	f, registered := p.View.Frontends[id]
	has := presence{registered: registered, floor: f.Floors["r"]}
	floors := map[string]uint64{}
	for b, epoch := range p.Stays {
		if epoch != 0 {
			has.count(at, place{backendName[b], epoch}, 1)
			floors["r"] = epoch
			q := p
			q.Stays[b] = 0
			visit(q, w.Store, w.Disk, "'s session ends")
		}
	}
	if !registered && p.Last < 2 {
		e.enrol(w, i, w.Starts, p.View, floors, "registers anew")
	}
	if p.Apart {
		has.onDisk = true
	} else if w.Disk != nil {
		has.onDisk = isHeldOnDisk(at, w.Disk.Roles["r"])
	}
	if wantsAck(at, has) && e.r.mayAck(at, has) == "" {
		if s := e.update(w.Store, fmt.Sprint("ack ", id, at.Epoch), func(s *State) error { return e.r.ack(s, id, "r", at.Epoch, handed{}) }); s != nil {
			visit(p, s, w.Disk, "acks")
		}
	}
	if !isUnknown(at) && e.r.admit(at, has) == "" && p.Stays == [3]uint64{} {
		q := p
		q.Stays[backendNumber(at.Active)] = at.Epoch
		visit(q, w.Store, w.Disk, "admits to "+at.Active)
	}
}

// enrol registers a process that knows what it kept (Table.enrol); nothing where
// nobody has been before.
func (e *lostExplorer) enrol(w *lostWorld, i, starts int, kept *State, floors map[string]uint64, how string) {
	m := *w
	p := &m.Procs[i]
	p.ID, p.Last, p.Apart = p.Last+1, p.Last+1, p.Apart || kept == nil || how == startsLate
	m.Starts = starts
	m.Store = e.update(w.Store, fmt.Sprintf("register %d.%d %p %v", i, p.ID, kept, floors), func(s *State) error {
		e.r.seed(s, map[string]RoleConfig{"r": {Members: []string{"a", "b"}, Active: "a"}}, func(string) bool { return kept != nil && e.mutation != mutantSeeds })
		if e.mutation != mutantFloors {
			floors = floorsOf(kept, s, floors)
		}
		return e.r.register(s, frontendID(uint8(i), uint8(p.ID)), Frontend{Backends: []string{"a", "b"}, Floors: floors})
	})
	p.View, _ = e.read(kept, m.Store)
	e.visit(m, w, "f%d %s", i, how)
}

func exploreLost(mutation string) *lostExplorer {
	e := &lostExplorer{mutation: mutation, states: make(map[string]*State), reads: make(map[[2]*State]lostRead), rules: make(map[lostRule]*State),
		worlds: make(map[lostWorld]bool), how: make(map[*lostWorld]lostStep)}
	first := emptyState()
	first.Revision = 2
	first.Roles["r"] = Row{Members: []string{"a", "b"}, Active: "a", Epoch: 1, Phase: PhaseOpen}
	if err := e.r.register(first, frontendID(0, 1), Frontend{Backends: []string{"a", "b"}}); err != nil {
		panic(err)
	}
	first = e.essence(first)
	e.first = first
	w := lostWorld{Store: first, Disk: first, Holds: 1, Inits: 1, Starts: 1, Restores: 1}
	w.Procs[0] = lostProc{ID: 1, Last: 1, View: first}
	e.visit(w, nil, "begin")
	for i := 0; i < len(e.queue) && e.violated == nil; i++ {
		e.expand(e.queue[i])
	}
	return e
}

func (e *lostExplorer) trace() string {
	var steps []string
	for w := e.violated; w != nil; w = e.how[w].from {
		steps = append(steps, e.how[w].what)
	}
	slices.Reverse(steps)
	return strings.Join(steps, "; ")
}

func TestSafety14Explorer(t *testing.T) {
	t.Parallel()
	begin := time.Now()
	e := exploreLost("")
	t.Logf("%d states of the world, %d of the store, %v", len(e.queue), len(e.states), time.Since(begin).Round(time.Millisecond))
	if e.violated != nil {
		t.Errorf("a user is on two backends: %s", e.trace())
	}
	for _, m := range []string{mutantForgets, mutantFloors, mutantSeeds} {
		if e := exploreLost(m); e.violated == nil {
			t.Errorf("without %q: %d states, and I1 holds in all of them", m, len(e.queue))
		} else {
			t.Logf("without %q: %s", m, e.trace())
		}
	}
}
