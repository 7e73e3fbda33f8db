package proxy

import (
	"bytes"
	"crypto/rand"
	"errors"
	"slices"
	"strings"

	"github.com/posthouse/posthouse/proxy/splice"
)

var errOddLiteral = errors.New("a literal of a length that makes no sense: where it ends cannot be told")

var errUnauthenticate = errors.New("UNAUTHENTICATE would let a second user in without a route (RFC 8437)")

var errCompress = errors.New("COMPRESS would hide the words that prove the session's end, see done in the configuration")

var errLongTag = errors.New("a tag so long that the command cannot be told")

// imapTracker follows a spliced IMAP session (design §4): where commands end,
// which have no answer yet, whether it is in IDLE, whether COMPRESS hides the
// rest.
type imapTracker struct {
	up, down lineScan
	// wordsOnly: only the backend's words prove its end, so COMPRESS must not
	// hide them. The backend is made to refuse it.
	wordsOnly bool

	// unanswered are the client's complete commands, oldest first. Above
	// mostWaiting they are not followed any more (lost).
	unanswered  []imapUnanswered
	lost        bool
	idling      bool // until DONE, or the end of IDLE
	compressing bool // COMPRESS is unanswered
	leaving     bool // LOGOUT was sent, and not refused
	// literal is the tag of a command whose synchronizing literal the backend
	// has neither asked for nor refused.
	literal string
	// opaque: COMPRESS is on; the stream is no text any more.
	opaque bool
	// bye: the last line of the backend was an untagged BYE.
	bye bool
	// said: the line before it was.
	said   bool
	proven bool
	// cut: the client is inside a command that will never be completed.
	cut bool

	tag  string // of our own LOGOUT, once it was said
	held []byte // of the backend's stream: what may become the answer to it
	out  []byte
}

// imapUnanswered is a command that the backend has not answered yet. Tags may
// be used twice: a backend answers the older one first.
type imapUnanswered struct{ tag, verb string }

func (d *imapDialect) tracker(b *lineConn) splice.Tracker {
	return &imapTracker{wordsOnly: b.provenByWords}
}

func (t *imapTracker) Up(p []byte) error {
	whole := t.up.atStart() // the line at hand lies in p from its start
	for len(p) > 0 && !t.opaque {
		n, line := t.up.next(p)
		part := p[:n]
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
			whole = false
			continue
		}
		if err := t.command(part, whole); err != nil {
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

// command takes a complete command, whose last physical line is part; whole
// says that it is its only one.
func (t *imapTracker) command(part []byte, whole bool) error {
	line := t.up.line()
	tag, verb := tagAndVerb(line)
	switch {
	case verb == "UNAUTHENTICATE":
		return errUnauthenticate
	case t.up.long() && bytes.Count(line, []byte(" ")) < 2:
		return errLongTag
	case t.idling:
		t.idling = !strings.EqualFold(string(line), "DONE")
		return nil
	case verb == "IDLE" && len(line) == len(tag)+len(" IDLE"):
		t.idling = true
	case verb == "COMPRESS" && t.wordsOnly:
		if !whole {
			return errCompress
		}
		part[len(tag)+1] = 'X' // an unknown command: the backend says BAD, and the client goes on without
		verb = "XOMPRESS"
	case verb == "COMPRESS":
		t.compressing = true
	case verb == "LOGOUT":
		t.leaving = true
	}
	if tag == "" || verb == "" {
		return nil // answered by an untagged BAD
	}
	if len(t.unanswered) == mostWaiting {
		t.lost, t.unanswered = true, nil
	}
	if !t.lost {
		t.unanswered = append(t.unanswered, imapUnanswered{tag, verb})
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
	t.said = t.bye
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
	i := slices.IndexFunc(t.unanswered, func(u imapUnanswered) bool { return u.tag == tag })
	if i < 0 {
		if tag == t.literal { // refused: the literal will not be sent
			t.literal = ""
			t.up.reset()
		}
		return
	}
	switch t.unanswered[i].verb {
	case "IDLE":
		t.idling = false
	case "COMPRESS":
		t.compressing = false
		t.opaque = status == "OK"
	case "LOGOUT":
		// Only behind a BYE (RFC 9051 §6.1.3): then it is the end.
		t.proven = status == "OK" && t.said
		t.bye = t.proven
		t.leaving = t.proven
	}
	t.unanswered = slices.Delete(t.unanswered, i, i+1)
}

func (t *imapTracker) Farewell() []byte {
	if t.opaque || t.compressing || t.leaving {
		return nil
	}
	if t.cut = !t.up.atStart(); t.cut {
		return nil
	}
	t.tag = "ph" + rand.Text()
	words := t.tag + " LOGOUT\r\n"
	if t.idling {
		words = "DONE\r\n" + words
	}
	return []byte(words)
}

func (t *imapTracker) Midway() bool { return !t.opaque && !t.up.atStart() }

func (t *imapTracker) Leaving() bool { return t.leaving }

func (t *imapTracker) Nudge() []byte {
	if t.idling {
		return []byte("\r\n")
	}
	return nil
}

// Proven is also true if the client was cut off inside a command and all
// before it are answered: what never gets complete is never executed.
func (t *imapTracker) Proven() bool {
	return t.proven || t.cut && !t.lost && !t.idling && len(t.unanswered) == 0
}

func (t *imapTracker) Ended(clean, halfClosed, eofProves bool) bool {
	switch {
	case t.Proven():
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
