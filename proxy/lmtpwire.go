package proxy

import (
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"unicode"
	"unicode/utf8"

	"github.com/emersion/go-smtp"
)

// The grammar of LMTP: a command is parsed to parts, and what goes to a
// backend is written from the parts, never copied. Backends disagree about
// what they have not seen written by the book: an address whose quotes are
// lost on the way ends in somebody else's mailbox.

const (
	// mostLocal and mostDomain bound the parts of an address, in octets. RFC
	// 5321 §4.5.3.1.1 asks for 64 in the local part and lets servers take
	// more; VERP and SRS addresses need more.
	mostLocal  = 255
	mostDomain = 255
	// mostPath bounds an address as it is written, with source route and angle
	// brackets (RFC 5321 §4.5.3.1.3: at least 256).
	mostPath = 512
	// mostParams bounds the parameters of one command; RFCs define about ten.
	mostParams = 16
)

var (
	badCommand   = smtp.EnhancedCode{5, 5, 2}
	badArgument  = smtp.EnhancedCode{5, 5, 4}
	badRecipient = smtp.EnhancedCode{5, 1, 3}
	badSender    = smtp.EnhancedCode{5, 1, 7}
)

// syntax is the answer to what breaks the grammar.
func syntax(code smtp.EnhancedCode, text string) *smtp.SMTPError {
	return &smtp.SMTPError{Code: 501, EnhancedCode: code, Message: text}
}

// upper folds ASCII only. The standard library's folding would take "ſ" for S
// and the Kelvin sign for K, and so know commands that no backend knows.
func upper(s string) string {
	return strings.Map(func(c rune) rune {
		if c >= 'a' && c <= 'z' {
			return c - 'a' + 'A'
		}
		return c
	}, s)
}

// lmtpCommand splits a command line without its CRLF into the verb, in upper
// case, and the argument without the spaces around it.
func lmtpCommand(line []byte) (verb, arg string) {
	verb, arg, _ = strings.Cut(strings.TrimRight(string(line), " \t"), " ")
	return upper(verb), strings.TrimLeft(arg, " ")
}

// helloName checks the argument of LHLO: a domain or an address literal (RFC
// 5321 §4.1.1.1). Underscores pass, because real hosts have them; what could
// break a Received field does not.
func helloName(arg string) (string, *smtp.SMTPError) {
	name := arg
	if strings.HasPrefix(name, "[") && strings.HasSuffix(name, "]") {
		name = strings.ReplaceAll(name[1:len(name)-1], ":", "")
	}
	if name == "" || len(arg) > mostDomain || !utf8.ValidString(name) || strings.ContainsFunc(name, notInDomain) {
		return "", syntax(badArgument, "LHLO needs a domain or an address literal")
	}
	return arg, nil
}

// mailbox is an address in its decoded parts: what stands between < and >.
type mailbox struct {
	// local is the local part without quotes and backslashes.
	local string
	// domain is in lower case, or an address literal with its brackets. It is
	// empty for a bare local part such as postmaster (RFC 5321 §4.5.1). Both
	// are empty for the null reverse-path.
	domain string
}

func (m mailbox) isNull() bool { return m.local == "" && m.domain == "" }

// isUTF8 says that the address needs SMTPUTF8 (RFC 6531).
func (m mailbox) isUTF8() bool { return !isASCII(m.local) || !isASCII(m.domain) }

func isASCII(s string) bool {
	return !strings.ContainsFunc(s, func(c rune) bool { return c >= utf8.RuneSelf })
}

// String writes the address as RFC 5321 §4.1.2 has it, without angle brackets.
// The local part is quoted exactly where it is no dot-string.
func (m mailbox) String() string {
	if m.isNull() {
		return ""
	}
	local := m.local
	if !isDotString(local) {
		local = `"` + quotedPairs.Replace(local) + `"`
	}
	if m.domain == "" {
		return local
	}
	return local + "@" + m.domain
}

var quotedPairs = strings.NewReplacer(`\`, `\\`, `"`, `\"`)

func isDotString(s string) bool {
	return s != "" && s[0] != '.' && s[len(s)-1] != '.' && !strings.Contains(s, "..") &&
		!strings.ContainsFunc(s, notInDotString)
}

func isAlphanumeric(c rune) bool {
	return c >= '0' && c <= '9' || c >= 'a' && c <= 'z' || c >= 'A' && c <= 'Z'
}

// notInDotString: neither atext (RFC 5322 §3.2.3, RFC 6531 §3.3) nor a dot.
func notInDotString(c rune) bool {
	return !isAlphanumeric(c) && c < utf8.RuneSelf && !strings.ContainsRune(".!#$%&'*+-/=?^_`{|}~", c)
}

// notInDomain: neither of a label, by RFC 5321 or as a U-label, nor a dot, nor
// the underscore that is found in practice.
func notInDomain(c rune) bool {
	if c >= utf8.RuneSelf {
		return unicode.IsControl(c) || unicode.IsSpace(c)
	}
	return !isAlphanumeric(c) && c != '-' && c != '.' && c != '_'
}

// param is a parameter of MAIL or RCPT: the name in upper case, the value as
// written.
type param struct {
	name, value string
	hasValue    bool
}

// parseReverse parses the argument of MAIL, "FROM:<reverse-path> parameters".
// Like parseForward it takes a bare local part, as cron's mail has it, and
// drops a source route (RFC 5321 §4.1.1.3 and appendix C).
func parseReverse(arg string) (mailbox, []param, *smtp.SMTPError) {
	return parsePath(arg, "FROM:", badSender)
}

// parseForward parses the argument of RCPT, "TO:<forward-path> parameters".
func parseForward(arg string) (mailbox, []param, *smtp.SMTPError) {
	m, params, err := parsePath(arg, "TO:", badRecipient)
	if err == nil && m.isNull() {
		err = syntax(badRecipient, "The null address is no recipient")
	}
	return m, params, err
}

func parsePath(arg, prefix string, bad smtp.EnhancedCode) (mailbox, []param, *smtp.SMTPError) {
	if !utf8.ValidString(arg) {
		return mailbox{}, nil, syntax(bad, "Not UTF-8")
	}
	if strings.ContainsFunc(arg, unicode.IsControl) {
		return mailbox{}, nil, syntax(bad, "Control characters in an address")
	}
	if len(arg) < len(prefix) || upper(arg[:len(prefix)]) != prefix {
		return mailbox{}, nil, syntax(badCommand, "Expected "+prefix+"<address>")
	}
	// The space that RFC 5321 §3.3 forbids after the colon is sent by many.
	rest, bracketed := strings.CutPrefix(strings.TrimLeft(arg[len(prefix):], " "), "<")
	if !bracketed {
		return mailbox{}, nil, syntax(badCommand, "The address must stand in angle brackets")
	}
	m, rest, fault := cutPath(rest)
	if fault != "" {
		return mailbox{}, nil, syntax(bad, fault)
	}
	params, fault := parseParams(rest)
	if fault != "" {
		return mailbox{}, nil, syntax(badArgument, fault)
	}
	return m, params, nil
}

// cutPath takes a path and its closing bracket off s.
func cutPath(s string) (m mailbox, rest, fault string) {
	if rest, null := strings.CutPrefix(s, ">"); null {
		return mailbox{}, rest, ""
	}
	rest = s
	if strings.HasPrefix(rest, "@") {
		if rest, fault = cutRoute(rest); fault != "" {
			return mailbox{}, "", fault
		}
	}
	if m.local, rest, fault = cutLocal(rest); fault != "" {
		return mailbox{}, "", fault
	}
	if after, found := strings.CutPrefix(rest, "@"); found {
		if m.domain, rest, fault = cutDomain(after); fault != "" {
			return mailbox{}, "", fault
		}
	}
	if !strings.HasPrefix(rest, ">") {
		return mailbox{}, "", "Bad address syntax"
	}
	rest = rest[1:]
	// What we write may be longer than what we read: a lower-case letter can
	// have more octets, and quotes are added.
	if len(s)-len(rest)+1 > mostPath || len(m.String())+2 > mostPath {
		return mailbox{}, "", "Address too long"
	}
	return m, rest, ""
}

// cutRoute takes a source route, "@a,@b:", off s.
func cutRoute(s string) (rest, fault string) {
	for {
		if s, _ = strings.CutPrefix(s, "@"); s == "" {
			return "", "Bad source route"
		}
		if _, s, fault = cutDomain(s); fault != "" {
			return "", fault
		}
		switch {
		case strings.HasPrefix(s, ":"):
			return s[1:], ""
		case strings.HasPrefix(s, ",@"):
			s = s[1:]
		default:
			return "", "Bad source route"
		}
	}
}

// cutLocal takes a local part off s and decodes it. A bare one may have dots
// where RFC 5321 wants quotes: some Japanese providers gave such addresses
// out. An empty one is refused, though a quoted string may be empty: a
// directory would take "@domain" for a catch-all.
func cutLocal(s string) (local, rest, fault string) {
	if !strings.HasPrefix(s, `"`) {
		end := strings.IndexFunc(s, notInDotString)
		if end < 0 {
			return "", "", "Bad address syntax"
		}
		local, rest = s[:end], s[end:]
	} else {
		var b strings.Builder
		i := 1
		for ; i < len(s) && s[i] != '"'; i++ {
			if s[i] == '\\' {
				i++
			}
			if i < len(s) {
				b.WriteByte(s[i])
			}
		}
		if i >= len(s) {
			return "", "", "Unterminated quoted string"
		}
		local, rest = b.String(), s[i+1:]
	}
	switch {
	case local == "":
		return "", "", "Empty local part"
	case len(local) > mostLocal:
		return "", "", "Local part too long"
	}
	return local, rest, ""
}

// cutDomain takes a domain or an address literal (RFC 5321 §4.1.3) off s.
func cutDomain(s string) (domain, rest, fault string) {
	if strings.HasPrefix(s, "[") {
		literal, rest, closed := strings.Cut(s[1:], "]")
		text, v6 := literal, false
		if len(literal) >= 5 && upper(literal[:5]) == "IPV6:" {
			text, v6 = literal[5:], true
		}
		addr, err := netip.ParseAddr(text)
		if !closed || err != nil || addr.Zone() != "" || addr.Is6() != v6 {
			return "", "", "Bad address literal"
		}
		if v6 {
			return "[IPv6:" + addr.String() + "]", rest, ""
		}
		return "[" + addr.String() + "]", rest, ""
	}
	end := strings.IndexFunc(s, notInDomain)
	if end < 0 {
		end = len(s)
	}
	domain, rest = lowerDomain(s[:end]), s[end:]
	switch {
	case domain == "", domain[0] == '.', domain[len(domain)-1] == '.', strings.Contains(domain, ".."):
		return "", "", "Bad domain"
	case len(domain) > mostDomain:
		return "", "", "Domain too long"
	}
	return domain, rest, ""
}

// lowerDomain never makes an ASCII letter of another one: the Kelvin sign
// stays what it is.
func lowerDomain(domain string) string {
	return strings.Map(func(c rune) rune {
		if l := unicode.ToLower(c); c < utf8.RuneSelf || l >= utf8.RuneSelf {
			return l
		}
		return c
	}, domain)
}

// parseParams parses what follows a path (RFC 5321 §4.1.2: esmtp-param).
func parseParams(s string) (params []param, fault string) {
	if s != "" && s[0] != ' ' {
		return nil, "Unexpected text after the address"
	}
	for word := range strings.SplitSeq(s, " ") {
		if word == "" {
			continue
		}
		var p param
		p.name, p.value, p.hasValue = strings.Cut(word, "=")
		p.name = upper(p.name)
		switch {
		case p.name == "" || p.name[0] == '-' || strings.ContainsFunc(p.name, notInKeyword),
			p.hasValue && p.value == "", strings.Contains(p.value, "="):
			return nil, "Bad parameter syntax"
		case slices.ContainsFunc(params, func(q param) bool { return q.name == p.name }):
			return nil, "Parameter " + p.name + " given twice"
		case len(params) == mostParams:
			return nil, "Too many parameters"
		}
		params = append(params, p)
	}
	return params, ""
}

func notInKeyword(c rune) bool { return !isAlphanumeric(c) && c != '-' }

// parseBDAT parses BDAT's argument, "n" or "n LAST" (RFC 3030 §2). ok is false
// if the length of the chunk cannot be told: then nobody knows where the next
// command begins.
func parseBDAT(arg string) (n int64, last, ok bool) {
	digits, word, _ := strings.Cut(arg, " ")
	word = upper(strings.TrimLeft(word, " "))
	size, err := strconv.ParseUint(digits, 10, 63)
	if err != nil || len(digits) > 18 || word != "" && word != "LAST" {
		return 0, false, false
	}
	return int64(size), word == "LAST", true
}
