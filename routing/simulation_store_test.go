package routing

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"sync"
	"time"
)

// The simulated store: the table of memstore_test.go, behind a network that
// delays, loses requests and answers, and is cut; with leases and an election.

var (
	errSimAway       = errors.New("the store is away")
	errSimUnanswered = errors.New("no answer from the store: whether it was done is not known")
)

// simLink is the way from one host to the store.
type simLink struct {
	mu     sync.Mutex
	dice   *rand.Rand
	slow   time.Duration // a message takes up to this
	lossy  bool          // one in six gets lost
	isCut  bool
	mended chan struct{} // closed when it is not cut any more
}

func (l *simLink) set(slow time.Duration, lossy, isCut bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.slow, l.lossy = slow, lossy
	if isCut != l.isCut {
		l.isCut = isCut
		if isCut {
			l.mended = make(chan struct{})
		} else {
			close(l.mended)
		}
	}
}

// carry takes one message over; false if it did not arrive.
func (l *simLink) carry(ctx context.Context, patience time.Duration) bool {
	l.mu.Lock()
	slow, isLost := upTo(l.dice, l.slow), l.lossy && oneIn(l.dice, 6)
	l.mu.Unlock()
	if !pause(ctx, slow) {
		return false
	}
	l.mu.Lock()
	isCut, mended := l.isCut, l.mended
	l.mu.Unlock()
	if isLost {
		pause(ctx, patience)
		return false
	}
	if !isCut {
		return true
	}
	timer := time.NewTimer(patience)
	defer timer.Stop()
	select {
	case <-mended:
		return true
	case <-timer.C:
	case <-ctx.Done():
	}
	return false
}

func (l *simLink) roll(n int) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	return oneIn(l.dice, n)
}

// simLife is what the store knows of an ID that has joined.
type simLife struct {
	store    *simStore
	expires  time.Time // its lease, by the store's clock
	isBuried bool      // leased: others were told that it has ended
}

// simCluster is the store itself.
type simCluster struct {
	s    *simulation
	site *memSite

	mu     sync.Mutex
	isAway bool
	lives  map[string]*simLife
	office *simStore // who drives
}

func newSimCluster(s *simulation) *simCluster {
	return &simCluster{s: s, site: newMemSite(), lives: make(map[string]*simLife)}
}

// setAway stops the store, or starts it again: leases count anew then.
func (c *simCluster) setAway(isAway bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.isAway = isAway
	for _, l := range c.lives {
		if now := time.Now(); !isAway && !l.isBuried && l.expires.After(now.Add(-simLease)) {
			l.expires = now.Add(simLease)
		}
	}
}

// isAliveLocked says whether a store's lease runs.
func (c *simCluster) isAliveLocked(st *simStore) bool {
	for _, l := range c.lives {
		if l.store == st && time.Now().Before(l.expires) {
			return true
		}
	}
	return false
}

// owner is the store of the process that joined as id.
func (c *simCluster) owner(id string) *simStore {
	c.mu.Lock()
	defer c.mu.Unlock()
	if l := c.lives[id]; l != nil {
		return l.store
	}
	return nil
}

// usurp makes the store forget who drives: for a while there may be two.
func (c *simCluster) usurp() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.office = nil
}

// simStore is one process's access.
type simStore struct {
	*simCluster
	proc *simProcess
	link *simLink
	mem  *memStore
	skew time.Duration // of its clock, over one lease

	own       sync.Mutex
	ids       []string // joined, and not said to have ended
	renewed   time.Time
	endOffice func()
	closed    context.Context
	close     context.CancelFunc
}

func newSimStore(p *simProcess, dice *rand.Rand) *simStore {
	st := &simStore{simCluster: p.host.s.cluster, proc: p, link: p.host.link, mem: p.host.s.cluster.site.open(),
		skew: upTo(dice, 2*simMargin) - simMargin}
	st.closed, st.close = context.WithCancel(p.life)
	return st
}

// call is one round trip. What has been sent is done even if nobody waits for
// the answer any more.
func (st *simStore) call(ctx context.Context, do func() error) error {
	ctx, cancel := context.WithTimeout(ctx, simPatience)
	defer cancel()
	if !st.proc.awake(ctx) {
		return errSimUnanswered
	}
	arrived := st.link.carry(ctx, simPatience) || ctx.Err() != nil && st.link.roll(3)
	st.mu.Lock()
	isAway := st.isAway
	st.mu.Unlock()
	if !arrived || isAway {
		return errSimAway
	}
	if err := do(); err != nil {
		return err
	}
	if !st.link.carry(ctx, simPatience) || !st.proc.awake(ctx) {
		return errSimUnanswered
	}
	return nil
}

func (st *simStore) Load(ctx context.Context) (state *State, err error) {
	err = st.call(ctx, func() error { state = st.site.get(); return nil })
	return state, err
}

func (st *simStore) Update(ctx context.Context, change func(*State) error) (state *State, err error) {
	stale := st.site.get()
	err = st.call(ctx, func() error {
		if st.link.roll(2) {
			_ = change(stale.Clone()) // somebody else was faster
		}
		state, err = st.mem.Update(context.WithoutCancel(ctx), func(now *State) error {
			before := now.Clone()
			if err := change(now); err != nil {
				return err
			}
			if word, ok := ctx.Value(simWord{}).(func(*State) error); ok {
				return word(before)
			}
			return nil
		})
		return err
	})
	if err != nil {
		return nil, err
	}
	return state, nil
}

// Watch sends what it reads a moment later, when it may be old.
func (st *simStore) Watch(ctx context.Context) <-chan *State {
	out := make(chan *State)
	go func() {
		defer close(out)
		for ctx.Err() == nil {
			st.site.mu.Lock()
			state, changed := st.site.state, st.site.changed
			st.site.mu.Unlock()
			if !st.link.carry(ctx, simPatience) || !st.proc.awake(ctx) {
				continue // and reads again
			}
			select {
			case out <- state:
			case <-ctx.Done():
			}
			select {
			case <-changed:
			case <-ctx.Done():
			}
		}
	}()
	return out
}

func (st *simStore) Join(ctx context.Context, id string) error {
	sent := time.Now()
	err := st.call(ctx, func() error {
		st.mu.Lock()
		defer st.mu.Unlock()
		if l := st.lives[id]; l != nil && (l.store != st || l.isBuried) {
			return fmt.Errorf("frontend ID %s was used before", id)
		}
		st.lives[id] = &simLife{store: st, expires: time.Now().Add(simLease)}
		return nil
	})
	if err != nil {
		return err
	}
	st.own.Lock()
	defer st.own.Unlock()
	isFirst := st.renewed.IsZero()
	st.ids, st.renewed = append(st.ids, id), sent
	if isFirst {
		st.s.running.Go(st.stayAlive)
	}
	return nil
}

// stayAlive renews the lease until the store is closed.
func (st *simStore) stayAlive() {
	wait := simLease / 3
	for pause(st.closed, wait) {
		wait = simLease / 3
		ctx, cancel := context.WithTimeout(st.closed, simLease/3)
		if err := st.renew(ctx); err != nil {
			wait = simLease / 20
		}
		cancel()
	}
	st.leaveOffice()
}

func (st *simStore) renew(ctx context.Context) error {
	sent := time.Now()
	var ended []string
	isLost, inOffice := false, false
	err := st.call(ctx, func() error {
		st.mu.Lock()
		defer st.mu.Unlock()
		for id, l := range st.lives {
			switch {
			case l.store != st:
			case l.isBuried:
				ended = append(ended, id)
			default:
				isLost = isLost || time.Now().After(l.expires)
				l.expires = time.Now().Add(simLease)
			}
		}
		inOffice = st.office == st
		return nil
	})
	st.own.Lock()
	defer st.own.Unlock()
	if err == nil {
		st.ids = slices.DeleteFunc(st.ids, func(id string) bool { return slices.Contains(ended, id) })
		if len(st.ids) > 0 {
			st.renewed = sent
		}
	}
	if st.endOffice != nil && (err == nil && (isLost || !inOffice) || time.Since(st.renewed) > simLease) {
		st.endOffice()
		st.endOffice = nil
	}
	return err
}

func (st *simStore) Deadline() time.Time {
	if !st.s.leased {
		return time.Time{}
	}
	st.own.Lock()
	defer st.own.Unlock()
	return st.renewed.Add(simLease - simMargin + st.skew)
}

// Gone knows the flocks of its own host; with fencing by leases, those that
// have run out, too.
func (st *simStore) Gone(ctx context.Context, ids []string) (gone []string, err error) {
	err = st.call(ctx, func() error {
		st.mu.Lock()
		defer st.mu.Unlock()
		for _, id := range ids {
			l := st.lives[id]
			if l == nil || time.Now().Before(l.expires) || l.store == st && !l.isBuried {
				continue
			}
			if st.s.leased {
				l.isBuried = true
			}
			if st.s.leased || l.store.proc.host == st.proc.host && l.store.proc.life.Err() != nil {
				gone = append(gone, id)
			}
		}
		return nil
	})
	return gone, err
}

func (st *simStore) Alive(ctx context.Context, ids []string) (alive []string, err error) {
	err = st.call(ctx, func() error {
		st.mu.Lock()
		defer st.mu.Unlock()
		for _, id := range ids {
			if l := st.lives[id]; l != nil && time.Now().Before(l.expires) {
				alive = append(alive, id)
			}
		}
		return nil
	})
	return alive, err
}

func (st *simStore) Campaign(ctx context.Context) (context.Context, func(), error) {
	for {
		won := false
		err := st.call(ctx, func() error {
			st.mu.Lock()
			defer st.mu.Unlock()
			if st.office == nil || !st.isAliveLocked(st.office) {
				st.office = st
			}
			won = st.office == st
			return nil
		})
		if err == nil && won {
			st.s.note("%s drives", st.proc.host.name)
			office, end := context.WithCancel(context.Background())
			st.own.Lock()
			st.endOffice = end
			st.own.Unlock()
			return office, st.leaveOffice, nil
		}
		if !pause(ctx, 700*time.Millisecond) {
			return nil, nil, ctx.Err()
		}
	}
}

func (st *simStore) leaveOffice() {
	st.own.Lock()
	end := st.endOffice
	st.endOffice = nil
	st.own.Unlock()
	if end != nil {
		end()
	}
	st.link.mu.Lock()
	isCut := st.link.isCut
	st.link.mu.Unlock()
	st.mu.Lock()
	defer st.mu.Unlock()
	if st.office == st && !isCut && !st.isAway {
		st.office = nil
	}
}

// Close gives the lease back if the store can be reached.
func (st *simStore) Close() error {
	err := st.call(context.Background(), func() error {
		st.mu.Lock()
		defer st.mu.Unlock()
		for _, l := range st.lives {
			if l.store == st {
				l.expires = time.Now()
			}
		}
		return nil
	})
	st.close()
	return err
}
