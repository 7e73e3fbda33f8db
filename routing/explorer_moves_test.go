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
		e.commit(&m, to)
		if edit != nil {
			edit(&m)
		}
		e.visit(m, step{what: op.kind, proc: op.proc})
	}
	if n.holds > 0 && !e.requests {
		less := func(m *node) { m.holds-- }
		try(storeOp{kind: "hold"}, less)
		if n.ghosts == 0 {
			try(storeOp{kind: "hold, confirmed clean"}, less)
		}
	}
	e.expandSwitch(n)
	if row := e.states[n.store].Roles["r"]; row.Phase != PhaseOpen && row.Phase != PhaseAbort {
		try(storeOp{kind: "abort"}, nil)
	}
	e.expandOperator(n, try)
	for b := uint8(backendA); b <= backendB && n.deaths > 0; b++ {
		m := n
		m.deaths--
		m.cut(int(b))
		m.hosts.dead |= 1 << b
		e.visit(m, step{what: "{b} dies", on: int(b)})
	}
	if e.requests {
		e.expandRequest(n, try)
	}
	for _, b := range []uint8{backendA, backendB} {
		// Age and the operator are right about the end of the work.
		if n.ghosts&(1<<b) == 0 || e.effect == effectProven {
			try(storeOp{kind: "age", backend: b}, nil)
		}
	}
	e.expandEnds(n, try)
}

// expandOperator tries what operators can do with a switch, but for an abort. To
// get out of one in which a backend has died they try more than once.
func (e *explorer) expandOperator(n node, try func(storeOp, func(*node))) {
	row := e.states[n.store].Roles["r"]
	again := e.deaths > 0 && row.Phase != PhaseOpen
	if n.failovers > 0 || again {
		less := func(m *node) {
			if !again {
				m.failovers--
			}
		}
		try(storeOp{kind: "failover"}, less)
		for _, kind := range []string{"failover, loss accepted", "failover, stale accepted"} {
			try(storeOp{kind: kind}, func(m *node) { // the operator is right
				less(m)
				active := backendNumber(e.states[m.store].Roles["r"].Active)
				m.cut(int(active))
				m.hosts.off |= 1 << active
			})
		}
	}
	if (n.abandons > 0 || again) && e.effect != effectAbandon {
		try(storeOp{kind: "abandon"}, func(m *node) {
			if !again {
				m.abandons--
			}
			m.cut(int(backendNumber(e.states[m.store].Roles["r"].Switch.To)))
		})
	}
	if row.Switch != nil && row.Switch.Stuck != "" && e.effect != effectResume {
		try(storeOp{kind: "resume"}, nil)
	}
	if rejoins := 1 << (3 - backendNumber(row.Active)); len(row.Stale) > 0 && n.hosts.dead&uint8(rejoins) == 0 {
		try(storeOp{kind: "rejoin"}, func(m *node) { m.rejoin(int(3 - backendNumber(e.states[m.store].Roles["r"].Active))) })
	}
}

// expandEnds tries the ends of registrations.
func (e *explorer) expandEnds(n node, try func(storeOp, func(*node))) {
	for i := range uint8(e.frontends) {
		for id := uint8(1); id <= n.procs[i].last; id++ {
			switch {
			case id != n.procs[i].id:
				try(storeOp{kind: "bury", proc: i, id: id}, nil)
			case n.ends > 0 && e.leaseEnds(n.procs[i]):
				try(storeOp{kind: "bury", proc: i, id: id}, func(m *node) { m.ends-- })
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
		m.procs[i] = p
		e.commit(&m, store)
		e.visit(m, step{what: how, proc: i, epoch: p.view.epoch})
	}
	if p.sent != 0 {
		q := p
		q.sent = 0
		if to, ok := e.store(n.store, e.ops[p.sent]); ok {
			visit(to, q, "a late message of {f} arrives: "+e.ops[p.sent].kind)
		}
		visit(n.store, q, "a message of {f} is lost")
	}
	if p.id == 0 {
		e.expandStart(n, i)
		return
	}
	e.expandLease(n, i, visit)
	if p.asleep {
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

	e.expandReport(n, i, visit)

	// The ack.
	row, at := p.view.row(), e.presence(i, p)
	if wantsAck(row, at) && e.r.mayAck(row, at) == "" {
		op := storeOp{kind: "ack", proc: i, id: p.id, epoch: p.view.epoch, residues: p.residues, saw: p.saw}
		if to, ok := e.store(n.store, op); ok {
			q := p
			q.residues, q.saw = 0, false
			visit(to, q, "{f} acks {e}")
		}
		e.expandLost(n, i, op)
	}
}

// expandLost sends a message whose answer does not come: the store may take it
// at any time, or never, and the frontend keeps what it was to hand over.
func (e *explorer) expandLost(n node, i uint8, op storeOp) {
	if n.lost == 0 || n.procs[i].sent != 0 {
		return
	}
	m := n
	m.lost--
	m.procs[i].sent = e.send(op)
	e.visit(m, step{what: "{f} gets no answer: " + op.kind, proc: i})
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
	if p.reports != 0 {
		at.underWay = 1
	}
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
	if first := n.procs[0]; e.effect == effectShared && i > 0 && first.enrolled {
		m := n
		m.procs[i] = proc{id: first.id, last: first.id, enrolled: true, view: e.look(n.store, i, first.id)}
		e.visit(m, step{what: "{f} starts from a copy of f0's state directory", proc: i})
	}
	if n.starts > 0 {
		// It reads before it registers too: the gate must not go by that. What
		// is on the disk is void before its registration is.
		m := n
		m.starts--
		m.procs[i] = proc{id: p.last + 1, last: p.last + 1, view: e.look(n.store, i, p.last+1), sent: p.sent}
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
		op := storeOp{kind: "register", proc: i, id: p.id}
		if to, ok := e.store(n.store, op); ok {
			q := p
			q.enrolled = true
			visit(to, q, "{f} registers")
		}
		e.expandLost(n, i, op)
	case !e.look(n.store, i, p.id).registered:
		q := p
		q.id++
		q.last++
		q.isOver = false
		if to, ok := e.store(n.store, storeOp{kind: "register", proc: i, id: q.id, epoch: e.floor(p)}); ok {
			visit(to, q, "{f} registers anew")
		}
	}
	if p.stays == [3]uint8{} && p.reports == 0 && n.starts > 0 {
		if to, ok := e.store(n.store, storeOp{kind: "goodbye", proc: i, id: p.id, residues: p.residues, saw: p.saw}); ok {
			visit(to, proc{last: p.last, sent: p.sent}, "{f} says goodbye")
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
		if p.sent == 0 {
			p.sent = p.reports
		}
		m.procs[i] = proc{last: p.last, disk: p.disk, sent: p.sent}
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
	isOver := p.isOver && e.effect != effectEntry
	takes := !e.paused && e.failovers == 0 && e.deaths == 0 || n.hosts.up&(1<<p.view.active) != 0 // what is stopped takes nobody
	if row := p.view.row(); p.stays[p.view.active] == 0 && e.r.admit(row, e.presence(i, p)) == "" && !isOver && takes {
		m := n
		m.procs[i].stays[p.view.active] = p.view.epoch
		m.procs[i].saw = e.mail
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
