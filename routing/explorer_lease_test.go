package routing

// Leases in the explorer, and what their clocks promise: a lease is over for its
// holder before others may count it as ended, and then nobody is inside who could
// know that. A process that is stopped knows nothing, and its sessions stand; on
// a machine that is paused its clock stands still too, so that hooks have to stop
// the backend that it may go on with.

func (e *explorer) leaseEnds(p proc) bool {
	switch {
	case e.paused && p.asleep, e.effect == effectMargin:
		return true
	}
	return p.isOver && (p.asleep || p.stays == [3]uint8{})
}

func (e *explorer) expandLease(n node, i uint8, visit func(uint16, proc, string)) {
	if e.leases == 0 {
		return
	}
	p := n.procs[i]
	q := p
	if q.asleep = !p.asleep; p.asleep {
		visit(n.store, q, "{f} goes on")
	} else if n.stops > 0 {
		m := n
		m.stops--
		m.procs[i] = q
		e.visit(m, step{what: "{f} is stopped", proc: i})
	}
	q = p
	if q.isOver = !p.isOver; q.isOver && !(e.paused && p.asleep) {
		visit(n.store, q, "the lease of {f} is over for it")
	} else if p.isOver && !p.asleep && e.look(n.store, i, p.id).registered {
		visit(n.store, q, "the lease of {f} is renewed")
	}
}
