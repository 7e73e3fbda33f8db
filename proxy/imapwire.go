package proxy

import (
	"bytes"
	"fmt"
	"slices"
	"strings"
)

// imapCommand is one command of a client before login, read to its end. fault
// is set if it breaks the grammar; then only tag may be used.
type imapCommand struct {
	tag   string
	verb  string
	args  []imapArg
	fault string
}

// imapArg is a string of any form, or a list of strings.
type imapArg struct {
	text  []byte
	isNil bool
	list  bool
	items []imapArg
}

// mostLiterals bounds the literals of one command: ID has at most 30 pairs
// (RFC 2971 §3.3).
const mostLiterals = 64

// maxCommand bounds one command before login, with all its literals.
const maxCommand = 64 << 10

// readIMAPCommand reads a whole command: its line, and while that ends in a
// literal marker, the literal and the next line. Whatever is wrong with a
// command, it is read to its end, because its literals are in flight (RFC 7888
// §4). An error ends the connection.
func readIMAPCommand(c *lineConn) (imapCommand, error) {
	var cmd imapCommand
	p := imapParser{}
	for total := 0; ; {
		line, err := c.readLine(maxLine)
		if err != nil {
			return cmd, err
		}
		if total += len(line); total > maxCommand {
			return cmd, failf(TooLong, "read a command", "longer than %d octets", maxCommand)
		}
		if cmd.verb == "" && cmd.fault == "" {
			cmd.begin(&line)
		}
		m := p.line(line)
		if m.odd {
			return cmd, failf(TooLong, "read a literal", "a length that makes no sense")
		}
		if !m.found {
			break
		}
		if m.octets > maxLiteral || len(p.literals) == mostLiterals {
			if m.sync { // not asked for, not sent
				cmd.fault = fmt.Sprintf("literals are limited to %d octets and %d in number before login", maxLiteral, mostLiterals)
				return cmd, nil
			}
			return cmd, failf(TooLong, "read a literal", "%d octets, %d allowed before login", m.octets, maxLiteral)
		}
		if m.sync {
			if err := c.writeLines("+ Ready"); err != nil {
				return cmd, err
			}
		}
		literal, err := c.readLiteral(int(m.octets))
		if err != nil {
			return cmd, err
		}
		total += len(literal)
		p.literals = append(p.literals, literal)
	}
	if cmd.fault == "" {
		cmd.args, cmd.fault = p.parse()
	}
	return cmd, nil
}

// begin takes tag and verb from the first line.
func (cmd *imapCommand) begin(line *[]byte) {
	tag, rest, found := bytes.Cut(*line, []byte(" "))
	if !isIMAPTag(tag) {
		cmd.fault = "invalid tag"
		return
	}
	cmd.tag = string(tag)
	verb, rest, _ := bytes.Cut(rest, []byte(" "))
	if !found || !isAtom(verb) {
		cmd.fault = "missing command"
		return
	}
	cmd.verb = strings.ToUpper(string(verb))
	*line = rest
}

// isID says that the arguments are those of ID: NIL or a list of pairs.
func (cmd *imapCommand) isID() bool {
	if len(cmd.args) != 1 {
		return false
	}
	a := cmd.args[0]
	return a.isNil || a.list && len(a.items)%2 == 0
}

// isIMAPTag is RFC 9051's tag: ASTRING-CHARs without "+".
func isIMAPTag(p []byte) bool {
	return len(p) > 0 && bytes.IndexByte(p, '+') < 0 && isAString(p)
}

func isAtom(p []byte) bool { return len(p) > 0 && isAString(p) && bytes.IndexByte(p, ']') < 0 }

// isAString: atom characters and "]" (RFC 9051 §9, ASTRING-CHAR).
func isAString(p []byte) bool {
	for _, b := range p {
		if b <= ' ' || b >= 0x7f || strings.IndexByte(`(){%*"\`, b) >= 0 {
			return false
		}
	}
	return true
}

// imapParser collects the lines and literals of one command and then parses
// them.
type imapParser struct {
	text     []byte // the lines; a literal stands in it as literalMark
	literals [][]byte
	quoted   bool // the last line ended inside a quoted string
}

// literalMark stands for a literal among the lines. It cannot come from
// outside: NUL is refused there.
const literalMark = 0

// line takes a physical line and returns the literal marker at its end. Inside
// quotes there is none.
func (p *imapParser) line(line []byte) marker {
	p.quoted = false
	for i := 0; i < len(line); i++ {
		switch {
		case line[i] == '"':
			p.quoted = !p.quoted
		case line[i] == '\\' && p.quoted:
			i++
		}
	}
	var m marker
	if !p.quoted {
		scan := lineScan{}
		scan.take(line)
		m = scan.marker()
	}
	if !m.found {
		p.add(line)
		return m
	}
	p.add(line[:bytes.LastIndexByte(line, '{')])
	p.text = append(p.text, literalMark)
	return m
}

// add appends text from outside, in which a NUL shall not look like a mark.
func (p *imapParser) add(text []byte) {
	p.text = append(p.text, bytes.ReplaceAll(text, []byte{literalMark}, []byte{1})...)
}

// parse reads the arguments: strings, NIL and lists of them, one space apart.
func (p *imapParser) parse() (args []imapArg, fault string) {
	used := 0
	open := false
	var items []imapArg
	rest := p.text
	for len(rest) > 0 {
		if rest[0] == ' ' {
			rest = rest[1:]
			continue
		}
		var a imapArg
		switch {
		case rest[0] == '(' && !open:
			open, items, rest = true, nil, rest[1:]
			continue
		case rest[0] == ')' && open:
			a, open, rest = imapArg{list: true, items: items}, false, rest[1:]
			args = append(args, a)
			continue
		case rest[0] == literalMark:
			a, rest = imapArg{text: p.literals[used]}, rest[1:]
			used++
		case rest[0] == '"':
			if a.text, rest, fault = cutQuoted(rest); fault != "" {
				return nil, fault
			}
		default:
			n := 0
			for n < len(rest) && isArgument(rest[n]) {
				n++
			}
			if n == 0 {
				return nil, "unexpected character"
			}
			a.text, rest = rest[:n], rest[n:]
			a.isNil = strings.EqualFold(string(a.text), "NIL")
		}
		if open {
			items = append(items, a)
		} else {
			args = append(args, a)
		}
	}
	if open {
		return nil, "unbalanced parenthesis"
	}
	return args, ""
}

// isArgument: what may stand unquoted: ASTRING-CHAR, which holds base64 too.
func isArgument(b byte) bool { return isAString([]byte{b}) }

// cutQuoted cuts a quoted string off the front of p (RFC 9051 §9, quoted).
// Octets over 127 are let pass: clients send them in passwords.
func cutQuoted(p []byte) (text, rest []byte, fault string) {
	for i := 1; i < len(p); i++ {
		switch p[i] {
		case '"':
			return text, p[i+1:], ""
		case '\\':
			i++
			if i == len(p) || p[i] != '"' && p[i] != '\\' {
				return nil, nil, "bad escape in a quoted string"
			}
			text = append(text, p[i])
		case literalMark, 1, '\r':
			return nil, nil, "control character in a quoted string"
		default:
			text = append(text, p[i])
		}
	}
	return nil, nil, "unterminated quoted string"
}

// imapResponse is one response of a backend during a login.
type imapResponse struct {
	tag  string // "*", "+", or a tag
	word string // OK, NO, CAPABILITY, …, in upper case
	code string // what stood in brackets
	text string // what follows
	line []byte // as it came
}

// readIMAPResponse reads one response, with its literals.
func readIMAPResponse(b *lineConn) (imapResponse, error) {
	var whole []byte
	for range mostLiterals {
		line, err := b.readLine(maxLine)
		if err != nil {
			return imapResponse{}, err
		}
		whole = append(whole, line...)
		scan := lineScan{}
		scan.take(line)
		m := scan.marker()
		if !m.found {
			return parseIMAPResponse(whole), nil
		}
		if m.octets > maxLiteral {
			return imapResponse{}, failf(Unavailable, "read a literal", "a backend's literal of %d octets during the login", m.octets)
		}
		literal, err := b.readLiteral(int(m.octets))
		if err != nil {
			return imapResponse{}, err
		}
		whole = append(whole, literal...)
	}
	return imapResponse{}, failf(Unavailable, "read a response", "a backend's response with more than %d literals", mostLiterals)
}

func parseIMAPResponse(line []byte) imapResponse {
	r := imapResponse{line: line}
	rest := ""
	r.tag, rest, _ = strings.Cut(string(line), " ")
	r.word, rest, _ = strings.Cut(rest, " ")
	r.word = strings.ToUpper(r.word)
	if strings.HasPrefix(rest, "[") {
		if code, text, found := strings.Cut(rest[1:], "]"); found {
			r.code, rest = code, strings.TrimPrefix(text, " ")
		}
	}
	r.text = rest
	return r
}

// capabilities returns those that the response lists, as untagged CAPABILITY
// or as response code; nil if it lists none.
func (r imapResponse) capabilities() []string {
	list := ""
	if r.tag == "*" && r.word == "CAPABILITY" {
		list = r.text
	} else if word, rest, _ := strings.Cut(r.code, " "); strings.EqualFold(word, "CAPABILITY") {
		list = rest
	}
	if list == "" {
		return nil
	}
	return strings.Fields(list)
}

// has says whether list holds a token, in any case of letters.
func has(list []string, token string) bool {
	return slices.ContainsFunc(list, func(t string) bool { return strings.EqualFold(t, token) })
}

// clip shortens a backend's line for the log.
func clip(line []byte) string {
	const most = 200
	if len(line) > most {
		return string(line[:most]) + "…"
	}
	return string(line)
}
