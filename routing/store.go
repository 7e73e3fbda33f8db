package routing

import (
	"context"
	"time"
)

// Store carries the State between frontends. It knows no rules: those are the
// pure functions of switch.go, which callers pass to Update. storetest holds
// the contract that every implementation passes.
type Store interface {
	// Join makes id a live frontend for as long as this process lives, before
	// it is written into the State. It fails if id was ever used before.
	// Liveness ends with Close or with the process, whichever comes first.
	Join(ctx context.Context, id string) error

	// Load reads the newest committed State, linearizably: what any Update
	// returned before Load was called is in it. An empty store gives an empty
	// State with Revision 0.
	Load(ctx context.Context) (*State, error)

	// Update applies change to a private copy of the newest State and commits
	// it as one compare-and-swap, durably, with Revision one higher. change
	// must be pure: it may be called with an older State first, and again when
	// somebody else committed in between; the last call counts. If change returns
	// an error for the newest State nothing is written and that error is returned.
	// The State returned is the committed one; nobody edits it.
	Update(ctx context.Context, change func(*State) error) (*State, error)

	// Watch sends the State whenever it has changed, the newest only, until
	// ctx ends; then the channel is closed. The first State comes at once. A
	// store that cannot be read sends nothing and tries again.
	Watch(ctx context.Context) <-chan *State

	// Gone returns those of ids that are proven to have ended. A frontend that
	// merely does not answer is not gone. One that joined through this Store is
	// if others were told so, which cannot be taken back.
	Gone(ctx context.Context, ids []string) ([]string, error)

	// Alive returns those of ids that show life now. The others may merely be
	// cut off from the store.
	Alive(ctx context.Context, ids []string) ([]string, error)

	// Deadline is until when Gone does not count this process's frontends as
	// ended, however long they are silent, with a margin for clocks: the zero
	// time if for ever. Who has a deadline must have nobody inside when it
	// passes.
	Deadline() time.Time

	// Campaign blocks until this process is the driver of switches, or ctx
	// ends. office ends when it is no longer: because resign was called, the
	// store was closed, or the store cannot vouch for it any more. Whoever
	// drives on for a moment does no harm, every step being a compare-and-swap.
	Campaign(ctx context.Context) (office context.Context, resign func(), err error)

	// Close ends this process's liveness and frees what the store holds.
	Close() error
}

// Directory maps a login name to the canonical user and the user's role.
type Directory interface {
	// Lookup says one of three things: found (nil error), certainly absent
	// (ErrUnknownUser), could not tell (any other error). It honours ctx.
	Lookup(ctx context.Context, name string) (Entry, error)
}

// Entry is what a Directory knows of a user.
type Entry struct {
	// User is the canonical name: the only key of the gate, and what the
	// backend gets.
	User string
	// Role is the user's role.
	Role string
}
