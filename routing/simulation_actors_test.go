package routing

import (
	"context"
	"fmt"
	"math/rand/v2"
	"sync"
	"time"
)

// Frontends and users of the simulation, and what befalls them.

// simHost is a machine with its state directory; one or two frontends run on it.
type simHost struct {
	s     *simulation
	name  string
	local *memLocal
	link  *simLink
	dice  *rand.Rand // of its processes' lives

	mu    sync.Mutex
	procs []*simProcess // that run, the newest last
}

func newSimHost(s *simulation, name string) *simHost {
	return &simHost{s: s, name: name, local: newMemLocal(), dice: s.dice(name),
		link: &simLink{dice: s.dice(name + " link"), slow: 3 * time.Millisecond}}
}

// simProcess is one frontend.
type simProcess struct {
	host  *simHost
	table *Table
	store *simStore
	life  context.Context // ends with the process
	end   context.CancelFunc

	mu        sync.Mutex
	running   chan struct{} // closed while it is not stopped by SIGSTOP
	isLeaving bool
	leaving   chan struct{} // closed when its sessions are to end
	sessions  sync.WaitGroup
}

// start starts a frontend, as systemd does: again and again until one runs.
func (h *simHost) start() {
	for {
		p := &simProcess{host: h, running: make(chan struct{}), leaving: make(chan struct{})}
		close(p.running)
		p.life, p.end = context.WithCancel(context.Background())
		p.store = newSimStore(p, h.dice)
		opt := h.s.opt
		opt.ID, opt.Store, opt.Local, opt.Hooks = NewID(h.name), p.store, h.local, &simHooks{p, h.s.dice(h.name + " hooks")}
		var err error
		if p.table, err = startWithout(opt, h.s.without); err == nil {
			h.s.note("%s runs as %s", h.name, opt.ID)
			h.mu.Lock()
			h.procs = append(h.procs, p)
			h.mu.Unlock()
			return
		}
		h.s.note("%s does not start: %v", h.name, err)
		p.end()
		time.Sleep(time.Second)
	}
}

// startWithout is Start, for a Table that lacks a guard.
func startWithout(opt Options, guard string) (*Table, error) {
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	defer cancel()
	if guard == "" {
		return Start(ctx, opt)
	}
	t, kept, err := newTable(opt)
	if err != nil {
		return nil, err
	}
	t.rules.without = guard
	fresh, err := t.enrol(ctx, opt.ID, kept, nil)
	if err != nil {
		return nil, err
	}
	state, doubts := merge(kept, fresh)
	t.view.Store(newView(state, doubts, 0))
	var run context.Context
	run, t.stop = context.WithCancel(context.Background())
	for _, what := range []func(context.Context){t.follow, t.keep, t.drive, t.announce, t.heedDeadline, t.answerRequests, t.buryGone} {
		t.running.Go(func() { what(run) })
	}
	t.wakeKeeper()
	return t, nil
}

// newest is the process that gets the host's new connections; nil if none runs.
func (h *simHost) newest() *simProcess {
	h.mu.Lock()
	defer h.mu.Unlock()
	if len(h.procs) == 0 {
		return nil
	}
	return h.procs[len(h.procs)-1]
}

// take takes the oldest process off the list of those that run.
func (h *simHost) take() *simProcess {
	h.mu.Lock()
	defer h.mu.Unlock()
	if len(h.procs) == 0 {
		return nil
	}
	p := h.procs[0]
	h.procs = h.procs[1:]
	return p
}

func (s *simulation) anyProcess(dice *rand.Rand) *simProcess {
	return s.hosts[dice.IntN(len(s.hosts))].newest()
}

// awake waits while the process is stopped; false if ctx or its life ends.
func (p *simProcess) awake(ctx context.Context) bool {
	p.mu.Lock()
	running := p.running
	p.mu.Unlock()
	select {
	case <-running:
		return p.life.Err() == nil
	case <-p.life.Done():
	case <-ctx.Done():
	}
	return false
}

// sleep is SIGSTOP, and SIGCONT when ctx ends or d is over. What the Table does
// by itself meanwhile nobody sees: nothing comes in or goes out.
func (p *simProcess) sleep(ctx context.Context, d time.Duration) {
	running := make(chan struct{})
	p.mu.Lock()
	p.running = running
	p.mu.Unlock()
	p.host.s.note("%s is stopped for %v", p.table.ID(), d)
	pause(ctx, d)
	p.host.s.note("%s runs on", p.table.ID())
	close(running)
}

// kill is kill -9: the sessions' work goes on at the backends.
func (p *simProcess) kill() {
	p.host.s.note("%s is killed", p.table.ID())
	p.end()
	p.table.stop()
	p.table.running.Wait()
	p.store.close()
}

// stop ends a frontend in good order, and what does not end in time.
func (p *simProcess) stop() {
	p.host.s.note("%s stops", p.table.ID())
	p.mu.Lock()
	p.isLeaving = true
	p.mu.Unlock()
	close(p.leaving)
	p.sessions.Wait() // each is bounded by simDrain
	ctx, cancel := context.WithTimeout(context.Background(), 2*simPatience)
	defer cancel()
	if err := p.table.Close(ctx); err != nil {
		p.host.s.note("%s: %v", p.table.ID(), err)
	}
	if err := p.table.Check(); err != nil {
		p.host.s.fault("%s: %v", p.table.ID(), err)
	}
	p.store.Close()
	p.end()
}

func (h *simHost) stopAll() {
	for p := h.take(); p != nil; p = h.take() {
		p.stop()
	}
}

// troubleProcess kills, stops, upgrades and restarts frontends until ctx ends;
// then one runs.
func (h *simHost) troubleProcess(ctx context.Context) {
	dice := h.s.dice(h.name + " process")
	for pause(ctx, 3*time.Second+upTo(dice, 40*time.Second)) {
		p := h.newest()
		switch dice.IntN(5) {
		case 0, 1:
			h.take()
			p.kill()
			pause(ctx, upTo(dice, 15*time.Second))
			h.start()
		case 2:
			h.take()
			p.stop()
			pause(ctx, upTo(dice, 5*time.Second))
			h.start()
		case 3: // an upgrade
			h.start()
			h.take().stop()
		case 4:
			p.sleep(ctx, upTo(dice, 30*time.Second))
			if oneIn(dice, 4) {
				h.take()
				p.kill()
				h.start()
			}
		}
	}
}

// troubleLink slows and cuts the way to the store until ctx ends.
func (h *simHost) troubleLink(ctx context.Context) {
	dice := h.s.dice(h.name + " network")
	for pause(ctx, upTo(dice, 30*time.Second)) {
		d := upTo(dice, 20*time.Second)
		switch dice.IntN(3) {
		case 0:
			h.s.note("%s is cut off for %v", h.name, d)
			h.link.set(3*time.Millisecond, false, true)
		case 1:
			h.s.note("%s has a lossy network for %v", h.name, d)
			h.link.set(500*time.Millisecond, true, false)
		case 2:
			h.link.set(time.Second, false, false)
		}
		pause(ctx, d)
		h.link.set(3*time.Millisecond, false, false)
	}
}

// troubleDisk fills the disk for a while.
func (h *simHost) troubleDisk(ctx context.Context) {
	dice := h.s.dice(h.name + " disk")
	for pause(ctx, 20*time.Second+upTo(dice, 100*time.Second)) {
		h.s.note("the disk of %s is full", h.name)
		h.local.setFull(true)
		pause(ctx, upTo(dice, 10*time.Second))
		h.local.setFull(false)
	}
}

// user logs in and out until ctx ends, now here, now there.
func (s *simulation) user(ctx context.Context, name string, device int) {
	dice := s.dice(fmt.Sprint("user ", device))
	for pause(ctx, upTo(dice, 6*time.Second)) {
		if p := s.anyProcess(dice); p != nil && p.begins() {
			p.session(ctx, name, dice)
			p.sessions.Done()
		}
	}
}

func (p *simProcess) begins() bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.isLeaving || p.life.Err() != nil {
		return false
	}
	p.sessions.Add(1)
	return true
}

// session is one session, as proxy has it: enter, connect, check, splice, drain,
// leave.
func (p *simProcess) session(ctx context.Context, user string, dice *rand.Rand) {
	entering, cancel := context.WithCancel(ctx)
	defer cancel()
	defer context.AfterFunc(p.life, cancel)()
	stay, err := p.table.Enter(entering, user)
	if err != nil || !p.awake(p.life) {
		return
	}
	pause(p.life, upTo(dice, 200*time.Millisecond))
	if !p.awake(p.life) {
		return
	}
	v := p.host.s.open(p, stay)
	if v == nil { // the backend refuses
		stay.Leave(End{Proven: true})
		return
	}
	if pause(p.life, upTo(dice, 100*time.Millisecond)) && p.awake(p.life) && stay.Check() == nil {
		splice := time.NewTimer(upTo(dice, 25*time.Second))
		defer splice.Stop()
		select {
		case <-stay.Revoked():
		case <-splice.C:
		case <-v.over:
		case <-p.leaving:
		case <-ctx.Done():
		case <-p.life.Done():
		}
	}
	p.drain(stay, v, dice)
}

// drain ends a session. What was sent to the backend is done there; sometimes
// nobody waits for that.
func (p *simProcess) drain(stay *Stay, v *simVisit, dice *rand.Rand) {
	s := p.host.s
	pause(p.life, upTo(dice, simDrain))
	switch {
	case !p.awake(p.life):
		s.haunt(v, upTo(dice, simWork))
	case oneIn(dice, 6) && !s.isWell():
		s.haunt(v, upTo(dice, simWork))
		stay.Leave(End{Why: "reset"})
	default:
		s.shut(v)
		stay.Leave(End{Proven: true})
	}
}
