package routing

import "slices"

// Requests and the comparison before HOLD, in the explorer.

func (e *explorer) applyRequest(s *State, op storeOp, id string, hand handed) (err error, ok bool) {
	row, number, now := s.Roles["r"], uint64(op.number), explorerTime
	switch op.kind {
	case "request":
		err = e.r.request(s, []string{"r"}, order{to: other(row.Active), hooks: e.hooks}, false, now)
	case "report":
		err = e.r.report(s, id, "r", number, Report{}, map[string]handed{"r": hand})
	case "compare":
		err = e.r.compare(s, "r", number, "")
		if row := s.Roles["r"]; err == nil && e.effect == effectCompared {
			row.Seen = Seen{}
			s.Roles["r"] = row
		}
	case "compared":
		was := row.Seen
		err = e.r.compared(s, "r", number, Seen{}, Comparison{Found: "equal"})
		if row := s.Roles["r"]; err == nil && e.effect == effectCompared {
			row.Seen = was
			s.Roles["r"] = row
		}
	case "start":
		if row.Request != nil { // what intern has left out
			row.Request.Roles, row.Request.Hooks = []string{"r"}, e.hooks
		}
		err = e.r.start(s, "r", number, "", now)
	case "refuse":
		if row.Request != nil {
			row.Request.Roles = []string{"r"}
		}
		err = e.r.refuse(s, "r", number, "", now)
	default:
		return nil, false
	}
	return err, true
}

// expandRequest tries what is due for a request (stepRequest).
func (e *explorer) expandRequest(n node, try func(storeOp, func(*node))) {
	s := e.states[n.store]
	row := s.Roles["r"]
	q := row.Request
	if q == nil {
		if n.holds > 0 {
			try(storeOp{kind: "request"}, func(m *node) { m.holds-- })
		}
		return
	}
	number := uint8(q.Number)
	try(storeOp{kind: "refuse", number: number}, nil)
	for i, p := range n.procs[:e.frontends] {
		id := e.frontendID(uint8(i), p.id)
		_, hasReported := q.Reports[id]
		if p.id != 0 && p.view.registered && !hasReported && !e.reports {
			try(storeOp{kind: "report", proc: uint8(i), id: p.id, number: number, residues: p.residues, saw: p.saw}, func(m *node) {
				m.procs[i].residues = 0
				m.procs[i].saw = p.stays != [3]uint8{} && e.effect != effectStands
			})
		}
	}
	if why, _ := s.obstacle(row); why != "" {
		return
	}
	c := q.Comparison
	if c == nil || c.Found == "" {
		try(storeOp{kind: "compare", number: number}, nil)
	} else {
		try(storeOp{kind: "start", number: number}, nil)
	}
	if c != nil && c.Found == "" {
		to := 3 - backendNumber(row.Active)
		try(storeOp{kind: "compared", number: number}, func(m *node) {
			knows := c.Of.All || slices.Contains(c.Of.Users, "u")
			if knows && n.hosts.torn&(1<<to) == 0 {
				m.hosts.lacks &^= 1 << to // at this moment; write knows of what goes on
			}
		})
	}
}

// expandReport sends a report on a request, once more if it does not know that
// one has arrived, or brings it to its end. Until that comes what goes with it is
// neither in the gate nor in the store; without an answer it is in the gate
// again, and in the store perhaps some day.
func (e *explorer) expandReport(n node, i uint8, visit func(uint16, proc, string)) {
	p := n.procs[i]
	switch request := e.states[n.store].Roles["r"].Request; {
	case !e.reports:
	case p.reports != 0:
		op := e.ops[p.reports]
		p.reports = 0
		if to, ok := e.store(n.store, op); ok {
			visit(to, p, "the report of {f} arrives")
		}
		p.residues, p.saw = p.residues|op.residues, p.saw || op.saw
		visit(n.store, p, "the report of {f} fails")
		if n.lost > 0 && p.sent == 0 {
			p.sent = e.send(op)
			n.lost--
			n.procs[i] = p
			e.visit(n, step{what: "the report of {f} gets no answer", proc: i})
		}
	case request != nil && p.view.registered:
		p.reports = e.send(storeOp{kind: "report", proc: i, id: p.id, number: uint8(request.Number), residues: p.residues, saw: p.saw})
		p.residues, p.saw = 0, e.mail && p.stays != [3]uint8{} && e.effect != effectStands
		visit(n.store, p, "{f} begins its report")
	}
}
