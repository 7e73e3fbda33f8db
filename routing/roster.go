package routing

import (
	"fmt"
	"maps"
	"slices"
	"time"
)

// RoleConfig is a role as the configuration has it.
type RoleConfig struct {
	Members []string
	// Active seeds an empty store only; afterwards the table decides.
	Active string
	// Hooks that the site has for a switch of the role.
	Hooks []Hook
	// Digest is of all that a driver goes by: the same at all frontends.
	Digest string
	// Scope says what the hooks touch; the zero value is ScopeBackend.
	Scope Scope
}

// Scope is what the hooks of a role may restart.
type Scope string

const (
	// ScopeBackend: the whole backend, so that all roles which it serves are
	// switched together.
	ScopeBackend Scope = "backend"
	// ScopeRole: nothing that other roles use.
	ScopeRole Scope = "role"
)

// touchesBackend says whether hooks may restart what other roles use.
func touchesBackend(hooks []Hook, scope Scope) bool { return len(hooks) > 0 && scope != ScopeRole }

// siteConfig is what all frontends must agree on.
type siteConfig struct {
	backends map[string]map[string]string
	settings map[string]string
	roles    map[string]RoleConfig
}

// register writes a frontend into the table. Its floors are the epochs of now,
// since it will read what is in the table from here on; except in the roles of
// f.Floors, where it is below that (see floorsOf): a switch waits for these.
func (r rules) register(s *State, id string, f Frontend) error {
	if _, known := s.Frontends[id]; known {
		return fmt.Errorf("%w: frontend %s is registered already: IDs are never reused", ErrConflict, id)
	}
	f.Backends = slices.Sorted(slices.Values(f.Backends))
	// Roles that the store has lost are kept too: initRole goes above them.
	floors := maps.Clone(f.Floors)
	if floors == nil {
		floors = make(map[string]uint64)
	}
	for role, row := range s.Roles {
		below, ok := f.Floors[role]
		switch {
		case ok:
			floors[role] = min(below, row.Epoch)
		case row.Phase != PhaseOpen || row.Doubt != nil:
			floors[role] = row.Epoch
		}
	}
	f.Floors = floors
	s.Frontends[id] = f
	return nil
}

// seed writes the roles of the configuration into an empty store, except those
// that knows says some snapshot had: for these the store is not empty but lost
// (safety 14).
func (r rules) seed(s *State, roles map[string]RoleConfig, knows func(role string) bool) {
	if s.Revision != 0 || len(s.Roles) > 0 || len(s.Frontends) > 0 {
		return
	}
	for name, c := range roles {
		if c.Active == "" || knows(name) {
			continue
		}
		// Who was there before posthouse nobody knows.
		s.Roles[name] = Row{Members: slices.Sorted(slices.Values(c.Members)), Active: c.Active, Epoch: 1, Phase: PhaseOpen, Seen: Seen{All: true}}
	}
}

// reconcile compares what all frontends must agree on with the table and adds
// what it does not have yet (safety 30).
func (r rules) reconcile(s *State, c siteConfig) error {
	for _, name := range sortedKeys(c.backends) {
		mine := c.backends[name]
		theirs, known := s.Backends[name]
		if known && !maps.Equal(mine, theirs) {
			if role := s.roleWith(name); role != "" {
				return fmt.Errorf("%w: backend %s has addresses %v here and %v in the table, and serves role %s: give the new address a new backend name",
					ErrConflict, name, mine, theirs, role)
			}
			s.forgetBackend(name)
		}
		s.Backends[name] = maps.Clone(mine)
	}
	for _, key := range sortedKeys(c.settings) {
		theirs, known := s.Settings[key]
		if known && theirs != c.settings[key] && len(s.Frontends) > 0 {
			return fmt.Errorf("%w: %s is %q here and %q in the table: all frontends must agree; stop all of them to change it",
				ErrConflict, key, c.settings[key], theirs)
		}
		if s.Settings == nil {
			s.Settings = make(map[string]string)
		}
		s.Settings[key] = c.settings[key]
	}
	for _, name := range sortedKeys(c.roles) {
		if _, known := s.Roles[name]; !known {
			continue
		}
		if err := r.setMembers(s, name, c.roles[name].Members); err != nil {
			return err
		}
	}
	return nil
}

// setMembers changes which backends hold a copy of the role. The active stays
// one of them, and nothing changes within a switch.
func (r rules) setMembers(s *State, role string, members []string) error {
	row, err := s.row(role)
	if err != nil {
		return err
	}
	members = slices.Sorted(slices.Values(members))
	if slices.Equal(members, slices.Sorted(slices.Values(row.Members))) {
		return nil
	}
	switch {
	case row.Phase != PhaseOpen:
		return fmt.Errorf("%w: role %s: its members cannot change while it is switched: try again afterwards", ErrConflict, role)
	case row.Active != "" && !slices.Contains(members, row.Active):
		return fmt.Errorf("%w: role %s: its active %s is not one of the members %v: add it, or switch the role first", ErrConflict, role, row.Active, members)
	}
	if slices.ContainsFunc(members, func(m string) bool { return !slices.Contains(row.Members, m) }) {
		row.Seen = Seen{All: true} // nobody has looked at the new one
	}
	row.Members = members
	s.Roles[role] = row
	return nil
}

// roleWith returns a role that has the backend as a member, or "". A residue
// counts too: its address must be found.
func (s *State) roleWith(backend string) string {
	for _, name := range sortedKeys(s.Roles) {
		row := s.Roles[name]
		onIt := slices.ContainsFunc(row.Residues, func(res Residue) bool { return res.Backend == backend })
		if slices.Contains(row.Members, backend) || row.Active == backend || onIt {
			return name
		}
	}
	return ""
}

// forgetBackend notes that the registered frontends do not know a backend: the
// one that they know by its name has another address.
func (s *State) forgetBackend(name string) {
	for id, f := range s.Frontends {
		f.Backends = slices.DeleteFunc(f.Backends, func(b string) bool { return b == name })
		s.Frontends[id] = f
	}
}

// succeed ends the registrations that frontend id has had as former: a store that
// was lost and came back may have one, and nobody else would give its acks. What
// it has inside is in the floors that it registers with as id.
func (r rules) succeed(s *State, id string, former []string) {
	for _, was := range former {
		delete(s.Frontends, was)
	}
	for role, row := range s.Roles {
		for member, stale := range row.Stale {
			if slices.Contains(former, stale.RejoinBy) {
				stale.RejoinBy = id
				row.Stale = maps.Clone(row.Stale)
				row.Stale[member] = stale
				s.Roles[role] = row
			}
		}
	}
}

// goodbye ends a registration: nobody is inside any more. hands are by role. Who
// was buried meanwhile hands in all the same.
func (r rules) goodbye(s *State, id string, hands map[string]handed) {
	delete(s.Frontends, id)
	s.take(hands)
}

// bury ends the registration of a frontend that is proven to have ended
// without a goodbye. Nobody knows who was inside: a residue of an unknown user
// is left wherever it can have had stays (safety 2). errNothing if it is not
// registered.
func (r rules) bury(s *State, id string, now time.Time) error {
	f, ok := s.Frontends[id]
	if !ok {
		return errNothing
	}
	delete(s.Frontends, id)
	for role, row := range s.Roles {
		if rest := r.unknownResidues(row, id, f.Floors[role], now); len(rest) > 0 {
			row.take(handed{rest, Seen{All: true}}) // whom it had seen is lost too (safety 23)
		}
		s.Roles[role] = row
	}
	return nil
}

// unknownResidues is what a frontend that vanished may have left in a role.
// Its stays are on the active, since no other opens without its ack; with the
// ack of a hold given it had none.
func (r rules) unknownResidues(row Row, id string, floor uint64, now time.Time) []Residue {
	if row.Phase != PhaseOpen && floor >= row.Epoch && row.Doubt == nil {
		return nil
	}
	on := []string{row.Active}
	if row.Active == "" || row.Doubt != nil {
		on = row.Members
	}
	var rest []Residue
	for _, backend := range on {
		rest = append(rest, Residue{Backend: backend, Frontend: id, Since: now, Why: "the frontend ended without a goodbye"})
	}
	return rest
}
