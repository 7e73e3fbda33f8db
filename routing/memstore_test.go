package routing

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"time"
)

// memSite is a store in memory, shared by the memStores of several "processes".
type memSite struct {
	mu      sync.Mutex
	state   *State
	changed chan struct{}
	used    map[string]*memStore // every ID ever joined
	driving chan struct{}        // capacity 1: full while somebody drives
	broken  error                // if set, all calls fail with it
	silent  bool                 // the next Update is done, and its answer gets lost
	// onUpdate, if set, is called before each Update commits.
	onUpdate func(old, now *State)
	// late, if set, says what the answer to an Update has to wait for.
	late func(now *State) <-chan struct{}
}

func newMemSite() *memSite {
	return &memSite{state: emptyState(), changed: make(chan struct{}), used: make(map[string]*memStore), driving: make(chan struct{}, 1)}
}

func emptyState() *State {
	return &State{Roles: map[string]Row{}, Frontends: map[string]Frontend{}, Overrides: map[string]string{}, Backends: map[string]map[string]string{}}
}

// memStore is one process's access.
type memStore struct {
	site     *memSite
	isGone   bool
	deadline time.Time // what Deadline says
	release  func()    // of a campaign that was won
	// isDeposed: somebody else may win, and this one does not hear of it.
	isDeposed atomic.Bool
}

func (m *memSite) open() *memStore { return &memStore{site: m} }

// replace is a disaster: the store's content is another one from now on.
func (m *memSite) replace(s *State) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.state = s
	close(m.changed)
	m.changed = make(chan struct{})
}

func (m *memSite) get() *State {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.state
}

// observe calls f before each Update commits.
func (m *memSite) observe(f func(old, now *State)) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.onUpdate = f
}

func (m *memSite) fail(err error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.broken = err
}

func (s *memStore) Join(_ context.Context, id string) error {
	s.site.mu.Lock()
	defer s.site.mu.Unlock()
	if s.site.used[id] != nil {
		return fmt.Errorf("frontend ID %s was used before", id)
	}
	s.site.used[id] = s
	return s.site.broken
}

func (s *memStore) Load(context.Context) (*State, error) {
	s.site.mu.Lock()
	defer s.site.mu.Unlock()
	return s.site.state, s.site.broken
}

func (s *memStore) Update(ctx context.Context, change func(*State) error) (*State, error) {
	m := s.site
	m.mu.Lock()
	late := m.late
	m.mu.Unlock()
	now, err := s.commit(ctx, change)
	if err == nil && late != nil {
		if arrives := late(now); arrives != nil {
			<-arrives
		}
	}
	return now, err
}

func (s *memStore) commit(ctx context.Context, change func(*State) error) (*State, error) {
	m := s.site
	m.mu.Lock()
	defer m.mu.Unlock()
	if err := errors.Join(m.broken, ctx.Err()); err != nil {
		return nil, err
	}
	private := m.state.Clone()
	if err := change(private); err != nil {
		return nil, err
	}
	next := private.Clone()
	next.Revision = m.state.Revision + 1
	if m.onUpdate != nil {
		m.onUpdate(m.state, next)
	}
	m.state = next
	close(m.changed)
	m.changed = make(chan struct{})
	if m.silent {
		m.silent = false
		return nil, errors.New("whether it was done is not known")
	}
	return next, nil
}

func (s *memStore) Watch(ctx context.Context) <-chan *State {
	out := make(chan *State)
	go func() {
		defer close(out)
		for {
			s.site.mu.Lock()
			state, changed := s.site.state, s.site.changed
			s.site.mu.Unlock()
			select {
			case out <- state:
			case <-changed:
				continue
			case <-ctx.Done():
				return
			}
			select {
			case <-changed:
			case <-ctx.Done():
				return
			}
		}
	}()
	return out
}

func (s *memStore) Gone(_ context.Context, ids []string) ([]string, error) {
	s.site.mu.Lock()
	defer s.site.mu.Unlock()
	var gone []string
	for _, id := range ids {
		if owner := s.site.used[id]; owner != nil && owner.isGone {
			gone = append(gone, id)
		}
	}
	return gone, s.site.broken
}

func (s *memStore) Alive(_ context.Context, ids []string) ([]string, error) {
	s.site.mu.Lock()
	defer s.site.mu.Unlock()
	var alive []string
	for _, id := range ids {
		if owner := s.site.used[id]; owner != nil && !owner.isGone {
			alive = append(alive, id)
		}
	}
	return alive, s.site.broken
}

func (s *memStore) Deadline() time.Time {
	s.site.mu.Lock()
	defer s.site.mu.Unlock()
	return s.deadline
}

// renew lets the lease end after d from now on.
func (s *memStore) renew(d time.Duration) {
	s.site.mu.Lock()
	defer s.site.mu.Unlock()
	s.deadline = time.Now().Add(d)
}

func (s *memStore) Campaign(ctx context.Context) (context.Context, func(), error) {
	if ctx.Err() != nil {
		return nil, nil, ctx.Err()
	}
	select {
	case s.site.driving <- struct{}{}:
	case <-ctx.Done():
		return nil, nil, ctx.Err()
	}
	office, end := context.WithCancel(context.Background())
	release := sync.OnceFunc(func() {
		end()
		if s.isDeposed.CompareAndSwap(true, false) {
			return
		}
		<-s.site.driving
	})
	s.site.mu.Lock()
	defer s.site.mu.Unlock()
	s.release = release
	return office, release, nil
}

func (s *memStore) Close() error {
	s.site.mu.Lock()
	s.isGone = true
	release := s.release
	s.site.mu.Unlock()
	if release != nil {
		release()
	}
	return nil
}

// memLocal is a state directory in memory.
type memLocal struct {
	mu       sync.Mutex
	revision uint64
	snapshot []byte
	roles    map[string]string
	full     bool // the disk: nothing can be written
}

func newMemLocal() *memLocal { return &memLocal{roles: make(map[string]string)} }

var errDiskFull = errors.New("no space left on device")

func (l *memLocal) SaveSnapshot(revision uint64, data []byte) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.full {
		return errDiskFull
	}
	if revision >= l.revision {
		l.revision, l.snapshot = revision, slices.Clone(data)
	}
	return nil
}

func (l *memLocal) ReplaceSnapshot(revision uint64, data []byte) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.revision, l.snapshot = revision, slices.Clone(data)
	return nil
}

func (l *memLocal) LoadSnapshot() ([]byte, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return slices.Clone(l.snapshot), nil
}

func (l *memLocal) Remember(user, role string) (string, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if _, ok := l.roles[user]; !ok {
		l.roles[user] = role
	}
	return l.roles[user], nil
}

func (l *memLocal) Recall(user string) (string, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.roles[user], nil
}

func (l *memLocal) Replace(user, role string) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.roles[user] = role
	return nil
}

func (l *memLocal) setFull(full bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.full = full
}

// memDirectory maps names to entries.
type memDirectory struct {
	mu    sync.Mutex
	users map[string]Entry
}

func newMemDirectory(users map[string]string) *memDirectory {
	d := &memDirectory{users: make(map[string]Entry)}
	for u, role := range users {
		d.set(u, Entry{User: u, Role: role})
	}
	return d
}

func (d *memDirectory) set(name string, e Entry) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.users[name] = e
}

func (d *memDirectory) Lookup(_ context.Context, name string) (Entry, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if e, ok := d.users[name]; ok {
		return e, nil
	}
	return Entry{}, ErrUnknownUser
}

// host is what a test has on one host: a store, a directory, a state_dir.
type host struct {
	t     *testing.T
	site  *memSite
	dir   *memDirectory
	local *memLocal
	opt   Options       // for the next start
	lease time.Duration // of the stores of the next starts; 0: they have none
}

func newHost(t *testing.T) *host {
	h := &host{t: t, site: newMemSite(), local: newMemLocal(),
		dir: newMemDirectory(map[string]string{"alice": "ma01", "bob": "ma01", "carol": "ma02"})}
	h.opt = Options{
		Backends: map[string]map[string]string{"a": {"imap": "10.0.0.11:143"}, "b": {"imap": "10.0.0.12:143"}},
		Roles: map[string]RoleConfig{"ma01": {Members: []string{"a", "b"}, Active: "a"},
			"ma02": {Members: []string{"a", "b"}, Active: "b"}},
	}
	// Where time is not real, a test that waits for what never comes would go on
	// until the test binary is killed.
	stuck := time.AfterFunc(48*time.Hour, func() {
		state, _ := json.Marshal(h.site.get())
		panic(fmt.Sprintf("%s is stuck; the table is %s", t.Name(), state))
	})
	t.Cleanup(func() { stuck.Stop() })
	return h
}

// start starts a frontend of this host; the test's end closes and checks it.
func (h *host) start(name string) *process {
	h.t.Helper()
	p, err := h.tryStart(name)
	if err != nil {
		h.t.Fatal(err)
	}
	return p
}

func (h *host) tryStart(name string) (*process, error) {
	store := h.site.open()
	if h.lease > 0 {
		store.renew(h.lease)
	}
	opt := h.opt
	opt.Backends, opt.Roles = maps.Clone(opt.Backends), maps.Clone(opt.Roles)
	opt.ID, opt.Store = NewID(name), store
	if opt.Local == nil {
		opt.Local = h.local
	}
	if opt.Directory == nil {
		opt.Directory = h.dir
	}
	t, err := Start(h.t.Context(), opt)
	if err != nil {
		store.Close()
		return nil, err
	}
	return &process{h, t, store}, nil
}

// process is one running frontend.
type process struct {
	host *host
	*Table
	store *memStore
}

// stop ends the frontend in good order.
func (p *process) stop() {
	p.host.t.Helper()
	if err := p.Check(); err != nil {
		p.host.t.Error(err)
	}
	if err := p.Close(context.Background()); err != nil {
		p.host.t.Error(err)
	}
	if err := p.Check(); err != nil {
		p.host.t.Error(err)
	}
	p.store.Close()
}

// kill ends the frontend as kill -9 does: without a goodbye.
func (p *process) kill() {
	p.mu.Lock()
	p.isClosed = true
	close(p.closing)
	p.mu.Unlock()
	p.Table.stop()
	p.Table.running.Wait()
	p.store.Close()
}

func (p *process) enter(user string) *Stay {
	p.host.t.Helper()
	s, err := p.Enter(p.host.t.Context(), user)
	if err != nil {
		p.host.t.Fatalf("Enter(%s): %v", user, err)
	}
	return s
}

// until waits for a snapshot.
func (p *process) until(is func(*State) bool) {
	p.host.t.Helper()
	for {
		changed := p.Changed()
		if is(p.Snapshot()) {
			return
		}
		select {
		case <-changed:
		case <-p.host.t.Context().Done():
			p.host.t.Fatal("the snapshot did not come")
		}
	}
}

var proven = End{Proven: true}
