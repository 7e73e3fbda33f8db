package proxy

import (
	"bytes"
	"crypto/rand"
	"errors"
	"strings"

	"github.com/posthouse/posthouse/proxy/splice"
)

var errOddLiteral = errors.New("a literal of a length that makes no sense: where it ends cannot be told")

var errUnauthenticate = errors.New("UNAUTHENTICATE would let a second user in without a route (RFC 8437)")

// imapTracker follows a spliced IMAP session (design §4): where commands end,
// whether it is in IDLE, whether COMPRESS hides the rest.
type imapTracker struct {
	up, down lineScan

	// Tags of the client's commands whose answers change how to end; empty
	// where there is none in progress.
	idle, compress, logout string
	idling                 bool
	// literal is the tag of a command whose synchronizing literal the backend
	// has neither asked for nor refused.
	literal string
	// opaque: COMPRESS is on; the stream is no text any more.
	opaque bool
	// bye: the last line of the backend was an untagged BYE.
	bye    bool
	proven bool

	tag  string // of our own LOGOUT, once it was said
	held []byte // of the backend's stream: what may become the answer to it
	out  []byte
}

func (d *imapDialect) tracker() splice.Tracker { return &imapTracker{} }

func (t *imapTracker) Up(p []byte) error {
	whole := t.up.atStart() // the line at hand lies in p from its start
	for len(p) > 0 && !t.opaque {
		n, line := t.up.next(p)
		p = p[n:]
		if !line {
			continue
		}
		m := t.up.marker()
		if m.odd {
			return errOddLiteral
		}
		if m.found && !t.idling {
			if m.sync {
				t.literal, _ = tagAndVerb(t.up.line())
			}
			t.up.resume(m.octets)
			continue
		}
		if err := t.command(t.up.line()); err != nil {
			if whole {
				t.up.reset() // nothing of it has gone out
			}
			return err
		}
		t.up.reset()
		whole = true
	}
	return nil
}

func (t *imapTracker) command(line []byte) error {
	if t.idling {
		t.idling = !strings.EqualFold(string(line), "DONE")
		return nil
	}
	tag, verb := tagAndVerb(line)
	switch verb {
	case "IDLE":
		t.idle, t.idling = tag, true
	case "COMPRESS":
		t.compress = tag
	case "LOGOUT":
		t.logout = tag
	case "UNAUTHENTICATE":
		return errUnauthenticate
	}
	return nil
}

// tagAndVerb splits the head of a command; verb is in upper case.
func tagAndVerb(line []byte) (tag, verb string) {
	t, rest, _ := bytes.Cut(line, []byte(" "))
	v, _, _ := bytes.Cut(rest, []byte(" "))
	return string(t), strings.ToUpper(string(v))
}

func (t *imapTracker) Down(p []byte) []byte {
	if t.tag == "" {
		for rest := p; len(rest) > 0 && !t.opaque; {
			n, line := t.down.next(rest)
			rest = rest[n:]
			if line {
				t.response()
			}
		}
		return p
	}
	t.out = t.out[:0]
	for len(p) > 0 && !t.proven {
		n, line := t.down.next(p)
		part := p[:n]
		p = p[n:]
		if t.ours() {
			// A line that begins as ours would: nothing of it is passed on
			// before it is known.
			t.held = append(t.held, part...)
			if line && t.down.headLen > len(t.tag) {
				t.proven = true
				t.down.reset()
				break
			}
			continue
		}
		t.out = append(append(t.out, t.held...), part...)
		t.held = t.held[:0]
		if line {
			t.response()
		}
	}
	return t.out
}

// ours says that the current line is, or may become, the answer to our LOGOUT.
func (t *imapTracker) ours() bool {
	head := t.down.head[:t.down.headLen]
	want := t.tag + " "
	n := min(len(head), len(want))
	return t.down.literal == 0 && n > 0 && string(head[:n]) == want[:n]
}

// response looks at a line of the backend that has ended.
func (t *imapTracker) response() {
	if m := t.down.marker(); m.found {
		t.down.resume(m.octets)
		return
	}
	line := t.down.line()
	t.bye = len(line) >= 5 && strings.EqualFold(string(line[:5]), "* BYE")
	if len(line) > 0 && line[0] == '+' {
		t.literal = ""
	}
	if tag, status := tagAndVerb(line); tag != "" && tag != "*" && tag != "+" {
		t.tagged(tag, status)
	}
	t.down.reset()
}

func (t *imapTracker) tagged(tag, status string) {
	switch tag {
	case t.literal: // refused: the literal will not be sent
		t.literal = ""
		t.up.reset()
	case t.idle:
		t.idle, t.idling = "", false
	case t.compress:
		t.compress = ""
		t.opaque = status == "OK"
	case t.logout:
		t.proven = true
		t.bye = true // it came before this line (RFC 9051 §6.1.3)
	}
}

func (t *imapTracker) Farewell() []byte {
	if t.opaque || t.compress != "" || t.logout != "" || !t.up.atStart() {
		return nil
	}
	t.tag = "ph" + rand.Text()
	words := t.tag + " LOGOUT\r\n"
	if t.idling {
		words = "DONE\r\n" + words
	}
	return []byte(words)
}

func (t *imapTracker) Leaving() bool { return t.logout != "" }

func (t *imapTracker) Nudge() []byte {
	if t.idling {
		return []byte("\r\n")
	}
	return nil
}

func (t *imapTracker) Proven() bool { return t.proven }

func (t *imapTracker) Ended(clean, halfClosed, eofProves bool) bool {
	switch {
	case t.proven:
		return true
	case !clean:
		return false
	case eofProves:
		return true
	}
	// A backend that says BYE unasked has ended the session itself.
	return t.bye && !halfClosed
}

func (t *imapTracker) LastWords(why splice.Cause) []byte {
	if t.opaque || t.bye || !t.down.atStart() {
		return nil
	}
	switch why {
	case splice.ClientClosed, splice.ClientLost:
		return nil
	}
	return []byte("* BYE [UNAVAILABLE] " + farewellText(why) + "\r\n") // RFC 3501 §3.4, RFC 5530 §3
}

// farewellText tells a client why its session ends.
func farewellText(why splice.Cause) string {
	switch why {
	case splice.Idle:
		return "Idle for too long, please connect again"
	case splice.Revoked:
		return "Your mailbox is being moved, please connect again"
	case splice.ShuttingDown:
		return "This frontend is being restarted, please connect again"
	case splice.Kicked:
		return "Disconnected by the administrator"
	case splice.Forbidden:
		return "This command is not possible here"
	}
	return "The mail server has closed the connection, please try again"
}
