package routing

import (
	"context"
	"crypto/rand"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"os"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"go.uber.org/zap"
)

// What Options leaves out.
const (
	defaultHoldWindow = 25 * time.Second // below the 30 s after which stock clients give up a login
	defaultBudget     = 20 * time.Second // below the window, so that an abort in time refuses nobody
	defaultReserve    = 5 * time.Second
)

// Local is what a frontend keeps on its own disk. It may be shared by the
// frontends of one state directory.
type Local interface {
	// SaveSnapshot returns when no start from disk will see anything older
	// than revision. Data of a higher revision that is there already stays.
	SaveSnapshot(revision uint64, data []byte) error
	// ReplaceSnapshot is SaveSnapshot whatever revision is there: the store
	// itself went back.
	ReplaceSnapshot(revision uint64, data []byte) error
	// LoadSnapshot returns what was saved last; nil, nil if nothing was.
	LoadSnapshot() ([]byte, error)
	// Remember returns the role in which user was last; if none is known it
	// stores role, durably, and returns it.
	Remember(user, role string) (remembered string, err error)
	// Recall is Remember without storing: "" if none is known.
	Recall(user string) (role string, err error)
	// Replace makes role the one in which user was last.
	Replace(user, role string) error
}

// Options of a Table. ID, Store, Directory and Local are needed.
type Options struct {
	// ID of this frontend, new at each start: see NewID.
	ID        string
	Store     Store // the caller closes it, after the Table
	Directory Directory
	Local     Local
	// HoldWindow is how long a login may stay parked, from its first parking
	// on. Default 25 s.
	HoldWindow time.Duration
	// SwitchBudget is how long a role may be held before its switch is
	// aborted. It should be smaller than HoldWindow. Default 20 s.
	SwitchBudget time.Duration
	// UndoReserve is the part of SwitchBudget that is kept for undoing, where a
	// role has hooks that undo. Default 5 s.
	UndoReserve time.Duration
	// Hooks runs the hooks that Roles name. It may be nil if they name none.
	Hooks Hooks
	// DrainTimeout is how long sessions take to end. Where the store has a
	// Deadline they are revoked that much before it passes.
	DrainTimeout time.Duration
	// Reach, if set, tries whether this frontend can reach a backend on each
	// service, within a few seconds. ErrNobodyListens is no obstacle to a switch
	// whose promote hook may open the backend's doors.
	Reach func(ctx context.Context, backend string) error
	// ResidueMaxAge is after how long work whose end nobody saw is taken to
	// have ended: an assumption. 0 means never.
	ResidueMaxAge time.Duration
	// Parking bounds the parked logins of this frontend.
	Parking Parking
	// Backends, Settings and Roles are what all frontends must agree on.
	Backends map[string]map[string]string
	Settings map[string]string
	Roles    map[string]RoleConfig
	Logger   *zap.Logger // default: none
	// OnEvent, if set, is told what happens: one call at a time, in order,
	// with the Table unlocked. While it blocks, events pile up. It must not
	// call Close.
	OnEvent func(Event)
}

// NewID makes a frontend's ID from its name: unique for each start.
func NewID(name string) string {
	return strings.ToLower(name + "." + rand.Text()[:10])
}

// Table is the role table as one frontend sees it, and its gates.
type Table struct {
	opt   Options
	rules rules
	log   *zap.Logger
	site  siteConfig

	view atomic.Pointer[view] // written under mu

	// mu is the one lock of all gates: what depends on the snapshot and on who
	// is inside is decided under it. Nobody calls out while holding it.
	mu       sync.Mutex
	id       string
	gates    map[string]*gate
	disk     map[string]Row // the rows that a start from disk would see
	events   []Event        // not yet announced
	inside   int            // stays in all gates
	slots    map[slot]int   // of the parked logins
	isClosed bool

	disagreements atomic.Uint64
	highest       uint64        // revision on the disk; keep alone uses it
	saved         time.Time     // when; keep alone uses it
	joined        []string      // the IDs that the store knows, the last one last; keep alone uses it after Start
	poke          chan struct{} // wakes keep; capacity 1
	news          chan struct{} // wakes announce; capacity 1
	closing       chan struct{}
	stop          context.CancelFunc
	running       sync.WaitGroup
}

// Start joins the store, registers this frontend, buries siblings that are
// proven to have ended, seeds an empty store and begins to follow the table.
// When it returns, the snapshot holds a State read after registering. ctx
// bounds the start only; Close ends the Table.
func Start(ctx context.Context, opt Options) (*Table, error) {
	t, kept, err := newTable(opt)
	if err != nil {
		return nil, err
	}
	fresh, err := t.enrol(ctx, opt.ID, kept, nil)
	if err != nil {
		return nil, err
	}
	state, doubts := merge(kept, fresh)
	t.view.Store(newView(state, doubts, 0))
	run, stop := context.WithCancel(context.Background())
	t.stop = stop
	t.running.Go(func() { t.follow(run) })
	t.running.Go(func() { t.keep(run) })
	t.running.Go(func() { t.drive(run) })
	t.running.Go(func() { t.announce(run) })
	t.running.Go(func() { t.heedDeadline(run) })
	t.running.Go(func() { t.answerRequests(run) })
	t.running.Go(func() { t.buryGone(run) })
	t.wakeKeeper()
	return t, nil
}

func newTable(opt Options) (*Table, *State, error) {
	if opt.ID == "" || opt.Store == nil || opt.Directory == nil || opt.Local == nil {
		return nil, nil, errors.New("routing: Options needs ID, Store, Directory and Local")
	}
	if opt.HoldWindow == 0 {
		opt.HoldWindow = defaultHoldWindow
	}
	if opt.SwitchBudget == 0 {
		opt.SwitchBudget = defaultBudget
	}
	if opt.UndoReserve == 0 {
		opt.UndoReserve = defaultReserve
	}
	opt.Parking.complete()
	if opt.Logger == nil {
		opt.Logger = zap.NewNop()
	}
	t := &Table{opt: opt, log: opt.Logger, id: opt.ID, gates: make(map[string]*gate), slots: make(map[slot]int), disk: make(map[string]Row),
		site: siteConfig{opt.Backends, opt.Settings, opt.Roles},
		poke: make(chan struct{}, 1), news: make(chan struct{}, 1), closing: make(chan struct{})}
	kept, err := loadSnapshot(opt.Local)
	if err != nil {
		return nil, nil, err
	}
	if kept != nil {
		t.disk, t.highest = kept.Roles, kept.Revision
	}
	return t, kept, nil
}

func loadSnapshot(l Local) (*State, error) {
	data, err := l.LoadSnapshot()
	if err != nil {
		return nil, fmt.Errorf("reading the last snapshot: %w", err)
	}
	if data == nil {
		return nil, nil
	}
	kept := new(State)
	if err := json.Unmarshal(data, kept); err != nil {
		return nil, fmt.Errorf("the last snapshot is damaged: %w: if the role table is known to be right, remove the snapshot from state_dir", err)
	}
	return kept, nil
}

// enrol registers id. kept is what this frontend knows already; inside has the
// lowest epoch of the stays that it has already, by role.
func (t *Table) enrol(ctx context.Context, id string, kept *State, inside map[string]uint64) (*State, error) {
	if !slices.Contains(t.joined, id) { // a second try has joined already
		if err := t.opt.Store.Join(ctx, id); err != nil {
			return nil, fmt.Errorf("joining the store as %s: %w", id, err)
		}
		t.joined = append(t.joined, id)
	}
	before, err := t.opt.Store.Load(ctx)
	if err != nil {
		return nil, fmt.Errorf("reading the role table: %w", err)
	}
	// In the table before anything refuses this start: what the store has said of
	// them may be what makes them register anew.
	if _, err := t.bury(ctx, before); err != nil {
		return nil, err
	}
	now, boot := time.Now(), bootID()
	fresh, err := t.opt.Store.Update(ctx, func(s *State) error {
		if _, is := s.Frontends[id]; is {
			return errNothing // by an earlier try whose answer got lost: nobody else joins as id
		}
		t.rules.seed(s, t.site.roles, func(role string) bool {
			return kept != nil && slices.Contains(sortedKeys(kept.Roles), role)
		})
		if err := t.rules.reconcile(s, t.site); err != nil {
			return err
		}
		t.rules.succeed(s, id, t.joined[:len(t.joined)-1])
		return t.rules.register(s, id, Frontend{Backends: sortedKeys(t.site.backends), BootID: boot, Since: now,
			Floors: floorsOf(kept, s, inside)})
	})
	if errors.Is(err, errNothing) {
		fresh, err = t.opt.Store.Load(ctx)
	}
	if err != nil {
		return nil, fmt.Errorf("registering frontend %s: %w", id, err)
	}
	return fresh, nil
}

// bootID is the boot of this machine; "" where the system does not say.
func bootID() string {
	id, _ := os.ReadFile("/proc/sys/kernel/random/boot_id")
	return strings.TrimSpace(string(id))
}

// Close says goodbye and stops what Start began. Sessions should have left
// before: the stays of those that have not are revoked and become residues.
// The Table stays closed even if the goodbye fails; siblings bury it then.
func (t *Table) Close(ctx context.Context) error {
	t.mu.Lock()
	if t.isClosed {
		t.mu.Unlock()
		return nil
	}
	t.isClosed = true
	close(t.closing)
	t.mu.Unlock()
	t.stop()
	t.running.Wait()

	id, hands := t.evict()
	_, err := t.opt.Store.Update(ctx, func(s *State) error {
		if _, ok := s.Frontends[id]; !ok && len(hands) == 0 {
			return errNothing
		}
		t.rules.goodbye(s, id, hands)
		return nil
	})
	t.tellAll()
	if err != nil && !errors.Is(err, errNothing) {
		return fmt.Errorf("saying goodbye as frontend %s: %w", id, err)
	}
	return nil
}

// evict ends the stays that remain and returns what is to be handed in, by role.
func (t *Table) evict() (id string, hands map[string]handed) {
	t.mu.Lock()
	defer t.mu.Unlock()
	hands = make(map[string]handed)
	for role, g := range t.gates {
		for s := range g.stays {
			s.revokeLocked()
			t.leaveLocked(g, s, End{Why: "the frontend was stopped"})
		}
		t.pruneLocked(g)
		if h := g.handOver(); !h.isEmpty() {
			hands[role] = h
		}
	}
	return t.id, hands
}

// pruneLocked forgets residues that are old enough.
func (t *Table) pruneLocked(g *gate) {
	if t.opt.ResidueMaxAge <= 0 {
		return
	}
	maps.DeleteFunc(g.residues, func(_ residueKey, r Residue) bool {
		return time.Since(r.Since) >= t.opt.ResidueMaxAge
	})
}

// errUnregistered: nobody waits for this frontend's acks, so that it serves nobody.
var errUnregistered = errors.New("this frontend is not registered in the role table")

// Ready says whether this frontend can route logins. A held role or one in doubt
// is no error: the other roles work.
func (t *Table) Ready() error {
	select {
	case <-t.closing:
		return ErrClosed
	default:
	}
	if _, is := t.Snapshot().Frontends[t.ID()]; !is {
		return errUnregistered
	}
	if t.leaseLeft() <= 0 {
		return errors.New(leaseOver)
	}
	return nil
}

// Check compares the counters with the maps. Tests end with it.
func (t *Table) Check() error {
	t.mu.Lock()
	defer t.mu.Unlock()
	inside, parked := 0, 0
	for role, g := range t.gates {
		placed := 0
		for _, n := range g.places {
			if n <= 0 {
				return fmt.Errorf("gate %s counts %d stays in one place", role, n)
			}
			placed += n
		}
		if placed != len(g.stays) {
			return fmt.Errorf("gate %s counts %d stays and holds %d", role, placed, len(g.stays))
		}
		for s := range g.stays {
			if s.gate != g || s.hasLeft {
				return fmt.Errorf("gate %s holds a stay of %s that is not its own", role, s.User)
			}
		}
		inside += len(g.stays)
		parked += len(g.parked)
	}
	if counted := t.slots[slot{slotTotal, ""}]; inside != t.inside || parked != counted {
		return fmt.Errorf("the table counts %d stays and %d parked logins, its gates hold %d and %d", t.inside, counted, inside, parked)
	}
	return nil
}
