// Package auth answers who a client is. Mechanisms collect credentials from a
// SASL exchange and judge nothing; verifiers judge credentials and know no
// protocol. Between the two stands Normalizer: one spelling per user.
package auth

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
)

var (
	// ErrCredentials means that the credentials are certainly wrong: an
	// unknown user, a wrong password and a name that no user can have all
	// look like this. It is the only error for which a client may be told so.
	ErrCredentials = errors.New("wrong user name or password")

	// ErrNotAuthorized means that the credentials may be right, but that
	// authcid must not act as authzid (RFC 4616 §2).
	ErrNotAuthorized = errors.New("not authorised to act as this user")
)

// Verifier judges credentials.
type Verifier interface {
	// Verify returns whom the session acts as, or ErrCredentials, or
	// ErrNotAuthorized (both possibly wrapped; test with errors.Is). Any other
	// error means that it could not tell: answer with a temporary code, never
	// as if the password were wrong. No error text holds a password.
	//
	// It honours ctx while it waits; a password hash that has begun is
	// finished (its cost is bounded when it is loaded).
	Verify(ctx context.Context, c Credentials) (Identity, error)
}

// Credentials are what a client said in one SASL exchange, unverified and as
// the client spelt it. They print without the password, with every verb.
type Credentials struct {
	// Mechanism is the SASL mechanism's registered name, "PLAIN" or "LOGIN".
	Mechanism string
	// Authzid is the user to act as; empty means Authcid (RFC 4616 §2).
	Authzid string
	// Authcid is the user whose password this is.
	Authcid string
	// Password is not empty and holds no NUL, CR or LF.
	Password string
}

// Format prints the names and hides the password, whatever the verb and flags.
func (c Credentials) Format(s fmt.State, _ rune) {
	fmt.Fprintf(s, "%s authzid=%q authcid=%q password=[redacted]", c.Mechanism, c.Authzid, c.Authcid)
}

// MarshalJSON hides the password from loggers that encode by reflection.
func (c Credentials) MarshalJSON() ([]byte, error) {
	return json.Marshal(fmt.Sprint(c))
}

// Identity is who a session is. It prints without the password.
type Identity struct {
	// User is whom the session acts as: the authzid if one was given and
	// authorised, else the authcid; normalised. The directory may know a more
	// canonical name still; that one is the key for routing.
	User string
	// Authcid is who proved something, normalised. It differs from User only
	// for a master.
	Authcid string
	// Credentials are kept for replay to a backend, with both names
	// normalised and Authzid empty where it equals Authcid. Never log them.
	Credentials Credentials
	// Verified says whether a verifier has checked the password. If not, the
	// login at the backend is the check (design: verification is the login in
	// the stay).
	Verified bool
}

// Format prints the names and hides the password, whatever the verb and flags.
func (id Identity) Format(s fmt.State, _ rune) {
	fmt.Fprintf(s, "user=%q authcid=%q verified=%t", id.User, id.Authcid, id.Verified)
}

// normalised returns c with both names in their canonical spelling, and
// Authzid empty if it says nothing new. A name that no user can have gives a
// *NameError for Authcid (ErrCredentials) and ErrNotAuthorized for Authzid.
func (c Credentials) normalised(names Normalizer) (Credentials, error) {
	authcid, err := names.Normalize(c.Authcid)
	if err != nil {
		return Credentials{}, fmt.Errorf("authcid: %w", err)
	}
	c.Authcid = authcid
	if c.Authzid == "" {
		return c, nil
	}
	authzid, err := names.Normalize(c.Authzid)
	if err != nil {
		return c, fmt.Errorf("authzid: %w: %s", ErrNotAuthorized, err.Error())
	}
	if authzid == authcid {
		authzid = ""
	}
	c.Authzid = authzid
	return c, nil
}

// identity is whom c acts as; c is normalised and its authzid authorised.
func (c Credentials) identity(verified bool) Identity {
	user := c.Authcid
	if c.Authzid != "" {
		user = c.Authzid
	}
	return Identity{User: user, Authcid: c.Authcid, Credentials: c, Verified: verified}
}
