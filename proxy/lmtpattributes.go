package proxy

import (
	"net/netip"
	"slices"
	"strconv"
	"strings"

	"github.com/emersion/go-smtp"
)

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
