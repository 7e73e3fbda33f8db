package routing

// What can happen next, in the explorer.

func (e *explorer) expand(n node) {
	e.expandStore(n)
	for i := range e.frontends {
		e.expandProc(n, uint8(i))
	}
	for _, b := range []uint8{backendA, backendB} {
		if n.ghosts&(1<<b) != 0 {
			m := n
			m.ghosts &^= 1 << b
			e.visit(m, step{what: "work ends on {b}", on: int(b)})
		}
	}
}

// expandStore tries what drivers and operators can do.
func (e *explorer) expandStore(n node) {
	try := func(op storeOp, edit func(*node)) {
		to, ok := e.store(n.store, op)
		if !ok {
			return
		}
		m := n
		m.store = to
		if edit != nil {
			edit(&m)
		}
		e.visit(m, step{what: op.kind, proc: op.proc})
	}
	if n.holds > 0 {
		less := func(m *node) { m.holds-- }
		try(storeOp{kind: "hold"}, less)
		if n.ghosts == 0 {
			try(storeOp{kind: "hold, confirmed clean"}, less)
		}
	}
	row := e.states[n.store].Roles["r"]
	switch {
	case row.Phase == PhaseAbort && len(row.Switch.Begun) > 0:
		try(storeOp{kind: "undone"}, nil)
	case row.Phase == PhaseAbort:
		try(storeOp{kind: "reopen"}, nil)
	case row.Phase != PhaseOpen:
		if !e.noticed || !e.isOutside(n) {
			try(storeOp{kind: "advance"}, nil)
		}
		try(storeOp{kind: "abort"}, nil)
	}
	for _, b := range []uint8{backendA, backendB} {
		// Age and the operator are right about the end of the work.
		if n.ghosts&(1<<b) == 0 || e.effect == effectProven {
			try(storeOp{kind: "age", backend: b}, nil)
		}
	}
	for i := range uint8(e.frontends) {
		for id := uint8(1); id <= n.procs[i].last; id++ {
			if id != n.procs[i].id {
				try(storeOp{kind: "bury", proc: i, id: id}, nil)
			}
		}
		if n.fences > 0 && n.procs[i].id != 0 && n.procs[i].view.registered {
			try(storeOp{kind: "fence", proc: i, id: n.procs[i].id}, func(m *node) { m.fences-- })
		}
	}
}

// expandProc tries what one frontend process can do.
func (e *explorer) expandProc(n node, i uint8) {
	p := n.procs[i]
	visit := func(store uint16, p proc, how string) {
		m := n
		m.store, m.procs[i] = store, p
		e.visit(m, step{what: how, proc: i, epoch: p.view.epoch})
	}
	if p.id == 0 {
		e.expandStart(n, i)
		return
	}
	e.expandRegistration(n, i, visit)
	e.expandSessions(n, i)

	// Events.
	if now := e.look(n.store, i, p.id); now != p.view {
		q := p
		q.view = now
		visit(n.store, q, "{f} reads the table")
	}
	if e.late && i == 0 {
		if now := e.look(n.store, i, p.id); now != p.mail {
			q := p
			q.mail = now
			visit(n.store, q, "{f} is sent an event")
		}
		if p.mail != p.view && p.mail.epoch != 0 && e.isNewer(p) {
			q := p
			q.view, q.mail = p.mail, seen{}
			visit(n.store, q, "{f} gets the event")
		}
	}
	if e.disk && i == 0 && p.disk != p.view {
		q := p
		q.disk = p.view
		visit(n.store, q, "{f} saves its snapshot")
	}

	// The ack.
	row, at := p.view.row(), e.presence(i, p)
	if wantsAck(row, at) && e.r.mayAck(row, at) == "" {
		to, ok := e.store(n.store, storeOp{kind: "ack", proc: i, id: p.id, epoch: p.view.epoch, residues: p.residues})
		if ok {
			q := p
			q.residues = 0
			visit(to, q, "{f} acks {e}")
		}
	}
}

// isOutside says whether a process that is not registered has sessions, or
// would let them in.
func (e *explorer) isOutside(n node) bool {
	for i, p := range n.procs {
		if (p.stays != [3]uint8{} || p.view.registered) && !e.look(n.store, uint8(i), p.id).registered {
			return true
		}
	}
	return false
}

func (e *explorer) isNewer(p proc) bool {
	return e.effect == effectOlder || wentBack(p.view.row(), p.mail.row(), true) == ""
}

func (e *explorer) presence(i uint8, p proc) presence {
	row := p.view.row()
	at := presence{registered: p.view.registered, floor: uint64(p.view.floor), onDisk: true}
	if e.disk && i == 0 {
		at.onDisk = isHeldOnDisk(row, p.disk.row())
	}
	for b, epoch := range p.stays {
		if epoch != 0 {
			at.count(row, place{backendName[b], uint64(epoch)}, 1)
		}
	}
	return at
}

// expandStart starts a process anew, or from its disk while the store is away.
func (e *explorer) expandStart(n node, i uint8) {
	p := n.procs[i]
	if n.starts > 0 {
		// It reads before it registers too: the gate must not go by that. What
		// is on the disk is void before its registration is.
		m := n
		m.starts--
		m.procs[i] = proc{id: p.last + 1, last: p.last + 1, view: e.look(n.store, i, p.last+1)}
		e.visit(m, step{what: "{f} starts", proc: i})
	}
	// A start from disk goes on under the old registration, which nobody buries
	// meanwhile, and only if the snapshot was saved under that registration.
	if e.disk && p.disk.registered && e.look(n.store, i, p.last).registered {
		m := n
		q := proc{id: p.last, last: p.last, enrolled: true, view: p.disk, disk: p.disk, residues: 1<<backendA | 1<<backendB}
		if e.effect == effectOffline {
			q.residues = 0
		}
		m.procs[i] = q
		e.visit(m, step{what: "{f} starts from disk", proc: i})
	}
}

// expandRegistration registers a process that is not, or ends one that is.
func (e *explorer) expandRegistration(n node, i uint8, visit func(uint16, proc, string)) {
	p := n.procs[i]
	switch {
	case p.view.registered:
	case !p.enrolled:
		if to, ok := e.store(n.store, storeOp{kind: "register", proc: i, id: p.id}); ok {
			q := p
			q.enrolled = true
			visit(to, q, "{f} registers")
		}
	case !e.look(n.store, i, p.id).registered:
		q := p
		q.id++
		q.last++
		if to, ok := e.store(n.store, storeOp{kind: "register", proc: i, id: q.id, epoch: e.floor(p)}); ok {
			visit(to, q, "{f} registers anew")
		}
	}
	if p.stays == [3]uint8{} && n.starts > 0 {
		if to, ok := e.store(n.store, storeOp{kind: "goodbye", proc: i, id: p.id, residues: p.residues}); ok {
			visit(to, proc{last: p.last}, "{f} says goodbye")
		}
	}
	if n.crashes > 0 {
		m := n
		m.crashes--
		for b, epoch := range p.stays {
			if epoch != 0 {
				m.ghosts |= 1 << b
			}
		}
		m.procs[i] = proc{last: p.last, disk: p.disk}
		e.visit(m, step{what: "{f} is killed", proc: i})
	}
}

// floor is what a process claims when it registers anew: 0 for the epoch of now.
func (e *explorer) floor(p proc) (floor uint8) {
	if e.effect == effectFloors {
		return 0
	}
	for _, epoch := range p.stays {
		if epoch != 0 && (floor == 0 || epoch < floor) {
			floor = epoch
		}
	}
	return floor
}

// expandSessions lets the user in and out.
func (e *explorer) expandSessions(n node, i uint8) {
	p := n.procs[i]
	if row := p.view.row(); p.stays[p.view.active] == 0 && e.r.admit(row, e.presence(i, p)) == "" {
		m := n
		m.procs[i].stays[p.view.active] = p.view.epoch
		e.visit(m, step{"{f} admits to {b} in {e}", i, int(p.view.active), p.view.epoch})
	}
	for b, epoch := range p.stays {
		if epoch == 0 {
			continue
		}
		m := n
		m.procs[i].stays[b] = 0
		e.visit(m, step{"{f}: the end on {b} is proven", i, b, 0})
		if !e.unproven {
			continue
		}
		m.ghosts |= 1 << b
		if e.effect != effectLeave {
			m.procs[i].residues |= 1 << b
		}
		e.visit(m, step{"{f}: the end on {b} is not proven", i, b, 0})
	}
}
