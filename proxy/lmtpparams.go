package proxy

import (
	"fmt"
	"slices"
	"strconv"
	"strings"
	"unicode"
	"unicode/utf8"

	"github.com/emersion/go-smtp"
)

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
		var ok bool
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
