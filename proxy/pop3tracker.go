package proxy

import (
	"bytes"
	"strings"

	"github.com/posthouse/posthouse/proxy/splice"
)

// pop3Tracker follows a spliced POP3 session. It writes to the mailbox only in
// the UPDATE state, which only QUIT enters (RFC 1939 §6): without QUIT a
// session can be cut anywhere, after it the reply is the proof.
type pop3Tracker struct {
	up, down lineScan
	quit     bool // the client has sent QUIT
	replied  bool // the backend's last line is a reply
}

func (d *pop3Dialect) tracker() splice.Tracker { return &pop3Tracker{} }

func (t *pop3Tracker) Up(p []byte) error {
	for len(p) > 0 {
		n, line := t.up.next(p)
		p = p[n:]
		if line {
			t.quit = t.quit || strings.EqualFold(string(bytes.TrimSpace(t.up.line())), "QUIT")
			t.up.reset()
		}
	}
	return nil
}

func (t *pop3Tracker) Down(p []byte) []byte {
	for rest := p; len(rest) > 0; {
		n, line := t.down.next(rest)
		rest = rest[n:]
		if line {
			head := t.down.line()
			t.replied = bytes.HasPrefix(head, []byte("+OK")) || bytes.HasPrefix(head, []byte("-ERR"))
			t.down.reset()
		}
	}
	return p
}

func (t *pop3Tracker) Farewell() []byte { return nil }
func (t *pop3Tracker) Leaving() bool    { return t.quit }
func (t *pop3Tracker) Nudge() []byte    { return nil }

// Proven waits for the end of the stream: that a reply is QUIT's and not an
// earlier, pipelined command's shows only there.
func (t *pop3Tracker) Proven() bool { return false }

func (t *pop3Tracker) Ended(clean, halfClosed, eofProves bool) bool {
	if !t.quit {
		return true // no QUIT, no UPDATE, nothing written
	}
	return clean && (eofProves || t.replied && !halfClosed)
}

// LastWords: none; a response may be half sent, and POP3 has no untagged ones.
func (t *pop3Tracker) LastWords(splice.Cause) []byte { return nil }
