package proxy

import (
	"fmt"
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

// announced says which extensions with parameters this client was offered.
type announced struct{ smtputf8, dsn, ignoreQuota bool }

// mailParams are MAIL's parameters, decoded.
type mailParams struct {
	// size is what the client declares, in octets; -1 if it does not.
	size int64
	// eightBit is BODY=8BITMIME (RFC 6152).
	eightBit bool
	utf8     bool
	// ret is FULL, HDRS or empty, envid any text (RFC 3461 §4.3, §4.4).
	ret, envid string
	// auth is who is said to have submitted the message, "<>" for nobody
	// known (RFC 4954 §5); valid if hasAuth.
	hasAuth bool
	auth    string
}

// parseMailParams reads MAIL's parameters. AUTH is always taken: clients may
// send it to whoever offers AUTH, and it is only passed on to those.
func parseMailParams(params []param, a announced) (mailParams, *smtp.SMTPError) {
	m := mailParams{size: -1}
	for _, p := range params {
		ok := p.hasValue
		switch {
		case p.name == "SIZE":
			size, err := strconv.ParseUint(p.value, 10, 63)
			// RFC 1870 §3: 20 digits, more than fit here.
			m.size, ok = int64(size), err == nil && len(p.value) <= 20
		case p.name == "BODY" && (upper(p.value) == "7BIT" || upper(p.value) == "8BITMIME"):
			m.eightBit = upper(p.value) == "8BITMIME"
		case p.name == "SMTPUTF8" && a.smtputf8:
			m.utf8, ok = true, !p.hasValue
		case p.name == "RET" && a.dsn:
			m.ret = upper(p.value)
			ok = m.ret == string(smtp.DSNReturnFull) || m.ret == string(smtp.DSNReturnHeaders)
		case p.name == "ENVID" && a.dsn:
			m.envid, ok = decodeText(p.value)
			ok = ok && p.hasValue && len(p.value) <= 100
		case p.name == "AUTH":
			m.auth, ok = decodeText(p.value)
			m.hasAuth, ok = true, ok && p.hasValue
		default:
			return m, unsupported(p)
		}
		if !ok {
			return m, syntax(badArgument, "Bad value of "+p.name)
		}
	}
	return m, nil
}

// unsupported is the answer to what we know nothing about (RFC 5321 §4.1.1.11).
func unsupported(p param) *smtp.SMTPError {
	text := "Unsupported parameter " + p.name
	if p.hasValue && p.name == "BODY" {
		text += "=" + p.value
	}
	return &smtp.SMTPError{Code: 555, EnhancedCode: badArgument, Message: text}
}

// write appends those parameters to a command line whose extension the backend
// offers. has is asked for keywords in upper case.
func (m mailParams) write(line []byte, has func(keyword string) bool) []byte {
	if m.size >= 0 && has("SIZE") {
		line = strconv.AppendInt(append(line, " SIZE="...), m.size, 10)
	}
	if m.eightBit && has("8BITMIME") {
		line = append(line, " BODY=8BITMIME"...)
	}
	if m.utf8 && has("SMTPUTF8") {
		line = append(line, " SMTPUTF8"...)
	}
	if m.ret != "" && has("DSN") {
		line = append(line, " RET="+m.ret...)
	}
	if m.envid != "" && has("DSN") {
		line = append(line, " ENVID="+encodeXtext(m.envid)...)
	}
	if m.hasAuth && has("AUTH") {
		line = append(line, " AUTH="+encodeXtext(m.auth)...)
	}
	return line
}

// rcptParams are RCPT's parameters, decoded.
type rcptParams struct {
	// notify holds NEVER alone or some of SUCCESS, FAILURE, DELAY (RFC 3461 §4.1).
	notify []string
	// orcptType is the original recipient's address type in lower case, orcpt
	// the address; of type utf-8 it is kept in the form of RFC 6533 §3.
	orcptType, orcpt string
	// ignoreQuota is Cyrus's IGNOREQUOTA.
	ignoreQuota bool
}

func parseRcptParams(params []param, a announced) (rcptParams, *smtp.SMTPError) {
	var r rcptParams
	for _, p := range params {
		ok := p.hasValue
		switch {
		case p.name == "NOTIFY" && a.dsn:
			r.notify = strings.Split(upper(p.value), ",")
			ok = isNotify(r.notify)
		case p.name == "ORCPT" && a.dsn:
			ok = r.parseORCPT(p.value, a.smtputf8)
		case p.name == "IGNOREQUOTA" && a.ignoreQuota:
			r.ignoreQuota, ok = true, !p.hasValue
		default:
			return r, unsupported(p)
		}
		if !ok {
			return r, syntax(badArgument, "Bad value of "+p.name)
		}
	}
	return r, nil
}

func isNotify(list []string) bool {
	if len(list) == 1 && list[0] == string(smtp.DSNNotifyNever) {
		return true
	}
	for i, word := range list {
		switch smtp.DSNNotify(word) {
		case smtp.DSNNotifySuccess, smtp.DSNNotifyFailure, smtp.DSNNotifyDelayed:
		default:
			return false
		}
		if slices.Contains(list[:i], word) {
			return false
		}
	}
	return true
}

// parseORCPT reads "type;xtext" of at most 500 octets (RFC 3461 §4.2).
func (r *rcptParams) parseORCPT(value string, raw bool) (ok bool) {
	kind, address, found := strings.Cut(value, ";")
	if !found || kind == "" || address == "" || strings.ContainsFunc(kind, notInKeyword) || len(value) > 500 {
		return false
	}
	r.orcptType = strings.ToLower(kind)
	if r.orcptType == "utf-8" {
		r.orcpt = address
		return isUnitext(address, raw)
	}
	r.orcpt, ok = decodeText(address)
	return ok
}

// isUnitext checks an address in the forms of RFC 6533 §3: "+", "=", "\" and,
// unless raw, what is not ASCII stand as \x{HEX}.
func isUnitext(s string, raw bool) bool {
	for i, c := range s {
		switch {
		case c == '+', c == '=', c <= ' ', c >= utf8.RuneSelf && !raw:
			return false
		case c == '\\':
			hex, found := strings.CutPrefix(s[i:], `\x{`)
			hex, _, closed := strings.Cut(hex, "}")
			n, err := strconv.ParseUint(hex, 16, 32)
			if !found || !closed || err != nil || len(hex) > 6 ||
				!utf8.ValidRune(rune(n)) || unicode.IsControl(rune(n)) {
				return false
			}
		}
	}
	return true
}

// unitext writes what is not ASCII as \x{HEX}.
func unitext(s string) string {
	var b strings.Builder
	for _, c := range s {
		if c < utf8.RuneSelf {
			b.WriteRune(c)
		} else {
			fmt.Fprintf(&b, `\x{%X}`, c)
		}
	}
	return b.String()
}

// write appends those parameters to a command line whose extension the backend
// offers.
func (r rcptParams) write(line []byte, has func(keyword string) bool) []byte {
	if len(r.notify) > 0 && has("DSN") {
		line = append(line, " NOTIFY="+strings.Join(r.notify, ",")...)
	}
	if r.orcpt != "" && has("DSN") {
		line = append(line, " ORCPT="+r.orcptType+";"...)
		switch {
		case r.orcptType != "utf-8":
			line = append(line, encodeXtext(r.orcpt)...)
		case has("SMTPUTF8"):
			line = append(line, r.orcpt...)
		default:
			line = append(line, unitext(r.orcpt)...)
		}
	}
	if r.ignoreQuota && has("IGNOREQUOTA") {
		line = append(line, " IGNOREQUOTA"...)
	}
	return line
}

// isXchar: what stands for itself in xtext (RFC 3461 §4).
func isXchar(c byte) bool { return c > ' ' && c < 0x7f && c != '+' && c != '=' }

func encodeXtext(s string) string {
	const hex = "0123456789ABCDEF"
	p := make([]byte, 0, len(s))
	for i := range len(s) {
		if c := s[i]; isXchar(c) {
			p = append(p, c)
		} else {
			p = append(p, '+', hex[c>>4], hex[c&15])
		}
	}
	return string(p)
}

// decodeXtext decodes what RFC 3461 §4 allows and nothing else; the digits are
// upper case. What comes out may be any octets.
func decodeXtext(s string) (string, bool) {
	p := make([]byte, 0, len(s))
	for i := 0; i < len(s); i++ {
		switch c := s[i]; {
		case isXchar(c):
			p = append(p, c)
		case c == '+' && i+2 < len(s) && s[i+1:i+3] == upper(s[i+1:i+3]):
			n, err := strconv.ParseUint(s[i+1:i+3], 16, 8)
			if err != nil {
				return "", false
			}
			p = append(p, byte(n))
			i += 2
		default:
			return "", false
		}
	}
	return string(p), true
}

// decodeText decodes xtext and refuses control characters in what comes out: a
// backend may write it into a header field or a log.
func decodeText(s string) (string, bool) {
	text, ok := decodeXtext(s)
	return text, ok && !strings.ContainsFunc(text, unicode.IsControl)
}

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

// attributeSet says which attributes of a client were named.
type attributeSet uint16

const (
	attrName attributeSet = 1 << iota
	attrAddr
	attrPort
	attrProto
	attrHelo
	attrLogin
	attrSession
	attrTTL
)

// clientAttributes is what XCLIENT and XFORWARD say about the client at the
// far end (Postfix's XCLIENT_README and XFORWARD_README; SESSION and TTL are
// Dovecot's). What is not available is the zero value, or -1 for ttl.
type clientAttributes struct {
	name  string
	addr  netip.Addr
	port  uint16
	proto string // upper case
	helo  string
	login string

	session string
	// ttl is how many more proxies may follow.
	ttl int

	set attributeSet
}

// What we announce. IDENT and SOURCE are taken, because Postfix sends what is
// announced all at once, and dropped.
var (
	xclientNames  = []string{"NAME", "ADDR", "PORT", "PROTO", "HELO", "LOGIN", "SESSION", "TTL"}
	xforwardNames = []string{"NAME", "ADDR", "PORT", "PROTO", "HELO", "IDENT", "SOURCE"}
)

// mostAttribute bounds a decoded value, in octets.
const mostAttribute = 255

// parseAttributes parses "NAME=xtext NAME=xtext"; known are the names that may
// occur.
func parseAttributes(arg string, known []string) (clientAttributes, *smtp.SMTPError) {
	c := clientAttributes{ttl: -1}
	for word := range strings.SplitSeq(arg, " ") {
		if word == "" {
			continue
		}
		name, value, found := strings.Cut(word, "=")
		name = upper(name)
		switch {
		case !slices.Contains(known, name):
			return c, syntax(badArgument, "Unknown attribute "+clip([]byte(name)))
		case !found || !c.take(name, value):
			return c, syntax(badArgument, "Bad value of "+name)
		}
	}
	if strings.Trim(arg, " ") == "" {
		return c, syntax(badArgument, "Expected NAME=value")
	}
	return c, nil
}

// take sets one attribute. HELO is a stranger's word, passed on by an MTA that
// does not check it: what is not UTF-8 there is no reason to refuse the rest.
func (c *clientAttributes) take(name, xtext string) (ok bool) {
	value, ok := decodeText(xtext)
	if !ok || len(value) > mostAttribute {
		return false
	}
	value = strings.ToValidUTF8(value, "?")
	if u := upper(value); u == "[UNAVAILABLE]" || u == "[TEMPUNAVAIL]" {
		value = ""
	}
	switch name {
	case "NAME":
		c.name, c.set = value, c.set|attrName
	case "ADDR":
		c.addr, ok = attributeAddr(value)
		c.set |= attrAddr
	case "PORT":
		port, err := strconv.ParseUint(value, 10, 16)
		c.port, ok = uint16(port), err == nil || value == ""
		c.set |= attrPort
	case "PROTO":
		c.proto, c.set = upper(value), c.set|attrProto
	case "HELO":
		c.helo, c.set = value, c.set|attrHelo
	case "LOGIN":
		c.login, c.set = value, c.set|attrLogin
	case "SESSION":
		c.session, c.set = value, c.set|attrSession
	case "TTL":
		ttl, err := strconv.ParseUint(value, 10, 16)
		c.ttl, ok = int(ttl), err == nil || value == ""
		if value == "" {
			c.ttl = -1
		}
		c.set |= attrTTL
	}
	return ok
}

// attributeAddr parses ADDR: an IPv6 address has the prefix IPV6: from Postfix
// and none from others.
func attributeAddr(value string) (netip.Addr, bool) {
	if value == "" {
		return netip.Addr{}, true
	}
	text, v6 := value, false
	if len(value) > 5 && upper(value[:5]) == "IPV6:" {
		text, v6 = value[5:], true
	}
	addr, err := netip.ParseAddr(text)
	if err != nil || addr.Zone() != "" || v6 && !addr.Is6() {
		return netip.Addr{}, false
	}
	return addr.Unmap(), true
}

// merge returns c with what over names: Postfix spreads the attributes over
// several commands, and the later ones count.
func (c clientAttributes) merge(over clientAttributes) clientAttributes {
	if over.set&attrName != 0 {
		c.name = over.name
	}
	if over.set&attrAddr != 0 {
		c.addr = over.addr
	}
	if over.set&attrPort != 0 {
		c.port = over.port
	}
	if over.set&attrProto != 0 {
		c.proto = over.proto
	}
	if over.set&attrHelo != 0 {
		c.helo = over.helo
	}
	if over.set&attrLogin != 0 {
		c.login = over.login
	}
	if over.set&attrSession != 0 {
		c.session = over.session
	}
	if over.set&attrTTL != 0 {
		c.ttl = over.ttl
	}
	c.set |= over.set
	return c
}

// xclient writes an XCLIENT command, without CRLF, of those attributes that
// the backend offers and that have a value; "" if there is none. A TTL below 1
// is not written: at 0 the message must not go further.
//
// An IPv6 address gets the prefix IPV6:, which Postfix demands and Dovecot
// takes from 2.3 on (cmd_xclient strips it; the LMTP server of 2.2 knew only
// the bare address). PROTO is written only with the three values that Dovecot
// knows; it refuses the whole command for another one.
func (c clientAttributes) xclient(offered []string) string {
	var line strings.Builder
	add := func(name, value string) {
		if value != "" && has(offered, name) {
			line.WriteString(" " + name + "=" + encodeXtext(value))
		}
	}
	add("NAME", c.name)
	switch {
	case c.addr.Is6():
		add("ADDR", "IPV6:"+c.addr.String())
	case c.addr.IsValid():
		add("ADDR", c.addr.String())
	}
	if c.port != 0 {
		add("PORT", strconv.Itoa(int(c.port)))
	}
	if c.proto == "SMTP" || c.proto == "ESMTP" || c.proto == "LMTP" {
		add("PROTO", c.proto)
	}
	add("HELO", c.helo)
	add("LOGIN", c.login)
	add("SESSION", c.session)
	if c.ttl > 0 {
		add("TTL", strconv.Itoa(c.ttl))
	}
	if line.Len() == 0 {
		return ""
	}
	return "XCLIENT" + line.String()
}

// reply is an LMTP reply: its code, and its lines without code and CRLF, but
// with their enhanced status codes ("5.1.1 User unknown").
type reply struct {
	code  int
	lines []string
}

// newReply makes a reply of lines that have their enhanced status codes.
func newReply(code int, lines ...string) reply { return reply{code, lines} }

// replyTo makes a reply of an error. Every line gets the enhanced status code
// (RFC 2034 §4); X.0.0 if e has none of its own.
func replyTo(e *smtp.SMTPError) reply {
	enhanced := e.EnhancedCode
	if enhanced == smtp.EnhancedCodeNotSet {
		enhanced = smtp.EnhancedCode{e.Code / 100, 0, 0}
	}
	r := reply{code: e.Code}
	for line := range strings.SplitSeq(e.Message, "\n") {
		if enhanced != smtp.NoEnhancedCode {
			line = fmt.Sprintf("%d.%d.%d %s", enhanced[0], enhanced[1], enhanced[2], line)
		}
		r.lines = append(r.lines, line)
	}
	return r
}

// append adds the reply as it goes over the wire. Whatever its lines hold, it
// stays one reply.
func (r reply) append(p []byte) []byte {
	for i := range max(len(r.lines), 1) {
		p = strconv.AppendInt(p, int64(r.code), 10)
		switch {
		case i < len(r.lines)-1:
			p = append(p, '-')
		default:
			p = append(p, ' ')
		}
		if i < len(r.lines) {
			p = append(p, printable(r.lines[i])...)
		}
		p = append(p, "\r\n"...)
	}
	return p
}

// parseReplyLine parses one line of a backend's reply, without its CRLF. more
// says that another line follows. ok is false if it is none (RFC 5321 §4.2).
func parseReplyLine(line []byte) (code int, more bool, text string, ok bool) {
	if len(line) < 3 || line[0] < '2' || line[0] > '5' || len(line) > 3 && line[3] != ' ' && line[3] != '-' {
		return 0, false, "", false
	}
	for _, digit := range line[:3] {
		if digit < '0' || digit > '9' {
			return 0, false, "", false
		}
		code = 10*code + int(digit-'0')
	}
	if len(line) > 3 {
		more, text = line[3] == '-', printable(string(line[4:]))
	}
	return code, more, text, true
}
