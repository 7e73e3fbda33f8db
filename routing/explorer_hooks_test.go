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
	torn  uint8 // and has some that its peer has not: no catch-up can settle that
	ran   step8 // whose hook the driver has run
	undid step8 // whose undo hook it has run
}

// step8 is a phase in a byte, which is quicker to look up.
type step8 uint8

func inByte(p Phase) step8 {
	return step8(1 + slices.IndexFunc(switchoverPhases, func(h hookPhase) bool { return h.phase == p }))
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
	case row.Phase == PhaseOpen && n.hosts.up&active == 0:
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
		n.hosts.up |= from // who has aborted that has repaired it
		n.hosts.off &^= from
	case was.Active != is.Active && was.Switch.Failover && n.hosts.lacks&into != 0:
		n.hosts.lacks = n.hosts.lacks&^into | from // and the loss accepted
		n.hosts.torn = n.hosts.torn&^into | from
	}
}

// expandSwitch tries what a driver can do next (decide).
func (e *explorer) expandSwitch(n node) {
	row := e.states[n.store].Roles["r"]
	e.expandLate(n)
	if row.Switch == nil {
		return
	}
	op := storeOp{number: uint8(row.Switch.Number), phase: row.Phase}
	if row.Phase == PhaseAbort {
		e.expandUndo(n, row, op)
		return
	}
	allAcked := len(e.states[n.store].missingAcks("r")) == 0
	hook, _ := row.Switch.hooks(row.Phase)
	if row.Phase == PhaseHold && row.Switch.has(HookProve) && allAcked && !n.effects(int(backendNumber(row.Active))) {
		op := op
		op.kind, op.hook = "ran", HookProve
		e.decided(n, op, nil)
	}
	if row.Switch.has(hook) && n.hosts.ran != inByte(row.Phase) {
		e.runHook(n, row, hook, op)
		if e.effect != effectRan {
			return
		}
	}
	if !e.noticed || !e.isOutside(n) {
		op.kind = "advance"
		e.decided(n, op, nil)
	}
}

func (e *explorer) expandUndo(n node, row Row, op storeOp) {
	begun := row.Switch.Begun
	if len(begun) == 0 || e.effect == effectUndo {
		op.kind = "reopen"
		e.decided(n, op, nil)
		return
	}
	op.phase = begun[len(begun)-1]
	if _, undo := row.Switch.hooks(op.phase); row.Switch.has(undo) && n.hosts.undid != inByte(op.phase) {
		m := n
		m.hosts.undid = inByte(op.phase)
		if undo == HookUndoDemote {
			m.hosts.up |= 1 << backendNumber(row.Active)
		} else {
			m.hosts.up &^= 1 << backendNumber(row.Switch.To)
		}
		e.visit(m, step{what: string(undo) + " is done"})
		return
	}
	op.kind = "undone"
	e.decided(n, op, nil)
}

// runHook runs a hook of the way forward to its end; or to no end, which may
// have changed as much.
func (e *explorer) runHook(n node, row Row, hook Hook, op storeOp) {
	m := n
	from, to := int(backendNumber(row.Active)), int(backendNumber(row.Switch.To))
	switch hook {
	case HookDemote, HookFence:
		if e.effect != effectStops {
			m.cut(from)
		}
		m.hosts.up &^= 1 << from
	case HookCatchUp:
		knows := row.Seen.All || slices.Contains(row.Seen.Users, "u")
		if knows && !n.effects(from) && n.hosts.torn&(1<<to) == 0 {
			m.hosts.lacks &^= 1 << to
		}
	case HookPromote:
		m.hosts.up |= 1 << to
		m.hosts.off &^= 1 << to
	}
	if m != n && hook != HookCatchUp {
		e.visit(m, step{what: string(hook) + " fails half way"})
	}
	op.kind, op.hook = "ran", hook
	e.decided(m, op, func(m *node) { m.hosts.ran = inByte(row.Phase) })
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
	case "reopen":
		if e.effect == effectUndo && row.Switch != nil {
			row.Switch.Begun = nil
		}
		return e.r.reopen(s, "r", now)
	}
	panic(fmt.Sprint("no rule ", op.kind))
}
