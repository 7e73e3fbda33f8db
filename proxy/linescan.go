package proxy

import (
	"bytes"
	"strconv"
)

// lineScan cuts a spliced stream into the lines of IMAP or ManageSieve and
// skips their literals, without keeping more than the head of a line. It only
// watches: what it sees has been passed on or will be.
type lineScan struct {
	head    [96]byte // the first octets of the logical line
	headLen int
	tail    [24]byte // the last octets of the physical line: literal marker and line end
	tailLen int
	begun   bool   // inside a logical line
	literal uint64 // octets of a literal still to come
}

// marker is what a physical line ends with: {n} or {n+}.
type marker struct {
	found, sync bool
	octets      uint64
	// odd: it looks like a marker, and is longer than any number that makes
	// sense. What the other side takes it for cannot be told.
	odd bool
}

// next consumes octets of p up to the end of the next physical line, of the
// current literal, or of p. line says that a physical line has ended; the
// caller then calls either resume, because a literal follows, or reset.
func (l *lineScan) next(p []byte) (n int, line bool) {
	if l.literal > 0 {
		n := int(min(l.literal, uint64(len(p))))
		l.literal -= uint64(n)
		return n, false
	}
	if i := bytes.IndexByte(p, '\n'); i >= 0 {
		l.take(p[:i+1])
		return i + 1, true
	}
	l.take(p)
	return len(p), false
}

func (l *lineScan) take(p []byte) {
	if len(p) == 0 {
		return
	}
	l.begun = true
	l.headLen += copy(l.head[l.headLen:], p)
	if len(p) >= len(l.tail) {
		l.tailLen = copy(l.tail[:], p[len(p)-len(l.tail):])
		return
	}
	if over := l.tailLen + len(p) - len(l.tail); over > 0 {
		copy(l.tail[:], l.tail[over:l.tailLen])
		l.tailLen -= over
	}
	l.tailLen += copy(l.tail[l.tailLen:], p)
}

// marker reads the literal marker at the end of the physical line (RFC 9051
// §4.3, RFC 7888 §3, RFC 5804 §4).
func (l *lineScan) marker() marker {
	t := trimLineEnd(l.tail[:l.tailLen])
	if len(t) < 3 || t[len(t)-1] != '}' {
		return marker{}
	}
	t = t[:len(t)-1]
	m := marker{found: true, sync: true}
	if t[len(t)-1] == '+' {
		m.sync = false
		t = t[:len(t)-1]
	}
	digits := len(t) - len(bytes.TrimRight(t, "0123456789"))
	switch number := t[len(t)-digits:]; {
	case digits == len(t) && l.tailLen == len(l.tail):
		return marker{odd: true}
	case digits == 0 || digits == len(t) || t[len(t)-digits-1] != '{':
		return marker{}
	default:
		octets, err := strconv.ParseUint(string(number), 10, 63)
		m.octets, m.odd = octets, err != nil
		m.found = !m.odd
		return m
	}
}

// resume goes on with the logical line after a literal of n octets.
func (l *lineScan) resume(n uint64) { l.literal, l.tailLen = n, 0 }

// reset begins a new logical line.
func (l *lineScan) reset() { l.headLen, l.tailLen, l.begun, l.literal = 0, 0, false, 0 }

// long says that the head does not hold the whole line.
func (l *lineScan) long() bool { return l.headLen == len(l.head) }

// atStart says that the stream stands before a new logical line.
func (l *lineScan) atStart() bool { return !l.begun && l.literal == 0 }

// line returns the head of the logical line without its line end.
func (l *lineScan) line() []byte { return trimLineEnd(l.head[:l.headLen]) }

func trimLineEnd(p []byte) []byte {
	if n := len(p); n > 0 && p[n-1] == '\n' {
		p = p[:n-1]
	}
	if n := len(p); n > 0 && p[n-1] == '\r' {
		p = p[:n-1]
	}
	return p
}
