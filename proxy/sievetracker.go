package proxy

import (
	"bytes"
	"strings"

	"github.com/posthouse/posthouse/proxy/splice"
)

// sieveTracker follows a spliced ManageSieve session (RFC 5804). Its LOGOUT
// has no tag: the proof is that the backend answers and then ends the stream
// by itself.
type sieveTracker struct {
	up, down lineScan
	quoted   bool // the client's line stands inside quotes
	escaped  bool // ... behind a backslash
	matched  int  // octets of UNAUTHENTICATE that the client's stream ends with

	logout  bool // the client has sent LOGOUT
	said    bool // we have
	pending int  // commands that have no final response yet
	odd     bool // a command was refused: to the backend it may have been several
	cut     bool // the client is inside a command that will never be completed
	final   bool // the backend's last line was a final response (OK, NO, BYE)
	bye     bool // it was a BYE
	held    []byte
	out     []byte
}

func (d *sieveDialect) tracker(*lineConn) splice.Tracker { return &sieveTracker{} }

func (t *sieveTracker) Up(p []byte) error {
	if t.unauthenticate(p) {
		return errUnauthenticate
	}
	for len(p) > 0 {
		inLiteral := t.up.literal > 0
		n, line := t.up.next(p)
		if !inLiteral {
			t.quote(p[:n])
		}
		p = p[n:]
		if !line {
			continue
		}
		m, quoted := t.up.marker(), t.quoted
		t.quoted, t.escaped = false, false
		if m.odd {
			return errOddLiteral
		}
		if m.found && !quoted {
			t.up.resume(m.octets)
			continue
		}
		verb, _, _ := bytes.Cut(bytes.TrimSpace(t.up.line()), []byte(" "))
		t.logout = t.logout || strings.EqualFold(string(verb), "LOGOUT")
		t.pending++
		t.up.reset()
	}
	return nil
}

// quote follows quoted strings; a marker inside them is none.
func (t *sieveTracker) quote(p []byte) {
	for _, b := range p {
		switch {
		case t.escaped:
			t.escaped = false
		case b == '\\':
			t.escaped = t.quoted
		case b == '"':
			t.quoted = !t.quoted
		}
	}
}

// unauthenticate looks for the word anywhere in the client's stream, scripts
// included: after an error Cyrus goes on with the next word, so that what is a
// string to us may be a command to it (measured on 3.6).
func (t *sieveTracker) unauthenticate(p []byte) bool {
	const word = "UNAUTHENTICATE"
	for _, b := range p {
		if b >= 'a' && b <= 'z' {
			b -= 'a' - 'A'
		}
		if t.matched == 4 && b != word[4] {
			t.matched = 1 // "UNAU" ends with "U"
		}
		switch b {
		case word[t.matched]:
			t.matched++
		case word[0]:
			t.matched = 1
		default:
			t.matched = 0
		}
		if t.matched == len(word) {
			t.matched = 0
			return true
		}
	}
	return false
}

// Down holds back a final response once we have said LOGOUT: it is our
// answer if nothing follows, the client's if something does.
func (t *sieveTracker) Down(p []byte) []byte {
	if !t.said {
		for rest := p; len(rest) > 0; {
			n, line := t.down.next(rest)
			rest = rest[n:]
			if line {
				t.response()
			}
		}
		return p
	}
	t.out = t.out[:0]
	for len(p) > 0 {
		if t.down.atStart() && t.final {
			t.out = append(t.out, t.held...)
			t.held = t.held[:0]
		}
		n, line := t.down.next(p)
		t.held = append(t.held, p[:n]...)
		p = p[n:]
		if line {
			t.response()
		}
		if !t.couldBeFinal() {
			t.out = append(t.out, t.held...)
			t.held = t.held[:0]
		}
	}
	return t.out
}

// couldBeFinal says that the line at hand is, or may become, a final response.
func (t *sieveTracker) couldBeFinal() bool {
	if t.down.atStart() {
		return t.final
	}
	head := bytes.ToUpper(t.down.head[:t.down.headLen])
	for _, word := range []string{"OK", "NO", "BYE"} {
		n := min(len(head), len(word))
		if string(head[:n]) == word[:n] {
			return true
		}
	}
	return false
}

func (t *sieveTracker) response() {
	if m := t.down.marker(); m.found {
		t.down.resume(m.octets)
		return
	}
	word, _, _ := bytes.Cut(t.down.line(), []byte(" "))
	w := strings.ToUpper(string(word))
	t.bye = w == "BYE"
	t.final = t.bye || w == "OK" || w == "NO"
	if t.final && t.pending > 0 {
		t.pending--
	}
	t.odd = t.odd || t.final && w != "OK"
	t.down.reset()
}

func (t *sieveTracker) Farewell() []byte {
	if t.logout {
		return nil
	}
	if t.cut = !t.up.atStart(); t.cut {
		return nil
	}
	t.said = true
	t.pending++
	t.final = false
	return []byte("LOGOUT\r\n")
}

func (t *sieveTracker) Midway() bool { return !t.up.atStart() }

func (t *sieveTracker) Leaving() bool { return t.logout }
func (t *sieveTracker) Nudge() []byte { return nil }

// Proven waits for the end of the stream, except where the client was cut off
// inside a command and all before it are answered: what never gets complete is
// never executed.
func (t *sieveTracker) Proven() bool { return t.cut && !t.odd && t.pending == 0 }

func (t *sieveTracker) Ended(clean, halfClosed, eofProves bool) bool {
	if t.Proven() {
		return true
	}
	if !clean {
		return false
	}
	answered := (t.said || t.logout) && t.pending == 0 && t.final
	return eofProves || !halfClosed && (answered || t.bye)
}

func (t *sieveTracker) LastWords(why splice.Cause) []byte {
	// After our LOGOUT the answer held back is a line of its own; before
	// anything can be said the stream must stand at a line's start.
	if t.logout || !t.down.atStart() {
		return nil
	}
	if t.bye {
		return t.held
	}
	switch why {
	case splice.ClientClosed, splice.ClientLost:
		return nil
	}
	return []byte(`BYE (TRYLATER) "` + farewellText(why) + "\"\r\n") // RFC 5804 §1.3, §2.3
}
