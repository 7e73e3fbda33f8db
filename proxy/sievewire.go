package proxy

import (
	"bytes"
	"strconv"
	"strings"
)

// sieveLine is one logical line of ManageSieve (RFC 5804 §4): a client's
// command or SASL response, a backend's capability or response. fault is set
// if it breaks the grammar; then items must not be used.
type sieveLine struct {
	items []sieveItem
	fault string
}

// sieveItem is one word of a line.
type sieveItem struct {
	kind sieveKind
	text []byte
}

type sieveKind int

const (
	sieveAtom   sieveKind = iota // a command, OK, a response code, a number, "*"
	sieveString                  // quoted or literal
	sieveOpen                    // (
	sieveClose                   // )
)

const (
	// mostSieveLiterals bounds the literals of one line: AUTHENTICATE has two.
	mostSieveLiterals = 8
	// mostSieveItems bounds what is kept of a line.
	mostSieveItems = 32
	// maxQuoted is the longest string that every peer takes in quotes (RFC
	// 5804 §1.2: 1024 octets); a longer one goes out as a literal.
	maxQuoted = 1024
)

// readSieveLine reads a line, and while that ends in a literal marker, the
// literal and the next line. ManageSieve has no continuation requests: the
// octets of {n} follow just like those of {n+}, and whatever is wrong with a
// line, it is read to its end. An error ends the connection.
func readSieveLine(c *lineConn) (sieveLine, error) {
	var l sieveLine
	for literals := 0; ; literals++ {
		line, err := c.readLine(maxLine)
		if err != nil {
			return l, err
		}
		m := sieveMarker(line)
		if m.odd {
			return l, failf(TooLong, "read a literal", "a length that makes no sense")
		}
		if m.found {
			line = line[:bytes.LastIndexByte(line, '{')]
		}
		l.parse(line, literals > 0)
		if !m.found {
			return l, nil
		}
		if m.octets > maxLiteral || literals == mostSieveLiterals {
			return l, failf(TooLong, "read a literal", "%d octets, %d and %d literals allowed before login",
				m.octets, maxLiteral, mostSieveLiterals)
		}
		if n := len(line); n > 0 && line[n-1] != ' ' && line[n-1] != '(' {
			l.wrong("no space before a literal")
		}
		literal, err := c.readLiteral(int(m.octets))
		if err != nil {
			return l, err
		}
		if bytes.IndexByte(literal, 0) >= 0 {
			l.wrong("NUL in a string")
		}
		l.add(sieveItem{sieveString, literal})
	}
}

// sieveMarker returns the literal marker at the end of a physical line. Inside
// quotes, which end with the line at the latest, there is none.
func sieveMarker(line []byte) marker {
	quoted := false
	for i := 0; i < len(line); i++ {
		switch {
		case line[i] == '"':
			quoted = !quoted
		case line[i] == '\\' && quoted:
			i++
		}
	}
	if quoted {
		return marker{}
	}
	scan := lineScan{}
	scan.take(line)
	return scan.marker()
}

// wrong keeps the first fault and forgets the items.
func (l *sieveLine) wrong(fault string) {
	if l.fault == "" {
		l.items, l.fault = nil, fault
	}
}

func (l *sieveLine) add(item sieveItem) {
	if len(l.items) == mostSieveItems {
		l.wrong("too many arguments")
	}
	if l.fault == "" {
		l.items = append(l.items, item)
	}
}

// parse takes the words of one physical line. glued: it goes on right behind a
// literal.
func (l *sieveLine) parse(rest []byte, glued bool) {
	for len(rest) > 0 && l.fault == "" {
		item := sieveItem{}
		fault := ""
		switch b := rest[0]; {
		case b == ' ':
			rest, glued = rest[1:], false
			continue
		case b == '(':
			item.kind, rest = sieveOpen, rest[1:]
		case b == ')':
			item.kind, rest, glued = sieveClose, rest[1:], false
		case b == '"':
			item.kind = sieveString
			item.text, rest, fault = cutQuoted(rest)
		default:
			n := 0
			for n < len(rest) && isSieveAtom(rest[n]) {
				n++
			}
			if n == 0 {
				fault = "unexpected character"
			}
			item.text, rest = rest[:n], rest[n:]
		}
		switch {
		case fault != "":
			l.wrong(fault)
		case glued:
			l.wrong("no space between two arguments")
		default:
			l.add(item)
		}
		glued = item.kind != sieveOpen
	}
}

// isSieveAtom: what commands, response codes (QUOTA/MAXSIZE), numbers and the
// bare "*" consist of.
func isSieveAtom(b byte) bool { return b > ' ' && b < 0x7f && strings.IndexByte(`(){}"\`, b) < 0 }

// strings returns the texts of l's items behind the first; ok is false if one
// of them is no string.
func (l sieveLine) strings() (texts [][]byte, ok bool) {
	for _, item := range l.items[1:] {
		if item.kind != sieveString {
			return nil, false
		}
		texts = append(texts, item.text)
	}
	return texts, true
}

// sieveText writes text as a string: quoted, or as a literal if it is long or
// holds line ends. plus is "+" towards a server (RFC 5804 §4,
// literal-c2s) and empty towards a client (literal-s2c).
func sieveText(text []byte, plus string) string {
	if len(text) > maxQuoted || bytes.ContainsAny(text, "\r\n") {
		return "{" + strconv.Itoa(len(text)) + plus + "}\r\n" + string(text)
	}
	return `"` + sieveEscapes.Replace(string(text)) + `"`
}

var sieveEscapes = strings.NewReplacer(`\`, `\\`, `"`, `\"`)

// sieveResponse is what ends a backend's answer: OK, NO or BYE; or, if word is
// empty, one line of a capability list or a challenge.
type sieveResponse struct {
	word string
	code string // in upper case; its data is left out
	text string
	line sieveLine
}

func readSieveResponse(b *lineConn) (sieveResponse, error) {
	l, err := readSieveLine(b)
	if err != nil {
		return sieveResponse{}, err
	}
	r := sieveResponse{line: l}
	if l.fault != "" || len(l.items) == 0 {
		return r, failf(Unavailable, "read a response", "no ManageSieve: %s", l.fault)
	}
	if l.items[0].kind == sieveString {
		return r, nil
	}
	r.word = strings.ToUpper(string(l.items[0].text))
	if r.word != "OK" && r.word != "NO" && r.word != "BYE" {
		return r, failf(Unavailable, "read a response", "no ManageSieve response: %q", clip(l.items[0].text))
	}
	depth := 0
	for i, item := range l.items[1:] {
		switch {
		case item.kind == sieveOpen:
			depth++
		case item.kind == sieveClose:
			depth--
		case i == 1 && depth == 1:
			r.code = strings.ToUpper(string(item.text))
		case depth == 0:
			r.text = string(item.text)
		}
	}
	return r, nil
}

// String shows the response in an error.
func (r sieveResponse) String() string {
	if r.code == "" {
		return r.word + " " + strconv.Quote(clip([]byte(r.text)))
	}
	return r.word + " (" + clip([]byte(r.code)) + ") " + strconv.Quote(clip([]byte(r.text)))
}
