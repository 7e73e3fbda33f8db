package config

import "maps"

// Role is a group of mailboxes that lives on one backend at a time.
type Role struct {
	// Members are the backends that hold a copy, each once; at least one.
	Members []string `yaml:"members"`
	// Active is the member that serves the role at first. It seeds an empty
	// store only; afterwards the table decides.
	Active string `yaml:"active"`
	// Hooks are the programs that a switch of the role runs. Default: none.
	Hooks Hooks `yaml:"hooks"`
	// CatchUp compares the old active and the new one in a switch, after the
	// hook catch_up.
	CatchUp CatchUp `yaml:"catch_up"`
	// Scope says what the hooks touch. backend (default): the backend as a
	// whole, so that all roles which it serves are switched together. role:
	// nothing that other roles use.
	Scope string `yaml:"scope"`
}

// CatchUp is a comparison of both members: the new one is not promoted before
// it has what the old one has. It wants a proxy user at all members.
type CatchUp struct {
	// Type is imap; empty (default): nothing is compared.
	Type string `yaml:"type"`
	// Parallel is how many users are compared at a time. Default 8.
	Parallel int `yaml:"parallel"`
	// Rate is how many logins each backend is asked for in a second, at most; 0
	// for no limit. Default 200.
	Rate int `yaml:"rate"`
	// Users is a program with its arguments that prints all users of the roles in
	// POSTHOUSE_ROLES, one in a line, run without a shell where anybody's mail may
	// have changed. Default: those in the files of Config.Directory.
	Users []string `yaml:"users"`
}

// Replica are the services that a backend has, for reading, while it must not
// take users: for the comparison of Role.CatchUp. TLS is as for the others.
type Replica struct {
	// IMAP is its host:port. Where nobody listens there the comparison asks
	// Backend.IMAP, and Backend.Sieve. Default: none.
	IMAP string `yaml:"imap"`
	// Sieve is that of ManageSieve. Default: none, and scripts are not compared
	// while it is a replica.
	Sieve string `yaml:"sieve"`
}

// CatchUpIMAP is the value of CatchUp.Type.
const CatchUpIMAP = "imap"

// Hooks are programs with their arguments, run without a shell: see
// hookrun.Runner for what they get and say. Each may be left out.
type Hooks struct {
	// Demote makes the old active take no writes any more; afterwards nothing
	// of the past runs there.
	Demote []string `yaml:"demote"`
	// Prove shows that nothing of the past runs on the old active.
	Prove []string `yaml:"prove"`
	// CatchUp brings the new active up to date.
	CatchUp []string `yaml:"catch_up"`
	// Promote makes the new active take writes.
	Promote []string `yaml:"promote"`
	// Fence makes sure, in a failover, that the dead active is off and stays off.
	Fence []string `yaml:"fence"`
	// Rejoin makes a member that a failover has left behind a copy of the
	// active again.
	Rejoin []string `yaml:"rejoin"`
	// UndoDemote and UndoPromote turn an abort back.
	UndoDemote  []string `yaml:"undo_demote"`
	UndoPromote []string `yaml:"undo_promote"`
}

// ByName returns the hooks that there are, by the name of their key.
func (h Hooks) ByName() map[string][]string {
	all := map[string][]string{"demote": h.Demote, "prove": h.Prove, "catch_up": h.CatchUp, "promote": h.Promote,
		"undo_demote": h.UndoDemote, "undo_promote": h.UndoPromote, "fence": h.Fence, "rejoin": h.Rejoin}
	maps.DeleteFunc(all, func(_ string, argv []string) bool { return len(argv) == 0 })
	return all
}

// Values of Role.Scope.
const (
	ScopeBackend = "backend"
	ScopeRole    = "role"
)
