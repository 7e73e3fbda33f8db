package proxy

import (
	"errors"
	"fmt"
	"strings"
)

// Reason says why a client is refused. Each dialect has its protocol's own
// code for it; Op and Err of the Error go to the log only.
type Reason int

const (
	// Unavailable is everything that is not certain to be the client's
	// fault: temporary, try again later. What is no *Error is Unavailable.
	Unavailable Reason = iota
	// WrongCredentials: the password is wrong, or there is no such user;
	// the two look the same to the client (RFC 5530 §3 AUTHENTICATIONFAILED).
	WrongCredentials
	// NotAuthorized: the credentials are right, but not for that authzid
	// (RFC 4616 §2, RFC 5530 §3 AUTHORIZATIONFAILED).
	NotAuthorized
	// PrivacyRequired: plaintext credentials without TLS.
	PrivacyRequired
	// TooMany: too many failures or unknown commands; the connection closes.
	TooMany
	// TooLong: a line or literal over the limit; the connection closes,
	// because where the next command starts is no longer known.
	TooLong
	// TimedOut: no login within preauth_timeout; the connection closes.
	TimedOut
	// Cancelled: the client gave up the SASL exchange by "*".
	Cancelled
	// Malformed: the SASL response was no base64, or no message of the
	// mechanism; or what should have been a TLS handshake came to none.
	Malformed
	// UnknownMechanism: a SASL mechanism that we do not offer.
	UnknownMechanism
	// Pipelined: bytes followed STARTTLS before TLS began; the connection
	// closes (RFC 9051 §11.1, CVE-2011-0411).
	Pipelined
	// InUse: the backend said that another session holds the mailbox.
	InUse
	// LoginDelay: the backend said that the user logs in too often.
	LoginDelay
	// ShuttingDown: this frontend stops; the connection closes.
	ShuttingDown
	// Overloaded: connection limits of this frontend; the connection closes.
	Overloaded
	// Misconfigured: posthouse and the backend do not fit together (the
	// backend demands TLS, offers no PLAIN, ...). Temporary for the client,
	// an alarm for the operator.
	Misconfigured
	// RoleDisagreement: the backend refers the user to another one. Only the
	// role table says where a user is: temporary for the client, an alarm for
	// the operator.
	RoleDisagreement
)

var reasonNames = [...]string{
	"unavailable", "wrong_credentials", "not_authorized", "privacy_required", "too_many", "too_long", "timed_out",
	"cancelled", "malformed", "unknown_mechanism", "pipelined", "in_use", "login_delay", "shutting_down", "overloaded",
	"misconfigured", "role_disagreement",
}

// String gives the reason's name in logs and metrics.
func (r Reason) String() string {
	if int(r) < len(reasonNames) {
		return reasonNames[r]
	}
	return fmt.Sprintf("reason(%d)", int(r))
}

// alarms says whether the operator has to do something about it.
func (r Reason) alarms() bool { return r == Misconfigured || r == RoleDisagreement }

// closes says whether the client's connection ends with this refusal.
func (r Reason) closes() bool {
	switch r {
	case TooMany, TooLong, TimedOut, Pipelined, ShuttingDown, Overloaded:
		return true
	}
	return false
}

// Error is a failure with its two faces: Reason for the client, Op (what was
// being done) and Err for the log.
type Error struct {
	Reason Reason
	Op     string
	Err    error
}

func (e *Error) Error() string {
	switch {
	case e.Err == nil && e.Op == "":
		return e.Reason.String()
	case e.Err == nil:
		return e.Op + ": " + e.Reason.String()
	case e.Op == "":
		return e.Err.Error()
	}
	return e.Op + ": " + e.Err.Error()
}

func (e *Error) Unwrap() error { return e.Err }

// failf makes an *Error from a format.
func failf(reason Reason, op, format string, args ...any) *Error {
	return &Error{Reason: reason, Op: op, Err: fmt.Errorf(format, args...)}
}

// reasonOf gives the reason of err: Unavailable unless an *Error says
// otherwise.
func reasonOf(err error) Reason {
	var e *Error
	if errors.As(err, &e) {
		return e.Reason
	}
	return Unavailable
}

// errClientLeft: the client ended the connection in good order (LOGOUT, QUIT
// or EOF between commands). Nothing is answered and nothing is wrong.
var errClientLeft = errors.New("client left")

// ofBackend gives an error on the way to a backend the face that a client may
// see: what the backend did to us (a line too long, silence, an early end) is
// not the client's doing.
func ofBackend(op string, err error) error {
	reason := reasonOf(err)
	switch {
	case errors.Is(err, errClientLeft):
		return failf(Unavailable, op, "the backend closed the connection")
	case reason == Pipelined: // somebody in between, or a server that must not be trusted
		reason = Misconfigured
	case reason == WrongCredentials || reason == InUse || reason == LoginDelay || reason == Misconfigured || reason == RoleDisagreement:
	default:
		reason = Unavailable
	}
	return &Error{Reason: reason, Op: op, Err: err}
}

// soundsTemporary says whether a backend that has no codes for it speaks of a
// fault and not of a wrong password: Cyrus says "generic failure" while
// saslauthd is down.
func soundsTemporary(text string) bool {
	text = strings.ToLower(text)
	for _, words := range []string{"generic failure", "temporar", "unavailable", "try again", "internal error"} {
		if strings.Contains(text, words) {
			return true
		}
	}
	return false
}
