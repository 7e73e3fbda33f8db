package routing

import (
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"
)

// historyLimit bounds State.History. Operators read the last few switches;
// the full story is in the logs.
const historyLimit = 64

// errNothing tells an Update that there is nothing to commit.
var errNothing = errors.New("nothing to change")

// rules are the pure rules of the role table. Each method takes a private copy
// of the State and edits it, or returns an error that wraps ErrConflict, names
// the guard that refused and says what to do. The zero value is what runs; the
// explorer takes one guard away and shows that safety goes with it.
type rules struct {
	without string
}

// change is what the guards of a rule judge.
type change struct {
	s    *State
	role string
	row  Row
	to   string
	// number of the switch that begins.
	number uint64
	// isFenced: the old active is proven to be off, or nobody needs proof.
	isFenced bool
	// acceptStale: the new active may be stale.
	acceptStale bool
	// proves: a hook may clear the residues on the old active.
	proves bool
	// with are the roles that are failed over together.
	with []string
	// touches: a hook may restart either backend.
	touches bool
}

// A guard is one condition of a change. in returns "" if it holds, else what
// is in the way and what to do.
type guard struct {
	name string
	in   func(c change) string
}

func (r rules) check(c change, guards []guard) error {
	for _, g := range guards {
		if g.name == r.without {
			continue
		}
		if in := g.in(c); in != "" {
			return fmt.Errorf("%w: role %s: %s: %s", ErrConflict, c.role, g.name, in)
		}
	}
	return nil
}

// row looks a role up for a change.
func (s *State) row(role string) (Row, error) {
	row, ok := s.Roles[role]
	if !ok {
		return Row{}, fmt.Errorf("%w: the table has no role %q: see `posthouse roles`, or `posthouse roles init %s --active BACKEND`",
			ErrConflict, role, role)
	}
	return row, nil
}

// The guards of an OPEN to the new active.
var openGuards = []guard{
	{"every registered frontend has acked", func(c change) string {
		if missing := c.s.missingAcks(c.role); len(missing) > 0 {
			return fmt.Sprintf("no ack from frontend %s: is it running, and do its sessions drain?", strings.Join(missing, ", "))
		}
		return ""
	}},
	{"no residue on another backend", func(c change) string {
		if rest := residuesElsewhere(c.row, c.to); len(rest) > 0 {
			return residueText(c.role, rest)
		}
		return ""
	}},
}

// The guards of a step from HOLD towards OPEN. They protect order, not I1.
var advanceGuards = []guard{
	{"the role is being switched", func(c change) string {
		if c.row.Switch == nil || c.row.Phase == PhaseOpen || c.row.Phase == PhaseAbort {
			return fmt.Sprintf("its phase is %s: begin with `posthouse switch`", c.row.Phase)
		}
		return ""
	}},
	inNoDoubt,
}

var holdGuards = []guard{
	inNoDoubt,
	{"no switch is in progress", func(c change) string {
		if c.row.Phase != PhaseOpen {
			return fmt.Sprintf("switch %d to %s is in phase %s: wait for its end", c.row.Switch.Number, c.row.Switch.To, c.row.Phase)
		}
		return ""
	}},
	{"no other switch is being prepared", func(c change) string {
		if q := c.row.Request; q != nil && q.Number != c.number {
			return fmt.Sprintf("switch %d to %s is being prepared: wait, or `posthouse switch --abort %s`", q.Number, q.To, c.role)
		}
		return ""
	}},
	{"the new active is a member", func(c change) string {
		if !slices.Contains(c.row.Members, c.to) {
			return fmt.Sprintf("%q is not one of %s: choose one of these, or add it to the role's members in every frontend's configuration",
				c.to, strings.Join(c.row.Members, ", "))
		}
		return ""
	}},
	{"the new active is another one", func(c change) string {
		if c.row.Active == c.to {
			return c.to + " is active already"
		}
		return ""
	}},
	{"the new active is not stale", func(c change) string {
		if stale, ok := c.row.Stale[c.to]; ok && !c.acceptStale {
			return fmt.Sprintf("%s was left behind by switch %d at %s: `posthouse rejoin %s %s` first; if nobody is left to rejoin, failover and "+
				"roles init take --accept-stale", c.to, stale.Number, stale.Since.UTC().Format(time.DateTime), c.role, c.to)
		}
		return ""
	}},
	{"every registered frontend knows the new active", func(c change) string {
		for _, id := range sortedKeys(c.s.Frontends) {
			if !slices.Contains(c.s.Frontends[id].Backends, c.to) {
				return fmt.Sprintf("frontend %s has no backend %s in its configuration: add it there and restart it", id, c.to)
			}
		}
		return ""
	}},
	noRejoin,
	{"no other switch is under way there", func(c change) string {
		for _, other := range c.s.inMotion() {
			with, sw := c.s.Roles[other].Active, c.s.Roles[other].Switch
			if other == c.role || sw == nil || sw.Number == c.number || slices.Contains(c.with, other) {
				continue
			}
			meet := func(backend string) bool { return backend != "" && (backend == with || backend == sw.To) }
			if (c.touches || touchesBackend(sw.Hooks, sw.Scope)) && (meet(c.to) || meet(c.row.Active)) {
				return fmt.Sprintf("switch %d of role %s is, and hooks may restart what both use: try again when it has ended", sw.Number, other)
			}
		}
		return ""
	}},
	{"no residue would block the switch", func(c change) string {
		rest := residuesElsewhere(c.row, c.to)
		if c.proves {
			rest = slices.DeleteFunc(rest, func(r Residue) bool { return r.Backend == c.row.Active })
		}
		if len(rest) > 0 {
			return residueText(c.role, rest)
		}
		return ""
	}},
}

// noRejoin: whoever is being overwritten must not serve.
var noRejoin = guard{"nothing rejoins at the new active", func(c change) string {
	for _, other := range sortedKeys(c.s.Roles) {
		stale := c.s.Roles[other].Stale[c.to]
		if stale.RejoinBy != "" && (other == c.role || stale.RejoinScope != ScopeRole) {
			if _, lives := c.s.Frontends[stale.RejoinBy]; lives {
				return fmt.Sprintf("frontend %s makes %s a copy of the active of role %s at the moment: wait for its end, or stop it", stale.RejoinBy, c.to, other)
			}
		}
	}
	return ""
}}

var inNoDoubt = guard{"the role is not in doubt", func(c change) string {
	if c.row.Doubt != nil {
		return fmt.Sprintf("%s: decide with `posthouse roles init %s --active BACKEND`", c.row.Doubt.Why, c.role)
	}
	return ""
}}

// missingAcks names the registered frontends that have not yet promised that
// nobody is inside the role below its epoch.
func (s *State) missingAcks(role string) []string {
	var missing []string
	for _, id := range sortedKeys(s.Frontends) {
		if s.Frontends[id].Floors[role] < s.Roles[role].Epoch {
			missing = append(missing, id)
		}
	}
	return missing
}

// residuesElsewhere are those that keep a role from opening on backend.
func residuesElsewhere(row Row, backend string) []Residue {
	isOff := "" // on the operator's word
	if row.Switch != nil && row.Switch.AcceptLoss {
		isOff = row.Active
	}
	var rest []Residue
	for _, r := range row.Residues {
		if r.Backend != backend && r.Backend != isOff {
			rest = append(rest, r)
		}
	}
	return rest
}

// residueText names the first few residues: a switch of a busy role can leave
// thousands.
func residueText(role string, rest []Residue) string {
	var b strings.Builder
	for i, r := range rest {
		if i == 5 {
			fmt.Fprintf(&b, " and %d more", len(rest)-i)
			break
		}
		if i > 0 {
			b.WriteString(", ")
		}
		user := r.User
		if user == "" {
			user = "an unknown user"
		}
		fmt.Fprintf(&b, "work of %s may still run on %s (%s; frontend %s, %s)", user, r.Backend, r.Why, r.Frontend, r.Since.UTC().Format("15:04:05Z"))
	}
	fmt.Fprintf(&b, ": look there for processes of users of %s, then switch with --confirmed-clean", role)
	return b.String()
}

// mostResidues bounds those of a role on one backend, which have to fit into the
// store with an ack: a backend that hangs leaves one for each of its users.
const mostResidues = 500

// mergeResidues adds new ones; equal (backend, user) become one. It keeps the
// later Since, because age counts from the last that may have begun. Where there
// are too many they become one of an unknown user.
func mergeResidues(old, add []Residue) []Residue {
	out := slices.Clone(old)
	type key struct{ backend, user string }
	at := make(map[key]int, len(out)+len(add))
	for i, r := range out {
		at[key{r.Backend, r.User}] = i
	}
	for _, r := range add {
		k := key{r.Backend, r.User}
		if i, ok := at[k]; ok {
			if r.Since.After(out[i].Since) {
				out[i] = r
			}
			continue
		}
		at[k] = len(out)
		out = append(out, r)
	}
	return boundResidues(out)
}

func boundResidues(list []Residue) []Residue {
	count, last := make(map[string]int), make(map[string]Residue)
	for _, r := range list {
		if count[r.Backend]++; count[r.Backend] == 1 || r.Since.After(last[r.Backend].Since) {
			last[r.Backend] = r
		}
	}
	for backend, n := range count {
		if n <= mostResidues {
			continue
		}
		list = slices.DeleteFunc(list, func(r Residue) bool { return r.Backend == backend })
		all := last[backend]
		if all.User != "" {
			all.User, all.Why = "", fmt.Sprintf("there were %d, the last: %s", n, all.Why)
		}
		list = append(list, all)
	}
	return list
}

func sortedKeys[V any](m map[string]V) []string {
	keys := make([]string, 0, len(m))
	for k := range m {
		keys = append(keys, k)
	}
	slices.Sort(keys)
	return keys
}
