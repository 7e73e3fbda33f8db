package routing

import (
	"fmt"
	"slices"
)

// What hooks do on the hosts, in the explorer: which backend serves, which lacks
// mail that the user was promised, and the steps of a driver that runs them.

// hosts is what hooks change. Sets are bits by backend.
type hosts struct {
	up    uint8 // serves, as the master
	lacks uint8 // acknowledged mail is missing there
	off   uint8 // by the operator's word
	dead  uint8 // for good
	torn  uint8 // and has some that its peer has not: no catch-up can settle that
	ran   step8 // whose hook the driver has run
	undid step8 // whose undo hook it has run
	// By backend, the newest hook that has come there, and one that hangs.
	newest [3]stamp8
	orphan stamp8
	stops  uint8 // the backend that the orphan takes for the old active
}

// step8 is a phase in a byte, which is quicker to look up.
type step8 uint8

func inByte(p Phase) step8 {
	return step8(1 + slices.IndexFunc(switchoverPhases, func(h hookPhase) bool { return h.phase == p }))
}

func (s step8) phase() Phase {
	if s == 0 {
		return ""
	}
	return switchoverPhases[s-1].phase
}

// cut ends what runs on a backend, and stops it.
func (n *node) cut(backend int) {
	bit := uint8(1) << backend
	n.hosts.up &^= bit
	n.ghosts &^= bit
	for i := range n.procs {
		n.procs[i].stays[backend] = 0
	}
}

func (n *node) rejoin(backend int) {
	n.cut(backend)
	n.hosts.off &^= 1 << backend
	n.hosts.torn &^= 1 << backend
	n.hosts.lacks &^= 1 << backend
}

// write has the user change something wherever that is possible.
func (e *explorer) write(n *node) {
	for _, b := range []int{backendA, backendB} {
		if n.effects(b) {
			n.hosts.lacks |= 1 << (3 - b)
		}
	}
}

// hostFault says what is wrong with the backends.
func (e *explorer) hostFault(n node) string {
	row := e.states[n.store].Roles["r"]
	active := uint8(1) << backendNumber(row.Active)
	switch {
	case row.Phase == PhaseOpen && n.hosts.lacks&active != 0:
		return "mail that was acknowledged is lost"
	case !slices.Contains(e.hooks, HookDemote):
	case row.Phase == PhaseOpen && (n.hosts.up|n.hosts.dead)&active == 0:
		return "nobody serves"
	case n.hosts.up == 1<<backendA|1<<backendB:
		return "both backends serve as the master"
	}
	return ""
}

// commit takes over a new state of the store, with what follows from it.
func (e *explorer) commit(n *node, to uint16) {
	was, is := e.states[n.store].Roles["r"], e.states[to].Roles["r"]
	n.store = to
	if was.Phase != is.Phase || was.Epoch != is.Epoch {
		n.hosts.ran = 0
	}
	if was.Phase != is.Phase || was.Switch != nil && is.Switch != nil && len(was.Switch.Begun) != len(is.Switch.Begun) {
		n.hosts.undid = 0
	}
	if was.Switch == nil || is.Phase != PhaseOpen {
		return
	}
	from, into := uint8(1)<<backendNumber(was.Active), uint8(1)<<backendNumber(is.Active)
	switch {
	case was.Active != is.Active && !slices.Contains(e.hooks, HookDemote):
		n.hosts.up = into
	case was.Active == is.Active && n.hosts.off&from != 0:
		n.hosts.up |= from &^ n.hosts.dead // who has aborted that has repaired it
		n.hosts.off &^= from
	case was.Active != is.Active && was.Switch.Failover && n.hosts.lacks&into != 0:
		n.hosts.lacks = n.hosts.lacks&^into | from // and the loss accepted
		n.hosts.torn = n.hosts.torn&^into | from
	}
}

// decision is what a driver does next, and with what.
type decision struct {
	do   move
	what string
}

// decideAt is what a driver decides by.
type decideAt struct {
	store      uint16
	ran, undid step8
}

// decisions are the next steps of drivers (decide), whatever they know of hooks
// that have failed or shown nothing, and of the time.
func (e *explorer) decisions(n node, row Row) []decision {
	at := decideAt{n.store, n.hosts.ran, n.hosts.undid}
	list, known := e.decides[at]
	if known {
		return list
	}
	s := e.states[n.store]
	if e.r.without != "" {
		s = s.Clone()
		switch row := s.Roles["r"]; e.r.without { // the driver looks for the same as these
		case openGuards[0].name:
			s.Frontends = nil
		case openGuards[1].name:
			row.Residues = nil
			s.Roles["r"] = row
		}
	}
	for bits := range 32 {
		is := func(bit int) bool { return bits&(1<<bit) != 0 }
		d := driving{roles: []string{"r"}, ran: n.hosts.ran.phase(), undone: n.hosts.undid.phase(), proved: is(0)}
		if is(1) {
			d.failed = "a hook failed"
		}
		if is(2) && e.effect == effectRan {
			d.ran = row.Phase
		}
		next := decision{}
		if next.do, next.what = decide(s, d, is(3), is(4)); next.do == moveAdvance || next.do == moveAbort || next.do == moveWait {
			next.what = ""
		}
		if !slices.Contains(list, next) {
			list = append(list, next)
		}
	}
	if row.Phase == PhaseAbort && e.effect == effectUndo {
		list = append(list, decision{do: moveReopen})
	}
	e.decides[at] = list
	return list
}

// expandSwitch tries what a driver can do next.
func (e *explorer) expandSwitch(n node) {
	row := e.states[n.store].Roles["r"]
	e.expandLate(n)
	e.expandOrphan(n)
	if row.Switch == nil {
		return
	}
	e.expandAhead(n, row)
	op := storeOp{number: uint8(row.Switch.Number), phase: row.Phase}
	for _, next := range e.decisions(n, row) {
		op := op
		switch next.do {
		case moveAdvance:
			if !e.noticed || !e.isOutside(n) {
				op.kind = "advance"
				e.decided(n, op, nil)
			}
		case moveAbort:
			op.kind = "turn back in"
			e.decided(n, op, nil)
		case moveRun, moveUndo:
			e.runHook(n, row, Hook(next.what), op)
		case moveUndone:
			op.kind, op.phase = "undone", Phase(next.what)
			e.decided(n, op, nil)
		case moveReopen:
			op.kind = "reopen"
			e.decided(n, op, nil)
		}
	}
}

// expandAhead runs a hook before the step to its phase is written, and that of
// an undo before ABORT is; the driver dies before it writes.
func (e *explorer) expandAhead(n node, row Row) {
	hook, begun := Hook(""), row.Switch.Begun
	switch {
	case row.Phase == PhaseAbort:
	case e.effect == effectFirst:
		hook, _ = row.Switch.hooks(row.Switch.next(row.Phase))
	case e.effect == effectFirstUndo && len(begun) > 0:
		_, hook = row.Switch.hooks(begun[len(begun)-1])
	}
	if m := n; row.Switch.has(hook) && e.work(&m, row, hook) {
		e.visit(m, step{what: string(hook) + " runs ahead of its step"})
	}
}

// runHook runs a hook to its end; or to no end, which may have changed as much.
func (e *explorer) runHook(n node, row Row, hook Hook, op storeOp) {
	if e.sticks && (isUndo(hook) || row.canAbort() != "") {
		op := op
		op.kind = "stick"
		e.decided(n, op, nil)
	}
	m := n
	if n.orphans > 0 && n.hosts.orphan == 0 && slices.Contains(hookRanks, hook) {
		m.orphans--
		m.hosts.orphan, m.hosts.stops = stampOf(op.number, hook), backendNumber(row.Active)
		e.visit(m, step{what: string(hook) + " hangs"})
		m = n
	}
	if !e.work(&m, row, hook) {
		return
	}
	if m != n && hook != HookCatchUp {
		e.visit(m, step{what: string(hook) + " fails half way"})
	}
	mine := driving{ran: n.hosts.ran.phase(), undone: n.hosts.undid.phase()}
	(*driver)(nil).hookDone(&mine, row, hook)
	op.kind, op.hook = "ran", hook
	e.decided(m, op, func(m *node) { m.hosts.ran, m.hosts.undid = inByte(mine.ran), inByte(mine.undone) })
}

// work is what a hook does at the backends; false if it does not succeed.
func (e *explorer) work(n *node, row Row, hook Hook) bool {
	from, to := int(backendNumber(row.Active)), int(backendNumber(row.Switch.To))
	on := from
	if hook == HookPromote || hook == HookUndoPromote {
		on = to
	}
	if n.hosts.dead&(1<<on) != 0 && hook != HookFence || n.hosts.dead != 0 && hook == HookCatchUp {
		return false
	}
	if e.orphans > 0 && slices.Contains(hookRanks, hook) {
		stamp := stampOf(uint8(row.Switch.Number), hook)
		if stamp < n.hosts.newest[on] && e.effect != effectOrphan {
			return false
		}
		n.hosts.newest[on] = max(stamp, n.hosts.newest[on])
		if isUndo(hook) { // what is older must not come where it does nothing itself
			n.hosts.newest[3-on] = max(stamp, n.hosts.newest[3-on])
		}
	}
	switch hook {
	case HookProve:
		return !n.effects(from)
	case HookDemote, HookFence:
		if e.effect != effectStops {
			n.cut(from)
		}
		n.hosts.up &^= 1 << from
	case HookCatchUp:
		knows := row.Seen.All || slices.Contains(row.Seen.Users, "u")
		if knows && !n.effects(from) && n.hosts.torn&(1<<to) == 0 {
			n.hosts.lacks &^= 1 << to
		}
	case HookPromote:
		n.hosts.up |= 1 << to
		n.hosts.off &^= 1 << to
	case HookUndoDemote:
		n.hosts.up |= 1 << from
	case HookUndoPromote:
		n.hosts.up &^= 1 << to
	}
	return true
}

// hookRanks are the hooks that may hang, in the order in which they are newer.
var hookRanks = []Hook{HookDemote, HookFence, HookPromote, HookUndoPromote, HookUndoDemote}

// stamp8 is a switch and a hook of it: what hooks keep of the newest that has come
// to a backend, to refuse what is older (safety 17). Attempts are left out.
type stamp8 uint8

func stampOf(number uint8, hook Hook) stamp8 {
	return stamp8(8*number + 1 + uint8(slices.Index(hookRanks, hook)))
}

// expandOrphan lets a hook go on that hangs.
func (e *explorer) expandOrphan(n node) {
	if n.hosts.orphan == 0 {
		return
	}
	stamp := n.hosts.orphan - 1
	hook := hookRanks[stamp%8]
	row := Row{Active: backendName[n.hosts.stops], Switch: &Switch{Number: uint64(stamp / 8), To: backendName[3-n.hosts.stops]}}
	n.hosts.orphan, n.hosts.stops = 0, 0
	e.visit(n, step{what: "the " + string(hook) + " that hangs is killed"})
	if e.work(&n, row, hook) {
		e.visit(n, step{what: "the " + string(hook) + " that hangs goes on"})
	}
}

// decided commits a driver's step: now, or, where there are two, at some time
// when the other has gone on.
func (e *explorer) decided(n node, op storeOp, then func(*node)) {
	what := op.kind + " " + string(op.phase) + " " + string(op.hook)
	if to, ok := e.store(n.store, op); ok {
		m := n
		e.commit(&m, to)
		if then != nil {
			then(&m)
		}
		e.visit(m, step{what: what})
	}
	if e.drivers && n.late == 0 {
		m := n
		m.late = e.send(op)
		e.visit(m, step{what: "late: " + what})
	}
}

func (e *explorer) expandLate(n node) {
	if n.late == 0 {
		return
	}
	m := n
	m.late = 0
	e.visit(m, step{what: "the late step is lost"})
	if to, ok := e.store(n.store, e.ops[n.late]); ok {
		e.commit(&m, to)
		e.visit(m, step{what: "the late step comes"})
	}
}

// applyStep is a driver's step (commitStep).
func (e *explorer) applyStep(s *State, op storeOp) error {
	row := s.Roles["r"]
	if e.effect != effectStep {
		if _, err := s.inSwitch("r", uint64(op.number)); err != nil {
			return err
		}
	}
	now := explorerTime
	switch op.kind {
	case "advance":
		err := e.r.advance(s, "r", op.phase, now)
		if row := s.Roles["r"]; err == nil && row.Phase == PhaseOpen && e.effect == effectFailover {
			row.Stale = nil
			s.Roles["r"] = row
		}
		return err
	case "ran":
		if row.Switch == nil {
			return errNothing
		}
		return e.r.ran(s, "r", row.Switch.Number, HookRun{Hook: op.hook})
	case "undone":
		if row.Switch == nil {
			return errNothing
		}
		return e.r.undone(s, "r", op.phase)
	case "stick":
		return e.r.stick(s, "r", uint64(op.number), "a hook failed")
	case "turn back in":
		return e.abort(s, row)
	case "reopen":
		if e.effect == effectUndo && row.Switch != nil {
			row.Switch.Begun = nil
		}
		err := e.r.reopen(s, "r", now)
		if row := s.Roles["r"]; err == nil && e.effect == effectReopen {
			row.Epoch -= 2
			s.Roles["r"] = row
		}
		return err
	}
	panic(fmt.Sprint("no rule ", op.kind))
}

func (e *explorer) abort(s *State, row Row) error {
	if sw := row.Switch; sw != nil && e.effect == effectNoWay {
		begun := sw.Begun
		sw.Begun = nil
		defer func() { sw.Begun = begun }()
	}
	err := e.r.abort(s, "r", "", explorerTime)
	if row := s.Roles["r"]; err == nil && e.effect == effectInherit {
		row.Residues = nil
		s.Roles["r"] = row
	}
	return err
}
