package auth

import (
	"bytes"
	"errors"
	"fmt"
	"strings"
	"unicode/utf8"

	"github.com/emersion/go-sasl"
)

// MaxMessage bounds one client message of an exchange, in octets after
// base64. Names end at MaxName; the rest is room for tokens that clients send
// as passwords.
const MaxMessage = 8192

// ErrMalformed means that a client's message breaks the mechanism's grammar:
// BAD in IMAP, and no failed attempt.
var ErrMalformed = errors.New("malformed SASL message")

// Mechanism is the server side of one SASL exchange. It collects and judges
// nothing. An instance serves one exchange of one goroutine.
type Mechanism interface {
	// Next takes the client's response, decoded from base64, and returns
	// either the next challenge or done. A nil response at the first call
	// means that the client sent no initial response; an empty one that it
	// sent an empty one. After done or an error, which is always an
	// ErrMalformed, the exchange is over. Next keeps no reference to response.
	Next(response []byte) (challenge []byte, done bool, err error)
	// Credentials returns what was collected, once Next has said done.
	Credentials() Credentials
}

// New starts an exchange of the named mechanism, in any case of letters; false
// if there is none of that name.
func New(name string) (Mechanism, bool) {
	switch strings.ToUpper(name) {
	case sasl.Plain:
		return newPlain(), true
	case sasl.Login:
		return &login{}, true
	}
	return nil, false
}

// Names lists the mechanisms that New knows, the preferred one first.
func Names() []string { return []string{sasl.Plain, sasl.Login} }

// plain is PLAIN (RFC 4616): one message, [authzid] NUL authcid NUL passwd.
type plain struct {
	server    sasl.Server
	asked     bool
	collected Credentials
}

func newPlain() *plain {
	p := &plain{}
	p.server = sasl.NewPlainServer(func(authzid, authcid, password string) error {
		p.collected = Credentials{Mechanism: sasl.Plain, Authzid: authzid, Authcid: authcid, Password: password}
		return nil
	})
	return p
}

func (p *plain) Next(response []byte) ([]byte, bool, error) {
	// go-sasl would answer nil with an empty challenge for ever.
	if response != nil || p.asked {
		if err := checkPlain(response); err != nil {
			return nil, false, err
		}
	}
	p.asked = true
	challenge, done, err := p.server.Next(response)
	if err != nil {
		return nil, false, fmt.Errorf("%w: a message after the last one", ErrMalformed)
	}
	return challenge, done, nil
}

func (p *plain) Credentials() Credentials { return p.collected }

// checkPlain is the grammar of RFC 4616 §2, with CR and LF refused as well:
// the password may have to go onto a line (G5).
func checkPlain(message []byte) error {
	if err := checkMessage(message); err != nil {
		return err
	}
	if bytes.Count(message, []byte{0}) != 2 {
		return fmt.Errorf("%w: PLAIN has exactly two NULs", ErrMalformed)
	}
	parts := bytes.Split(message, []byte{0})
	if len(parts[1]) == 0 || len(parts[2]) == 0 {
		return fmt.Errorf("%w: PLAIN with an empty user name or password", ErrMalformed)
	}
	return nil
}

// login is LOGIN (draft-murchison-sasl-login-00): two challenges, no authzid.
// An initial response is the user name.
type login struct {
	asked     bool // the user name was asked for
	done      bool
	collected Credentials
}

func (l *login) Next(response []byte) ([]byte, bool, error) {
	if response == nil && !l.asked {
		l.asked = true
		return []byte("Username:"), false, nil
	}
	l.asked = true
	if l.done {
		return nil, false, fmt.Errorf("%w: a message after the last one", ErrMalformed)
	}
	if err := checkMessage(response); err != nil {
		return nil, false, err
	}
	if len(response) == 0 || bytes.IndexByte(response, 0) >= 0 {
		return nil, false, fmt.Errorf("%w: LOGIN with an empty message or a NUL", ErrMalformed)
	}
	if l.collected.Authcid == "" {
		l.collected.Authcid = string(response)
		return []byte("Password:"), false, nil
	}
	l.done = true
	l.collected.Mechanism = sasl.Login
	l.collected.Password = string(response)
	return nil, true, nil
}

func (l *login) Credentials() Credentials {
	if !l.done {
		return Credentials{}
	}
	return l.collected
}

// checkMessage is what holds for every message of both mechanisms.
func checkMessage(message []byte) error {
	switch {
	case len(message) > MaxMessage:
		return fmt.Errorf("%w: longer than %d octets", ErrMalformed, MaxMessage)
	case !utf8.Valid(message):
		return fmt.Errorf("%w: not UTF-8", ErrMalformed)
	case bytes.ContainsAny(message, "\r\n"):
		return fmt.Errorf("%w: holds CR or LF", ErrMalformed)
	}
	return nil
}
