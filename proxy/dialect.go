package proxy

import (
	"net/netip"
	"strings"

	"github.com/posthouse/posthouse/proxy/auth"
	"github.com/posthouse/posthouse/proxy/splice"
)

// dialect is one protocol's words. Its methods stand in the order in which a
// login calls them. It decides nothing: whether TLS is required, which
// mechanisms exist and how often a client may try is session.go's.
//
// A dialect belongs to one session and may remember what its protocol demands
// (IMAP: whether the client asked for CAPABILITY; POP3: the name that USER
// gave). Errors that it returns are *Error, or Unavailable.
type dialect interface {
	// greet sends the banner; again is true after STARTTLS, where only
	// ManageSieve speaks unasked (RFC 5804 §2.2).
	greet(c *lineConn, o offer, again bool) error
	// next reads commands and answers those that need no backend, until the
	// client wants TLS or gives credentials. errClientLeft: it left.
	next(c *lineConn, o offer) (request, error)
	// challenge plays one SASL round trip: text goes out, the decoded
	// response comes back. Cancelled and Malformed are the client's faults.
	challenge(c *lineConn, text []byte) ([]byte, error)
	// proceed answers a request for TLS with "go ahead".
	proceed(c *lineConn, req request) error
	// refuse answers req with the protocol's own code for why.
	refuse(c *lineConn, req request, why Reason) error

	opening
	// logIn plays the client to a backend that meet has met. Only a positive
	// reply that it parsed itself ends it without error.
	logIn(b *lineConn, announced []string, as auth.Credentials, from origin) (welcome, error)
	// admit tells the client of its success, in the words the backend chose.
	admit(c *lineConn, req request, w welcome) error

	// tracker returns what follows a session with b from here to its end.
	tracker(b *lineConn) splice.Tracker
}

// opening is how a conversation with a backend begins, and how it ends before
// any login.
type opening interface {
	// meet reads a backend's greeting, starts TLS if the backend's
	// configuration demands it, and returns what the backend announces
	// before login.
	meet(b *lineConn) ([]string, error)
	partingWords() string
}

// request is what a client wants that session.go must decide about.
type request struct {
	// tag is IMAP's; empty elsewhere.
	tag string
	// startTLS: the client wants TLS. Otherwise it gives credentials:
	startTLS bool
	// mechanism is a SASL mechanism in upper case. IMAP LOGIN and POP3
	// USER/PASS are PLAIN with an initial response.
	mechanism string
	// initial is the decoded initial response; nil if there was none, empty
	// if it was the empty one ("=").
	initial []byte
}

// offer is what we announce before login.
type offer struct {
	hostname string
	// startTLS: the connection can still be upgraded.
	startTLS bool
	// mechanisms are the SASL names; none while credentials would cross the
	// network in plaintext.
	mechanisms []string
	// shared holds what every active backend announces before login, in the
	// protocol's own tokens or lines.
	shared []string
}

// origin says where a client comes from. Backends that believe us are told.
type origin struct {
	client, local netip.AddrPort
	session       string
	secure        bool
}

// welcome is what a backend said to a successful login.
type welcome struct {
	// text is the human part of its positive reply, free of control
	// characters.
	text string
	// capabilities are those after login, less what must not be offered.
	capabilities []string
}

// mostText bounds the human part of an answer: RFC 1939 §3 allows 512 octets
// with the status and CRLF.
const mostText = 500

// printable makes a backend's words fit for a client: valid UTF-8 without
// control characters, not too long.
func printable(text string) string {
	text = strings.Map(func(c rune) rune {
		if c < ' ' || c == 0x7f || c == '\uFFFD' {
			return -1
		}
		return c
	}, text)
	if len(text) > mostText {
		text = strings.ToValidUTF8(text[:mostText], "")
	}
	return text
}
