package routing

import "slices"

// Where no way leads on, in the explorer: a switch may take long, wait for its
// operator, and lose either backend, but there is a way to its end.

// findWedge looks for a state from which no way leads to an open role.
func (e *explorer) findWedge() {
	e.ways = append(e.ways, int32(len(e.edges)))
	ends := make([]int32, len(e.order)+1) // of the edges to each node, in back
	for _, to := range e.edges {
		ends[to]++
	}
	for i := range e.order {
		ends[i+1] += ends[i]
	}
	back := make([]int32, len(e.edges))
	for from := range e.order {
		for _, to := range e.edges[e.ways[from]:e.ways[from+1]] {
			ends[to]--
			back[ends[to]] = int32(from)
		}
	}
	var reached []int32
	hasWay := make([]bool, len(e.order))
	for i, n := range e.order {
		if e.states[n.store].Roles["r"].Phase == PhaseOpen {
			hasWay[i] = true
			reached = append(reached, int32(i))
		}
	}
	for len(reached) > 0 {
		at := reached[len(reached)-1]
		reached = reached[:len(reached)-1]
		for _, from := range back[ends[at]:ends[at+1]] {
			if !hasWay[from] {
				hasWay[from] = true
				reached = append(reached, from)
			}
		}
	}
	if i := slices.Index(hasWay, false); i >= 0 {
		e.violated, e.fault = int32(i), "no way leads to an open role"
	}
}
