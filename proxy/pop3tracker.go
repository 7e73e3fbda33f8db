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
	// mayQuit: it has sent something that some server takes for QUIT (Dovecot
	// "QUIT x", Cyrus the rest of a line that it cuts at 8 KiB).
	mayQuit bool
	proven  bool

	// waiting are the commands that have no reply yet, oldest first. Above
	// mostWaiting, or behind a line that Cyrus cuts in two, they are not
	// followed any more (lost).
	waiting []pop3Reply
	lost    bool
	multi   bool // inside a multi-line reply
}

// pop3Reply is what a command is answered with.
type pop3Reply byte

const (
	pop3Single pop3Reply = iota
	pop3Multi            // if it is positive: lines up to a dot
	pop3Quit
)

// mostWaiting bounds the unanswered commands that a tracker follows.
const mostWaiting = 1024

func (d *pop3Dialect) tracker(*lineConn) splice.Tracker { return &pop3Tracker{} }

func (t *pop3Tracker) Up(p []byte) error {
	for len(p) > 0 {
		n, line := t.up.next(p)
		p = p[n:]
		if line {
			t.command(t.up.line(), t.up.long())
			t.up.reset()
		}
	}
	return nil
}

func (t *pop3Tracker) command(line []byte, long bool) {
	word, rest, _ := strings.Cut(string(bytes.TrimSpace(line)), " ")
	reply := pop3Single
	switch word = strings.ToUpper(word); word {
	case "QUIT":
		if rest == "" {
			t.quit = true
			reply = pop3Quit
		}
	case "RETR", "TOP", "CAPA":
		reply = pop3Multi
	case "LIST", "UIDL", "LANG", "AUTH":
		if rest == "" {
			reply = pop3Multi
		}
	}
	t.mayQuit = t.mayQuit || long || strings.HasPrefix(word, "QUIT")
	if long || len(t.waiting) == mostWaiting {
		t.lost, t.waiting = true, nil
	}
	if !t.lost {
		t.waiting = append(t.waiting, reply)
	}
}

func (t *pop3Tracker) Down(p []byte) []byte {
	for rest := p; len(rest) > 0; {
		n, line := t.down.next(rest)
		rest = rest[n:]
		if line {
			t.reply(t.down.line())
			t.down.reset()
		}
	}
	return p
}

func (t *pop3Tracker) reply(line []byte) {
	if t.multi {
		t.multi = string(line) != "."
		return
	}
	positive := bytes.HasPrefix(line, []byte("+OK"))
	if len(t.waiting) == 0 || !positive && !bytes.HasPrefix(line, []byte("-ERR")) {
		return
	}
	switch t.waiting[0] {
	case pop3Multi:
		t.multi = positive
	case pop3Quit:
		t.proven = positive
	}
	t.waiting = t.waiting[1:]
}

func (t *pop3Tracker) Farewell() []byte { return nil }
func (t *pop3Tracker) Midway() bool     { return false }
func (t *pop3Tracker) Leaving() bool    { return t.quit }
func (t *pop3Tracker) Nudge() []byte    { return nil }
func (t *pop3Tracker) Proven() bool     { return t.proven }

func (t *pop3Tracker) Ended(clean, _, eofProves bool) bool {
	if !t.mayQuit {
		return true // no QUIT, no UPDATE, nothing written
	}
	return t.proven || clean && eofProves
}

// LastWords: none; a response may be half sent, and POP3 has no untagged ones.
func (t *pop3Tracker) LastWords(splice.Cause) []byte { return nil }
