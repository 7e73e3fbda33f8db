package routing

import "testing"

// Guards whose absence the simulation finds with the first seeds: it can fail.
// Those of an OPEN are not among them, since the driver asks for the same before
// it tries one (decide); the explorer has all.
var simulatedGuards = []string{
	admitGuards[1].name,
	ackGuards[0].name,
}

const simGuardSeeds = 300

func TestSimulationMissesGuards(t *testing.T) {
	for _, guard := range simulatedGuards {
		t.Run(guard, func(t *testing.T) {
			t.Parallel()
			for seed := uint64(1); seed <= simGuardSeeds; seed++ {
				if s := simulate(t, seed, guard); s.isActiveTwice() {
					t.Logf("seed %d: %s", seed, s.wrong[0])
					return
				}
			}
			t.Errorf("%d seeds without the guard, and nobody had work on two backends", simGuardSeeds)
		})
	}
}
