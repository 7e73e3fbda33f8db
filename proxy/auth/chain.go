package auth

import (
	"context"
	"errors"
)

// Backend verifies nothing itself: the login at the user's backend, inside
// the stay, is the verification (safety case 31).
type Backend struct {
	// Names gives login names their canonical spelling.
	Names Normalizer
}

// Verify returns an Identity that is not Verified and holds the credentials to
// replay. To act as another user is ErrNotAuthorized: nobody here could say
// who may.
func (b *Backend) Verify(_ context.Context, c Credentials) (Identity, error) {
	c, err := c.normalised(b.Names)
	if err != nil {
		return Identity{}, err
	}
	if c.Authzid != "" {
		return Identity{}, ErrNotAuthorized
	}
	return c.identity(false), nil
}

// Chain asks one verifier after the other.
//
// The first that knows the credentials decides: with an Identity, or with
// ErrNotAuthorized (the password was right, so nobody else is asked).
// ErrCredentials falls on to the next. One that could not tell falls on, too,
// but is remembered: if nobody knows the credentials then, the answer is its
// error and not ErrCredentials, for a fault of ours must never look like a
// wrong password (G6). An empty Chain could not tell.
type Chain []Verifier

// Verify asks the verifiers in their order.
func (c Chain) Verify(ctx context.Context, creds Credentials) (Identity, error) {
	if len(c) == 0 {
		return Identity{}, errors.New("no verifier is configured")
	}
	var unsure error
	for _, v := range c {
		id, err := v.Verify(ctx, creds)
		switch {
		case err == nil, errors.Is(err, ErrNotAuthorized):
			return id, err
		case errors.Is(err, ErrCredentials):
		default:
			unsure = errors.Join(unsure, err)
		}
	}
	if unsure != nil {
		return Identity{}, unsure
	}
	return Identity{}, ErrCredentials
}
