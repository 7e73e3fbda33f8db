package routing

import (
	"context"
	"fmt"
	"hash/fnv"
	"math/rand/v2"
	"os"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"
)

// The simulation runs whole frontends (real Tables) in virtual time against a
// store, a network, backends, hooks and operators that misbehave at random, and
// looks whether a user ever has work on two backends (I1). Where the explorer
// searches every order of few steps, this has clocks, timeouts, retries and
// answers that get lost. The faults end after a while; then every role must open
// again and let users in.
//
// A seed is one run. The same seed gives the same faults at the same times, but
// for the order of what happens at one instant, which is the scheduler's.
const (
	simSeedEnv  = "POSTHOUSE_SIM_SEED"  // run this seed alone, and print its trace
	simSeedsEnv = "POSTHOUSE_SIM_SEEDS" // how many seeds are run

	simSeeds = 800
	simChunk = 50
)

// Times of the simulated site.
const (
	simFaults   = 70 * time.Second // for how long there are faults
	simRecovery = 5 * time.Minute  // within which all is well afterwards
	simLease    = 10 * time.Second
	simMargin   = time.Second // by which clocks may differ
	simDrain    = 3 * time.Second
	simPatience = 5 * time.Second // for an answer of the store
	simWork     = 50 * time.Second
	simMaxAge   = 60 * time.Second // residue_max_age: above simWork, else the assumption would not hold
)

// simulation is one run.
type simulation struct {
	seed    uint64
	without string // the guard that is taken away
	leased  bool   // fencing
	scope   Scope  // of the hooks
	opt     Options
	cluster *simCluster
	hosts   []*simHost
	begun   time.Time
	running sync.WaitGroup // everything but the tables' own

	// mu guards all below. It may be taken within the store's lock.
	mu       sync.Mutex
	trace    []string
	wrong    []string // what should not have happened
	on       map[string]map[string]int
	backends map[string]*simBackend
	isTwice  bool // a user had work on two backends
}

// dice are an actor's own, so that actors do not disturb each other's.
func (s *simulation) dice(actor string) *rand.Rand {
	h := fnv.New64a()
	h.Write([]byte(actor))
	return rand.New(rand.NewPCG(s.seed, h.Sum64()))
}

// upTo is a random time below d, to the nanosecond: few things happen at once.
func upTo(dice *rand.Rand, d time.Duration) time.Duration {
	return time.Duration(dice.Int64N(int64(d)))
}

func oneIn(dice *rand.Rand, n int) bool { return dice.IntN(n) == 0 }

func (s *simulation) note(format string, args ...any) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.noteLocked(format, args...)
}

func (s *simulation) noteLocked(format string, args ...any) {
	s.trace = append(s.trace, fmt.Sprintf("%9.3f ", time.Since(s.begun).Seconds())+fmt.Sprintf(format, args...))
}

// fault notes what should not have happened.
func (s *simulation) fault(format string, args ...any) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.faultLocked(format, args...)
}

func (s *simulation) faultLocked(format string, args ...any) {
	s.noteLocked("WRONG: "+format, args...)
	s.wrong = append(s.wrong, fmt.Sprintf(format, args...))
}

func (s *simulation) isActiveTwice() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.isTwice
}

func newSimulation(seed uint64, without string) *simulation {
	s := &simulation{seed: seed, without: without, begun: time.Now(), on: make(map[string]map[string]int), backends: make(map[string]*simBackend)}
	dice := s.dice("site")
	s.leased = oneIn(dice, 2)
	s.cluster = newSimCluster(s)
	s.opt = Options{
		Directory:    newMemDirectory(map[string]string{"alice": "ma01", "bob": "ma01", "carol": "ma02"}),
		DrainTimeout: simDrain,
		Backends:     map[string]map[string]string{},
		Reach:        s.reach,
		Roles:        map[string]RoleConfig{},
	}
	if !oneIn(dice, 4) {
		s.opt.ResidueMaxAge = simMaxAge
	}
	for _, b := range []string{"a", "b", "c"} {
		s.opt.Backends[b] = map[string]string{"imap": b + ":143"}
		s.backends[b] = newSimBackend()
	}
	hooks := s.drawHooks(dice)
	s.scope = []Scope{ScopeRole, ScopeBackend}[dice.IntN(2)]
	for i, role := range []string{"ma01", "ma02"} {
		c := RoleConfig{Members: []string{"a", "b", "c"}[:2+dice.IntN(2)], Active: []string{"a", "b"}[i*dice.IntN(2)], Hooks: hooks, Scope: s.scope}
		s.opt.Roles[role] = c
		for name, b := range s.backends {
			of := s.partOf(role)
			b.serves[of] = b.serves[of] || name == c.Active || !slices.Contains(hooks, HookPromote)
		}
	}
	for i := range 2 + dice.IntN(2) {
		s.hosts = append(s.hosts, newSimHost(s, fmt.Sprintf("f%d", i)))
	}
	s.note("leased %v, hooks %v, scope %s, residues age %v", s.leased, hooks, s.scope, s.opt.ResidueMaxAge > 0)
	return s
}

// drawHooks draws what hooks the site has. What can stop a backend can start it
// too; fencing by leases needs what stops one.
func (s *simulation) drawHooks(dice *rand.Rand) []Hook {
	var hooks []Hook
	if s.leased || oneIn(dice, 2) {
		hooks = []Hook{HookDemote, HookPromote, HookUndoDemote, HookRejoin}
		for _, h := range []Hook{HookCatchUp, HookUndoPromote} {
			if oneIn(dice, 2) {
				hooks = append(hooks, h)
			}
		}
		if s.leased || oneIn(dice, 2) {
			hooks = append(hooks, HookFence)
		}
	}
	if oneIn(dice, 2) {
		hooks = append(hooks, HookProve)
	}
	return hooks
}

// run plays the run to its end.
func (s *simulation) run() {
	s.cluster.site.observe(s.committed)
	for _, h := range s.hosts {
		h.start()
	}
	users, logOut := context.WithCancel(context.Background())
	for i := range 6 {
		s.running.Go(func() { s.user(users, []string{"alice", "bob", "carol"}[i%3], i) })
	}
	mischief, heal := context.WithTimeout(context.Background(), simFaults)
	var faults sync.WaitGroup
	for _, h := range s.hosts {
		faults.Go(func() { h.troubleLink(mischief) })
		faults.Go(func() { h.troubleProcess(mischief) })
		faults.Go(func() { h.troubleDisk(mischief) })
	}
	faults.Go(func() { s.troubleSite(mischief) })
	faults.Go(func() { s.operator(mischief) })
	faults.Wait()
	heal()
	s.note("all faults have ended")
	s.recovers()
	logOut()
	for _, h := range s.hosts {
		h.stopAll()
	}
	s.running.Wait()
}

// committed notes what changes in the store. Nothing here makes the store go
// back, so that nothing may be in doubt.
func (s *simulation) committed(old, now *State) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, e := range changes(old, now) {
		s.noteLocked("store: %s %s epoch %d, %s to %s; %s %s", e.Kind, e.Role, e.Epoch, e.Backend, e.To, e.Frontend, e.Text)
		if e.Kind == EventDoubt {
			s.faultLocked("role %s is in doubt: %s", e.Role, e.Text)
		}
	}
	for _, id := range sortedKeys(now.Frontends) {
		if _, was := old.Frontends[id]; !was {
			s.noteLocked("store: %s is registered", id)
		}
	}
	for _, id := range sortedKeys(old.Frontends) {
		if _, is := now.Frontends[id]; !is {
			s.noteLocked("store: %s is registered no more", id)
		}
	}
}

// simulate runs one seed without one of the guards, if without is not empty.
func simulate(t *testing.T, seed uint64, without string) *simulation {
	var s *simulation
	synctest.Test(t, func(*testing.T) {
		s = newSimulation(seed, without)
		s.run()
	})
	return s
}

func TestSimulation(t *testing.T) {
	if seed, err := strconv.ParseUint(os.Getenv(simSeedEnv), 10, 64); err == nil {
		s := simulate(t, seed, "")
		t.Log(strings.Join(s.trace, "\n"))
		for _, w := range s.wrong {
			t.Error(w)
		}
		return
	}
	seeds := uint64(simSeeds)
	if n, err := strconv.ParseUint(os.Getenv(simSeedsEnv), 10, 64); err == nil {
		seeds = n
	}
	for first := uint64(1); first <= seeds; first += simChunk {
		t.Run(fmt.Sprintf("from seed %d", first), func(t *testing.T) {
			t.Parallel()
			for seed := first; seed < first+simChunk && seed <= seeds; seed++ {
				t.Run(fmt.Sprint(seed), func(t *testing.T) { // named by -v even if it panics
					if s := simulate(t, seed, ""); len(s.wrong) > 0 {
						t.Errorf("seed %d (again: %s=%d go test -run TestSimulation ./routing):\n%s\n%s",
							seed, simSeedEnv, seed, strings.Join(s.trace, "\n"), strings.Join(s.wrong, "\n"))
					}
				})
			}
		})
	}
}
