// Package routing answers one question: which backend may this user be on now?
// It keeps the role table (role → active backend, epoch, phase), the gate that
// every session passes, and the pure rules of a switch.
package routing

import (
	"errors"
	"fmt"
	"maps"
	"slices"
	"time"
)

// Phase is where a role stands in a switch (design: HOLD → ACK → DEMOTE →
// CATCH UP → PROMOTE → OPEN). ACK is no phase of its own: it is HOLD until
// every registered frontend has raised its floor. Preflight is no phase of a
// row, which is open then: it stands in Switch.Steps only.
type Phase string

const (
	PhasePreflight Phase = "preflight" // asked for; frontends report, members are compared

	PhaseOpen    Phase = "open"     // the active serves; sessions enter
	PhaseHold    Phase = "hold"     // new logins park, old stays drain, floors are awaited
	PhaseDemote  Phase = "demote"   // the old active's hook runs
	PhaseCatchUp Phase = "catch-up" // the new active catches up
	PhasePromote Phase = "promote"  // the new active's hook runs
	PhaseAbort   Phase = "abort"    // what was begun is undone, in reverse
)

// State is the whole content of a store: plain data, never edited in place
// once published. Users do not live here; roles do.
type State struct {
	// Revision grows by one with every committed change. One that goes back
	// puts the store in doubt.
	Revision uint64 `json:"revision"`
	// Roles by name.
	Roles map[string]Row `json:"roles"`
	// Frontends that are registered, by ID. An ID is never reused.
	Frontends map[string]Frontend `json:"frontends"`
	// Overrides send single users to another role than the directory's.
	Overrides map[string]string `json:"overrides,omitempty"`
	// Backends holds the address of each backend's services
	// (name → service → host:port). All frontends must agree on them.
	Backends map[string]map[string]string `json:"backends"`
	// Settings are other values that all frontends must agree on, such as how
	// user names are normalised.
	Settings map[string]string `json:"settings,omitempty"`
	// Switches counts the switches ever begun; it numbers them.
	Switches uint64 `json:"switches"`
	// History holds the last historyLimit ended switches, oldest first.
	History []SwitchRecord `json:"history,omitempty"`
}

// Row is one role of the table.
type Row struct {
	// Members hold a copy of the role: the active and its replicas.
	Members []string `json:"members"`
	// Active serves the role in PhaseOpen. In every other phase it is the
	// backend that served last, and nobody may enter; empty if nobody knows
	// which one that was (after `roles init`).
	Active string `json:"active,omitempty"`
	// Epoch numbers the role's current tenancy; the fencing token.
	Epoch uint64 `json:"epoch"`
	// Phase says whether sessions may enter.
	Phase Phase `json:"phase"`
	// Request is a switch that was asked for and has not begun; only in
	// PhaseOpen.
	Request *Request `json:"request,omitempty"`
	// Switch is the switch in progress; nil in PhaseOpen.
	Switch *Switch `json:"switch,omitempty"`
	// Residues are works that may still run on a backend though their stay
	// has ended. They outlive frontends, drivers and switches.
	Residues []Residue `json:"residues,omitempty"`
	// Stale are the members that were left behind by a failover: they lack mail,
	// or have some that nobody else has. None becomes active before a rejoin.
	Stale map[string]Stale `json:"stale,omitempty"`
	// Seen are the users whose mail may have changed since the role's last
	// switch: those who had stays, as far as frontends have handed them in.
	Seen Seen `json:"seen,omitzero"`
	// Doubt is set if a frontend knew this role better than the store does:
	// the store was wiped or restored. `posthouse roles init` ends it.
	Doubt *Doubt `json:"doubt,omitempty"`
}

// Stale says since when a member is.
type Stale struct {
	Number uint64    `json:"number"` // of the failover
	Since  time.Time `json:"since"`
	// Attempt counts the rejoins that were begun.
	Attempt int `json:"attempt,omitempty"`
	// RejoinBy is the frontend whose rejoin hook is at work there; empty if none
	// is. RejoinScope is what it touches.
	RejoinBy    string `json:"rejoin_by,omitempty"`
	RejoinScope Scope  `json:"rejoin_scope,omitempty"`
}

// Seen is a set of users.
type Seen struct {
	// All: any user may be in it. Then Users is empty.
	All   bool     `json:"all,omitempty"`
	Users []string `json:"users,omitempty"` // sorted, each once
}

// Doubt says why a row of the store is not to be believed.
type Doubt struct {
	// Known is the highest epoch that any frontend's snapshot has of the
	// role. Who knows less than that serves nobody.
	Known uint64    `json:"known"`
	By    string    `json:"by"` // the frontend that saw it first
	Why   string    `json:"why"`
	Since time.Time `json:"since"`
}

// Switch is a change of a role's active in progress.
type Switch struct {
	Number  uint64    `json:"number"`
	To      string    `json:"to"`
	Who     string    `json:"who"`
	Why     string    `json:"why,omitempty"`
	Started time.Time `json:"started"`
	// Roles are switched together, in every step at once: they share a backend
	// that a hook restarts. The first is the one that was asked for; each of
	// them has this switch in its row.
	Roles []string `json:"roles,omitempty"`
	// Hooks are those that the site had for it when the role was held. Whoever
	// drives the switch goes by them.
	Hooks []Hook `json:"hooks,omitempty"`
	// Failover: the old active is taken for dead. It is not asked to demote
	// itself; the fence hook proves that it is off, or AcceptLoss says that
	// nobody needs proof.
	Failover   bool `json:"failover,omitempty"`
	AcceptLoss bool `json:"accept_loss,omitempty"`
	// AcceptStale: To may be stale, and is so no more when it opens.
	AcceptStale bool `json:"accept_stale,omitempty"`
	// Scope is what its hooks touch.
	Scope Scope `json:"scope,omitempty"`
	// Beside counts the other roles that the old active served when these were
	// held.
	Beside int `json:"beside,omitempty"`
	// Driver is who has the switch in hand: a token, new for each term of office.
	// Nobody else's step counts. Empty: nobody has taken it up yet.
	Driver string `json:"driver,omitempty"`
	// Attempt grows each time a driver takes the switch up; hooks get it.
	Attempt int `json:"attempt"`
	// Begun lists the hook phases entered so far, in their order; abort
	// undoes them in reverse.
	Begun []Phase `json:"begun,omitempty"`
	// Steps records when each phase was entered.
	Steps []Step `json:"steps"`
	// Compared is what the comparison before HOLD has found; empty if there was
	// none.
	Compared string `json:"compared,omitempty"`
	// Runs are the hooks that have ended, in order.
	Runs []HookRun `json:"runs,omitempty"`
	// Unclean counts the sessions that ended without proof while the role was
	// held: their residues came with the acks.
	Unclean int `json:"unclean,omitempty"`
	// AbortWhy says why the switch is being aborted; empty while it is not.
	AbortWhy string `json:"abort_why,omitempty"`
	// Stuck says what keeps the switch from going on and from being undone. It
	// waits for the operator's `posthouse switch --resume`.
	Stuck string `json:"stuck,omitempty"`
}

// HookRun is one run of a hook.
type HookRun struct {
	Hook    Hook          `json:"hook"`
	Attempt int           `json:"attempt"`
	Began   time.Time     `json:"began"`
	Took    time.Duration `json:"took_ns"`
	// Output is the end of what it wrote to stdout and stderr.
	Output string `json:"output,omitempty"`
	// Error says how it failed; empty if it did not.
	Error string `json:"error,omitempty"`
}

// Step is one phase of a switch and when it was entered.
type Step struct {
	Phase Phase     `json:"phase"`
	At    time.Time `json:"at"`
}

// SwitchRecord is a switch that has ended, with all its roles. A failover that
// took over some of them only leaves two of a number, which differ in their end.
type SwitchRecord struct {
	Switch
	Role string `json:"role"` // that was asked for
	From string `json:"from"`
	// Epochs are those in which its roles go on, by role.
	Epochs map[string]uint64 `json:"epochs"`
	Ended  time.Time         `json:"ended"`
	// Done is true if To was opened, false if the switch was aborted.
	Done bool `json:"done"`
}

// Caveats are what the switch cannot promise, or could not, in words.
func (rec SwitchRecord) Caveats() []string {
	list := []string{"clients that reach a backend other than through posthouse are neither held nor drained"}
	if rec.Unclean > 0 {
		list = append(list, fmt.Sprintf("sessions that ended without proof that nothing of them runs on: %d; what cleared their residues vouches for them", rec.Unclean))
	}
	switch {
	case rec.AcceptStale && rec.From == "":
		list = append(list, fmt.Sprintf("%s was opened with the mail that it had when it was left behind", rec.To))
	case rec.AcceptStale:
		list = append(list, fmt.Sprintf("%s was opened with the mail that it had when it was left behind; all that %s took since is on %s only", rec.To, rec.From, rec.From))
	case rec.Failover:
		list = append(list, fmt.Sprintf("what %s had acknowledged and not passed on is not on %s", rec.From, rec.To))
	case !slices.Contains(rec.Hooks, HookCatchUp) && rec.From != "":
		list = append(list, fmt.Sprintf("there is no catch_up: nobody looks whether %s has all mail that %s has", rec.To, rec.From))
	}
	if rec.Beside > 0 {
		list = append(list, fmt.Sprintf("%s serves %d other roles on: what their users write into shared mailboxes of %s, they write there", rec.From, rec.Beside, rec.Role))
	}
	if rec.Failover {
		list = append(list, fmt.Sprintf("%s is stale until `posthouse rejoin %s %s`", rec.From, rec.Role, rec.From))
	}
	return list
}

// Frontend is one registered posthouse process.
type Frontend struct {
	// Backends that this frontend has in its configuration.
	Backends []string `json:"backends"`
	// Floors holds, for roles that are held, the epoch below which nobody is inside this
	// frontend, and never will be: its acknowledgements.
	Floors map[string]uint64 `json:"floors"`
	// BootID is the boot of the machine in which it registered.
	BootID string    `json:"boot_id"`
	Since  time.Time `json:"since"`
}

// Residue is work that may still run on a backend after its stay ended
// without proof. Only proof, the operator, or age clears it.
type Residue struct {
	Backend  string    `json:"backend"`
	User     string    `json:"user,omitempty"` // empty: unknown, any user of the role
	Frontend string    `json:"frontend"`
	Since    time.Time `json:"since"`
	Why      string    `json:"why"`
}

// What Enter and the lookups answer. Everything else that they return means
// "could not tell": a temporary error for the client.
var (
	// ErrUnknownUser: the directory is sure that there is no such user.
	ErrUnknownUser = errors.New("no such user in the directory")
	// ErrHeld: the role is between backends and the login's window is over,
	// or the caller did not want to wait.
	ErrHeld = errors.New("role is on hold")
	// ErrRevoked: the stay has ended; its session must drain.
	ErrRevoked = errors.New("stay was revoked")
	// ErrInDoubt: the store went back in time or lost the role; nobody enters
	// until the operator decides.
	ErrInDoubt = errors.New("the store is in doubt")
	// ErrClosed: this frontend is shutting down.
	ErrClosed = errors.New("the frontend is shutting down")
	// ErrNobodyListens: a backend's host answered, and nothing serves what could
	// not be reached there. It is for Options.Reach.
	ErrNobodyListens = errors.New("nobody listens there")
	// ErrConflict: a rule refused the change; the message says which.
	ErrConflict = errors.New("the role table does not allow it")
)

// inMotion are the roles that are not simply open, sorted: few of many.
func (s *State) inMotion() []string {
	var roles []string
	for name, row := range s.Roles {
		if row.Phase != PhaseOpen || row.Switch != nil || row.Request != nil || row.Doubt != nil {
			roles = append(roles, name)
		}
	}
	slices.Sort(roles)
	return roles
}

// Clone returns a deep copy: changing it leaves s as it is.
func (s *State) Clone() *State {
	c := *s
	c.Roles = make(map[string]Row, len(s.Roles))
	for name, row := range s.Roles {
		c.Roles[name] = row.clone()
	}
	c.Frontends = make(map[string]Frontend, len(s.Frontends))
	for id, f := range s.Frontends {
		f.Backends = slices.Clone(f.Backends)
		f.Floors = maps.Clone(f.Floors)
		c.Frontends[id] = f
	}
	c.Overrides = maps.Clone(s.Overrides)
	c.Settings = maps.Clone(s.Settings)
	c.Backends = make(map[string]map[string]string, len(s.Backends))
	for name, addresses := range s.Backends {
		c.Backends[name] = maps.Clone(addresses)
	}
	c.History = slices.Clone(s.History)
	return &c
}

func (r Row) clone() Row {
	r.Members = slices.Clone(r.Members)
	r.Residues = slices.Clone(r.Residues)
	r.Seen.Users = slices.Clone(r.Seen.Users)
	r.Stale = maps.Clone(r.Stale)
	if r.Switch != nil {
		sw := *r.Switch
		sw.Begun = slices.Clone(sw.Begun)
		sw.Steps = slices.Clone(sw.Steps)
		sw.Roles = slices.Clone(sw.Roles)
		sw.Hooks = slices.Clone(sw.Hooks)
		sw.Runs = slices.Clone(sw.Runs)
		r.Switch = &sw
	}
	if r.Request != nil {
		q := *r.Request // its maps and lists are replaced, not edited
		r.Request = &q
	}
	if r.Doubt != nil {
		d := *r.Doubt
		r.Doubt = &d
	}
	return r
}
