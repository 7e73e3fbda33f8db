package integration

import (
	"slices"
	"testing"
)

// TestSafety19CutOffFromB: one of the frontends does not reach b's host. Though a
// promote hook may open b's doors, no switch begins, and nobody notices anything.
func TestSafety19CutOffFromB(t *testing.T) {
	t.Parallel()
	l, users := newLan(t), userNames(2)
	roleOf := map[string]string{users[0]: "ma01", users[1]: "ma01"}
	bhost := l.server(t)
	a, b := newRecorder(t, "a", l.server(t), roleOf), newRecorder(t, "b", bhost, roleOf)
	cluster, _ := l.etcd(t)
	s := newSite(t, distant(a.backend()), distant(b.backend()), users...).shared(cluster, "2s")
	s.hooks = ", hooks: {promote: [/bin/true], undo_promote: [/bin/true]}"
	all := l.frontends(t, s)
	first, cut := all[0], all[2]
	live := cut.as(t, users[0])
	cut.home.cut(t, bhost)

	mustFail(t, first.switchTo(t, "b"), "preflight", cut.ownID(t), "cannot reach b")
	mustAnswer(t, live)
	mustAnswer(t, cut.as(t, users[1]))
	first.mustBeOn(t, "a")

	cut.home.mend(t)
	mustOpen(t, first.switchTo(t, "b"))
	mustAnswer(t, cut.as(t, users[0]))
	onA, _ := a.records()
	onB, _ := b.records()
	if both := onBoth(slices.Concat(onA, onB), itself); len(both) > 0 || len(onA) != 2 || len(onB) != 1 {
		t.Errorf("on a %v, on b %v; on both %q", onA, onB, both)
	}
}
