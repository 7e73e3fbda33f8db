package proxy

import (
	"bytes"
	"unicode/utf8"

	"github.com/emersion/go-smtp"
)

const (
	// Cyrus 3.6 splits lines at 8189 octets and may take what follows the
	// split for the end of the message. So a line with its stuffed dot and
	// CRLF stays below that.
	mostBodyLine = 8188 - len(".\r\n")
	// leastBodyLine leaves a folded line room for its space and a UTF-8
	// sequence.
	leastBodyLine = 8
	// lineTail is how many octets at the end of a line of full length wait
	// until it is known whether it must be folded: so many precede the last
	// octet of a UTF-8 sequence.
	lineTail = utf8.UTFMax - 1
)

// What every recipient is told about a message that no backend gets.
var (
	errBareNewline = &smtp.SMTPError{Code: 550, EnhancedCode: smtp.EnhancedCode{5, 6, 11},
		Message: "The message has a CR or LF outside of CRLF"}
	errLongLine = &smtp.SMTPError{Code: 554, EnhancedCode: smtp.EnhancedCode{5, 6, 0},
		Message: "The message has a line that is too long"}
	errTooBig = &smtp.SMTPError{Code: 552, EnhancedCode: smtp.EnhancedCode{5, 3, 4},
		Message: "The message is too big"}
	errTooManyHops = &smtp.SMTPError{Code: 554, EnhancedCode: smtp.EnhancedCode{5, 4, 6},
		Message: "Too many hops, this is a mail loop"}
)

// bodyFilter turns the octets of a client's message into the one form that
// every backend understands in the same way: lines of bounded length, dots
// stuffed, CR and LF only together.
//
// Servers disagree about where a message ends. Cyrus 3.6 and Dovecot 2.3 both
// take LF.LF, LF.CRLF and CRLF.LF for an end, each has more of its own, and
// what follows the end is commands: a sender could deliver, past every check
// of the MTA, mail of which we know nothing (SMTP smuggling). Here the end of
// DATA is CRLF.CRLF and nothing else (RFC 5321 §4.1.1.4), and nothing else
// that could be taken for an end leaves us.
//
// The terminator itself is not written. A filter serves one message, as DATA
// or as BDAT; it keeps no octets but those that wait for their successor.
type bodyFilter struct {
	normalize         bool
	maxLine, maxHops  int
	maxSize, received int64
	bad               *smtp.SMTPError

	at input
	cr bool // a CR is held back until its successor is known

	// The line that is being written:
	column int            // its octets so far, without stuffed dot, tail included
	tail   [lineTail]byte // its last octets, if it may have to be folded
	held   int            // how many of them there are

	inBody bool
	field  int // octets of "received" that a header line began with; -1: it is settled
	hops   int
}

// input is where DATA stands in the sender's view: only what began after a
// CRLF has a stuffed dot.
type input int

const (
	atStart input = iota // at the start of a line
	atDot                // behind a dot there
	atDotCR              // behind a dot and CR there
	inLine
)

// newBodyFilter returns a filter for a message.
//
// With normalize a bare LF becomes CRLF, a bare CR a space, and a line of more
// than maxLine octets is folded by CRLF and a space; without it each of these
// is a fault. maxLine does not count the CRLF nor a stuffed dot, and is at
// most 8185. maxHops bounds the Received fields, maxSize the octets of the
// message as received; 0 is no bound.
func newBodyFilter(normalize bool, maxLine, maxHops int, maxSize int64) *bodyFilter {
	return &bodyFilter{
		normalize: normalize,
		maxLine:   min(max(maxLine, leastBodyLine), mostBodyLine),
		maxHops:   maxHops,
		maxSize:   maxSize,
	}
}

// octets is the size of the message as received: with its line ends as they
// were, without stuffed dots and terminator.
func (f *bodyFilter) octets() int64 { return f.received }

// fault is nil, or what is wrong with the message. With a fault, what was
// written is not to be used; input is still consumed to its end.
func (f *bodyFilter) fault() *smtp.SMTPError { return f.bad }

func (f *bodyFilter) fail(fault *smtp.SMTPError) {
	if f.bad == nil {
		f.bad = fault
	}
}

// count counts octets of the message. Being too big outdoes every other fault,
// so that the fault does not depend on the pieces in which a message comes.
func (f *bodyFilter) count(n int) {
	f.received += int64(n)
	if f.maxSize > 0 && f.received > f.maxSize {
		f.bad = errTooBig
	}
}

// data takes octets of DATA, in pieces of any size, and appends what goes out
// to dst. n octets of src are consumed; less than all only if done: then the
// message has ended and a command follows.
func (f *bodyFilter) data(dst, src []byte) (out []byte, n int, done bool) {
	for n < len(src) {
		switch f.at {
		case atStart:
			if run := f.plainLines(src[n:]); run > 0 {
				dst = append(dst, src[n:n+run]...)
				n += run
			} else if src[n] == '.' {
				f.at = atDot
				n++
			} else {
				f.at = inLine
			}
		case atDot:
			if src[n] == '\r' {
				f.at = atDotCR
				n++
			} else {
				f.at = inLine
			}
		case atDotCR:
			if src[n] == '\n' {
				return dst, n + 1, true
			}
			f.at, f.cr = inLine, true
			f.count(1)
		case inLine:
			var used int
			dst, used = f.text(dst, src[n:])
			n += used
		}
	}
	return dst, n, false
}

// chunk takes octets of BDAT, in pieces of any size, and appends what goes out
// to dst. A line, even a CRLF, may begin in one chunk and end in the next.
func (f *bodyFilter) chunk(dst, src []byte) []byte {
	for len(src) > 0 {
		if run := f.plainLines(src); run > 0 {
			dst = append(dst, src[:run]...)
			src = src[run:]
			continue
		}
		var used int
		dst, used = f.text(dst, src)
		src = src[used:]
	}
	return dst
}

// finish ends the last line after the last chunk, if its sender did not. After
// DATA there is nothing to do.
func (f *bodyFilter) finish(dst []byte) []byte {
	if f.cr {
		f.cr = false
		dst = f.bareCR(dst)
	}
	if f.column > 0 {
		dst = f.endLine(dst)
	}
	return dst
}

// plainLines returns how many octets of p are whole lines that go out as they
// came in. It is what nearly every octet of a large message goes through.
func (f *bodyFilter) plainLines(p []byte) (n int) {
	if !f.inBody || f.column > 0 || f.cr || f.bad != nil {
		return 0
	}
	for n < len(p) && p[n] != '.' {
		line := p[n:min(len(p), n+f.maxLine)]
		end := bytes.IndexByte(line, '\n')
		if end < 1 || bytes.IndexByte(line[:end], '\r') != end-1 {
			break
		}
		n += end + 1
	}
	f.count(n)
	return n
}

// text takes octets of the message up to the end of a line or of p.
func (f *bodyFilter) text(dst, p []byte) (out []byte, used int) {
	line, ended := p, false
	used = len(p)
	if end := bytes.IndexByte(p, '\n'); end >= 0 {
		line, ended, used = p[:end], true, end+1
	}
	f.count(used)
	for len(line) > 0 {
		if f.cr {
			f.cr = false
			dst = f.bareCR(dst)
		}
		before := line
		if cr := bytes.IndexByte(line, '\r'); cr >= 0 {
			before, line, f.cr = line[:cr], line[cr+1:], true
		} else {
			line = nil
		}
		dst = f.put(dst, before)
	}
	if !ended {
		return dst, used
	}
	f.at = inLine
	if f.cr {
		f.cr, f.at = false, atStart
	} else if !f.normalize {
		f.fail(errBareNewline)
	}
	return f.endLine(dst), used
}

func (f *bodyFilter) bareCR(dst []byte) []byte {
	if !f.normalize {
		f.fail(errBareNewline)
	}
	return f.put(dst, []byte{' '})
}

// put writes octets of a line, neither CR nor LF among them.
func (f *bodyFilter) put(dst, p []byte) []byte {
	if len(p) == 0 || f.bad != nil {
		return dst
	}
	if f.column == 0 && p[0] == '.' {
		dst = append(dst, '.')
	}
	if !f.inBody {
		f.countHops(p[:min(len(p), f.maxLine-f.column)])
	}
	if n := min(len(p), f.maxLine-lineTail-f.column); n > 0 {
		dst = append(dst, p[:n]...)
		f.column += n
		p = p[n:]
	}
	for len(p) > 0 && f.bad == nil {
		if f.held < lineTail {
			f.tail[f.held] = p[0]
			f.held++
			f.column++
			p = p[1:]
			continue
		}
		if !f.normalize {
			f.fail(errLongLine)
			return dst
		}
		dst = f.fold(dst, p[0])
		n := min(len(p), f.maxLine-lineTail-f.column)
		dst = append(dst, p[:n]...)
		f.column += n
		p = p[n:]
	}
	return dst
}

// fold ends a line that is full before next, or before the UTF-8 sequence that
// next belongs to.
func (f *bodyFilter) fold(dst []byte, next byte) []byte {
	cut := f.held
	if !utf8.RuneStart(next) {
		for cut > 0 && !utf8.RuneStart(f.tail[cut-1]) {
			cut--
		}
		// Now tail[cut-1] would be the sequence's first octet.
		if cut == 0 || f.tail[cut-1] < utf8.RuneSelf {
			cut = f.held
		} else {
			cut--
		}
	}
	dst = append(dst, f.tail[:cut]...)
	dst = append(dst, "\r\n "...)
	dst = append(dst, f.tail[cut:f.held]...)
	f.column = 1 + f.held - cut
	f.held, f.field = 0, -1
	return dst
}

// endLine ends a line of the message as it goes out.
func (f *bodyFilter) endLine(dst []byte) []byte {
	if f.column == 0 {
		f.inBody = true
	}
	f.column, f.field = 0, 0
	held := f.held
	f.held = 0
	if f.bad != nil {
		return dst
	}
	dst = append(dst, f.tail[:held]...)
	return append(dst, "\r\n"...)
}

// countHops follows the start of a header line, up to where it may be folded:
// what comes then starts with a space and is no field.
func (f *bodyFilter) countHops(p []byte) {
	const received = "received"
	for _, b := range p {
		switch {
		case f.field < 0:
			return
		case f.field < len(received):
			if b|0x20 != received[f.field] {
				f.field = -1
				return
			}
			f.field++
		case b == ':':
			f.field = -1
			f.hops++
			if f.maxHops > 0 && f.hops > f.maxHops {
				f.fail(errTooManyHops)
			}
			return
		case b != ' ' && b != '\t':
			f.field = -1
			return
		}
	}
}
