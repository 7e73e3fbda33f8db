package routing

import (
	"maps"
	"slices"
	"testing"
	"time"
)

var scenarios = []scenario{
	{name: "two switches, residues", frontends: 2, holds: 2, starts: 2, unproven: true},
	{name: "crashes and late joiners", frontends: 2, holds: 2, starts: 3, crashes: 1},
	{name: "late events", frontends: 2, holds: 2, starts: 2, late: true},
	{name: "starts from disk", frontends: 2, holds: 2, starts: 2, crashes: 1, disk: true},
	{name: "registration lost", frontends: 1, holds: 2, starts: 1, fences: 1},
	{name: "registration lost, and noticed", frontends: 2, holds: 1, starts: 2, fences: 1, noticed: true},
	{name: "everything, one switch", frontends: 2, holds: 1, starts: 2, crashes: 1, unproven: true, disk: true, late: true},
	{name: "hooks", frontends: 2, holds: 1, starts: 2, crashes: 1, unproven: true, mail: true, hooks: AllHooks},
	{name: "hooks, two switches", frontends: 1, holds: 2, starts: 2, crashes: 1, unproven: true, mail: true, hooks: AllHooks},
	{name: "no way back from a promotion", frontends: 1, holds: 2, starts: 1, unproven: true, mail: true, sticks: true,
		hooks: []Hook{HookDemote, HookCatchUp, HookPromote, HookUndoDemote}},
	{name: "catch-up only", frontends: 2, holds: 1, starts: 2, crashes: 1, unproven: true, mail: true, hooks: []Hook{HookCatchUp, HookProve}},
	{name: "two drivers", frontends: 1, holds: 2, starts: 1, unproven: true, mail: true, hooks: AllHooks, drivers: true},
	{name: "failover", frontends: 1, holds: 2, starts: 2, crashes: 1, unproven: true, mail: true, hooks: AllHooks, failovers: 1},
	{name: "failover and back", frontends: 1, holds: 1, starts: 1, unproven: true, mail: true, hooks: AllHooks, failovers: 2},
	{name: "the new active dies", frontends: 1, holds: 2, starts: 1, unproven: true, mail: true, hooks: AllHooks, abandons: 1, drivers: true},
	{name: "a backend dies", frontends: 1, holds: 1, starts: 1, unproven: true, hooks: AllHooks, failovers: 1, abandons: 1, deaths: 1, sticks: true},
	{name: "a backend dies, no way back", frontends: 1, holds: 1, starts: 1, failovers: 1, abandons: 1, deaths: 1, sticks: true,
		hooks: []Hook{HookDemote, HookCatchUp, HookPromote, HookUndoDemote}},
	{name: "a hook hangs", frontends: 1, holds: 2, starts: 1, mail: true, hooks: AllHooks, orphans: 1},
	{name: "failover, two drivers", frontends: 1, holds: 1, starts: 1, unproven: true, mail: true, hooks: AllHooks, failovers: 1, drivers: true},
	{name: "the store is away", frontends: 2, holds: 2, starts: 2, unproven: true, lost: 1},
	{name: "comparison", frontends: 2, holds: 2, starts: 2, unproven: true, mail: true, hooks: []Hook{HookCatchUp}, requests: true},
	{name: "reports under way", frontends: 2, holds: 1, starts: 2, unproven: true, requests: true, reports: true, lost: 1},
	{name: "leases", frontends: 2, holds: 1, starts: 2, unproven: true, hooks: AllHooks, leases: 1, stops: 1},
	{name: "leases, a machine is paused", frontends: 2, holds: 1, starts: 2, hooks: AllHooks, leases: 1, stops: 1, paused: true},
}

// mutations lists what safety rests on, and where it is missed.
func mutations() []mutation {
	list := []mutation{
		{effectLeave, "", "two switches, residues"},
		{effectAck, "", "two switches, residues"},
		{effectGoodbye, "", "two switches, residues"},
		{effectBury, "", "crashes and late joiners"},
		{effectEpoch, "", "two switches, residues"},
		{effectInherit, "", "two switches, residues"},
		{effectOlder, "", "late events"},
		{effectFloors, "", "registration lost, and noticed"},
		{effectOffline, "", "starts from disk"},
		{effectProven, "", "two switches, residues"},
		{effectStops, "", "hooks"},
		{effectStops, "", "leases"},
		{effectStep, "", "failover, two drivers"},
		{effectRan, "", "hooks"},
		{effectUndo, "", "hooks"},
		{effectAckSeen, "", "hooks"},
		{effectByeSeen, "", "hooks"},
		{effectBurySeen, "", "hooks"},
		{effectAckEpoch, "", "the store is away"},
		{effectStands, "", "comparison"},
		{effectCompared, "", "comparison"},
		{effectFailover, "", "failover"},
		{effectEntry, "", "leases"},
		{effectMargin, "", "leases"},
		{effectNoWay, "", "no way back from a promotion"},
		{effectReopen, "", "the store is away"},
		{effectTakeOver, "", "a backend dies"},
		{effectResume, "", "no way back from a promotion"},
		{effectAbandon, "", "a backend dies, no way back"},
		{effectOrphan, "", "a hook hangs"},
		{effectFirst, "", "hooks"},
		{effectFirstUndo, "", "hooks"},
		{effectShared, "", "two switches, residues"},
	}
	on := map[string]string{
		openGuards[0].name:            "two switches, residues",
		openGuards[1].name:            "two switches, residues",
		admitGuards[0].name:           "crashes and late joiners",
		admitGuards[1].name:           "two switches, residues",
		admitGuards[2].name:           "registration lost",
		ackGuards[0].name:             "two switches, residues",
		ackGuards[1].name:             "starts from disk",
		ackGuards[2].name:             "reports under way",
		holdGuards[1].name:            "hooks, two switches",
		"the new active is not stale": "failover",
	}
	for _, name := range slices.Sorted(maps.Keys(on)) {
		list = append(list, mutation{name, name, on[name]})
	}
	return list
}

func TestExplorer(t *testing.T) {
	for _, sc := range scenarios {
		t.Run(sc.name, func(t *testing.T) {
			t.Parallel()
			begin := time.Now()
			e := explore(sc, mutation{})
			t.Logf("%d states of the world, %d of the store, %v", len(e.order), len(e.states), time.Since(begin).Round(time.Millisecond))
			if e.violated >= 0 {
				t.Errorf("%s: %s", e.fault, e.trace())
			}
		})
	}
}

// Each guard is needed: without it the search finds a violation.
func TestExplorerMissesEachGuard(t *testing.T) {
	for _, m := range mutations() {
		t.Run(m.name, func(t *testing.T) {
			t.Parallel()
			for _, sc := range scenarios {
				if sc.name != m.on {
					continue
				}
				e := explore(sc, m)
				if e.violated < 0 {
					t.Fatalf("%d states without the guard, and no fault: the guard or the explorer is wrong", len(e.order))
				}
				t.Logf("after %d states, %s: %s", len(e.order), e.fault, e.trace())
			}
		})
	}
}
