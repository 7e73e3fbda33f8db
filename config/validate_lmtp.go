package config

import (
	"fmt"
	"net"
	"net/netip"
	"path/filepath"
	"slices"
	"strings"
	"time"
	"unicode"
)

// isLocal reports whether nobody on a network is on the way to the listener.
func (l Listener) isLocal() bool {
	network, address := l.Network()
	if network == "unix" {
		return true
	}
	host, _, err := net.SplitHostPort(address)
	return err == nil && isLoopback(host)
}

// isUnix reports whether the listener is a unix socket.
func (l Listener) isUnix() bool { return strings.HasPrefix(l.Address, unixPrefix) }

// unixPath is where a unix socket lies, in the form that compares.
func (l Listener) unixPath() string { return filepath.Clean(strings.TrimPrefix(l.Address, unixPrefix)) }

// unixAddress reports a unix socket that clients cannot use, or that is taken
// by a listener before it.
func (v *validation) unixAddress(i int) {
	l, path := v.cfg.Listeners[i], fmt.Sprintf("listeners[%d].address", i)
	if l.Protocol != ProtocolLMTP {
		v.faultAt(path, quote(l.Address)+": only lmtp has unix sockets", "write host:port")
		return
	}
	for n, other := range v.cfg.Listeners[:i] {
		if other.isUnix() && other.unixPath() == l.unixPath() {
			v.faultAt(path, fmt.Sprintf("%s is taken by listeners[%d].address", l.Address, n), "choose another path")
			return
		}
	}
}

// lmtpOnly reports what a listener for clients says that only MTAs would meet.
func (v *validation) lmtpOnly(path string, l Listener) {
	if !slices.Contains([]string{ProtocolIMAP, ProtocolPOP3, ProtocolSieve}, l.Protocol) {
		return // what it is meant to be, nobody knows
	}
	what, fix := "has no effect with protocol "+l.Protocol, "remove it"
	if l.Mode != 0 {
		v.faultAt(path+".mode", what, fix)
	}
	if len(l.Trusted) > 0 {
		v.faultAt(path+".trusted", what, fix)
	}
	v.useless(path+".bare_newline", l.BareNewline, what, fix)
	v.useless(path+".client_ca", l.ClientCA, what, fix)
	if l.InsecurePlaintext {
		v.faultAt(path+".insecure_plaintext", what+": its clients send passwords", fix)
	}
}

// lmtpListener checks what only a listener for MTAs has.
func (v *validation) lmtpListener(path string, l *Listener) {
	if l.TLS == "" {
		l.TLS = TLSOff
	}
	v.oneOf(path+".tls", l.TLS, TLSOff, TLSStartTLS, TLSImplicit)
	if l.BareNewline != "" {
		v.oneOf(path+".bare_newline", l.BareNewline, BareNewlineReject, BareNewlineNormalize)
	}
	if l.isUnix() {
		v.unixSocket(path, l)
	} else {
		if l.Mode != 0 {
			v.faultAt(path+".mode", "has no effect on host:port", "remove it, or listen on unix:/path")
		}
		v.trusted(path+".trusted", l.Trusted)
	}
	v.clientCA(path, l)
	v.plaintext(path, *l)
}

// unixSocket completes the path of a unix socket, and refuses what its peers
// never meet.
func (v *validation) unixSocket(path string, l *Listener) {
	file := strings.TrimPrefix(l.Address, unixPrefix)
	v.absolute(&file)
	l.Address = unixPrefix + file
	switch {
	case file == "":
		v.faultAt(path+".address", "unix: names no path", "write unix:/run/posthouse/lmtp or the like")
	case len(file) > maxSocketPath:
		v.faultAt(path+".address", fmt.Sprintf("longer than %d octets", maxSocketPath), "choose a shorter path")
	}
	if l.TLS == TLSStartTLS || l.TLS == TLSImplicit {
		v.faultAt(path+".tls", l.TLS+" on a unix socket, which nobody can listen in on", "remove it, or listen on host:port")
	}
	if len(l.Trusted) > 0 {
		v.faultAt(path+".trusted", "has no effect on a unix socket, whose peers are all trusted", "remove it, and guard the socket by its mode")
	}
	switch {
	case l.Mode == 0 && !v.written(path+".mode"):
		l.Mode = 0o660
	case l.Mode == 0:
		v.faultAt(path+".mode", l.Mode.String()+" lets nobody connect", "use 0660, or remove it for that default")
	case l.Mode&0o002 != 0:
		v.faultAt(path+".mode", l.Mode.String()+" lets everybody on this host speak as a trusted MTA", "use 0660; in a directory with the setgid bit the socket gets the directory's group")
	}
}

func (v *validation) trusted(path string, list []string) {
	for i, s := range list {
		at := fmt.Sprintf("%s[%d]", path, i)
		if _, fix := parsePrefix(s); fix != "" {
			v.faultAt(at, quote(s)+" is not a network", fix)
		} else if slices.Contains(list[:i], s) {
			v.faultAt(at, quote(s)+" is listed twice", "delete one of them")
		}
	}
}

// parsePrefix reads an address or a network. If it is neither, or not in the
// form that compares with a peer's address, fix says what to write.
func parsePrefix(s string) (p netip.Prefix, fix string) {
	p, err := netip.ParsePrefix(s)
	if err != nil {
		ip, err := netip.ParseAddr(s)
		if err != nil || ip.Zone() != "" {
			return netip.Prefix{}, "write an address such as 192.0.2.1, or a network such as 192.0.2.0/24 or 2001:db8::/32"
		}
		ip = ip.Unmap()
		return netip.PrefixFrom(ip, ip.BitLen()), ""
	}
	right := p
	if ip := p.Addr(); ip.Is4In6() && p.Bits() >= 96 {
		right = netip.PrefixFrom(ip.Unmap(), p.Bits()-96)
	}
	if right = right.Masked(); right != p {
		return netip.Prefix{}, "write " + right.String()
	}
	return p, ""
}

// clientCA checks the file of the authorities whose certificates MTAs show.
func (v *validation) clientCA(path string, l *Listener) {
	v.absolute(&l.ClientCA)
	switch {
	case l.ClientCA == "":
		return
	case l.TLS == TLSOff && l.isUnix():
		v.faultAt(path+".client_ca", "has no effect on a unix socket", "remove it")
	case l.TLS == TLSOff:
		v.faultAt(path+".client_ca", "has no effect with tls off", "remove it, or set tls to starttls or implicit")
	default:
		v.authorities(path+".client_ca", l.ClientCA)
	}
	if l.TLS == TLSStartTLS && l.InsecurePlaintext {
		v.faultAt(path+".insecure_plaintext", "lets in mail before STARTTLS, and so without the certificate that client_ca wants", "remove one of the two")
	}
}

// plaintext checks that mail crosses no network in the clear unless the file
// says so, and that it does not say so for nothing.
func (v *validation) plaintext(path string, l Listener) {
	const fix = "remove it"
	at := path + ".insecure_plaintext"
	switch {
	case l.InsecurePlaintext && l.isUnix():
		v.faultAt(at, "has no effect on a unix socket", fix)
	case l.InsecurePlaintext && l.isLocal():
		v.faultAt(at, "has no effect on loopback", fix)
	case l.InsecurePlaintext && l.TLS == TLSImplicit:
		v.faultAt(at, "has no effect with tls implicit", fix)
	case l.TLS == TLSOff && !l.InsecurePlaintext && !l.isLocal():
		host, _, err := net.SplitHostPort(l.Address)
		if err != nil {
			return // reported as the address's fault
		}
		where := quote(host) + " is not loopback"
		if host == "" {
			where = "an empty host is every address"
		}
		v.faultAt(path+".tls", "is off and "+where+": mail would cross the network in the clear", "use starttls or implicit, or set insecure_plaintext: true")
	}
}

const (
	// minRecipients: RFC 5321 §4.5.3.1.8.
	minRecipients = 100
	// minLine is what RFC 5321 §4.5.3.1.6 obliges everybody to take, without
	// CRLF; maxLine leaves room below the 8189 octets at which Cyrus splits.
	minLine, maxLine = 998, 8000
	// maxReply is when an MTA gives up waiting for a reply to its message (RFC
	// 5321 §4.5.3.2.6); Postfix, too (lmtp_data_done_timeout, 600 s).
	maxReply = 10 * time.Minute
)

func (v *validation) lmtp() {
	v.positive("lmtp", v.cfg.LMTP)
	l := &v.cfg.LMTP
	if l.MaxRecipients > 0 && l.MaxRecipients < minRecipients {
		v.faultAt("lmtp.max_recipients", fmt.Sprintf("%d is too few: RFC 5321 §4.5.3.1.8 demands %d", l.MaxRecipients, minRecipients), "raise it")
	}
	switch {
	case l.MaxLine > 0 && l.MaxLine < minLine:
		v.faultAt("lmtp.max_line", fmt.Sprintf("%d is too short: RFC 5321 §4.5.3.1.6 demands %d, without CRLF", l.MaxLine, minLine), "raise it")
	case l.MaxLine > maxLine:
		v.faultAt("lmtp.max_line", fmt.Sprintf("%d is too long: Cyrus splits lines at 8189 octets, and a dot after that ends the message", l.MaxLine),
			fmt.Sprintf("set it to at most %d", maxLine))
	}
	if l.ReplyTimeout >= maxReply {
		v.faultAt("lmtp.reply_timeout", l.ReplyTimeout.String()+" is too long: MTAs give up after 10 minutes (RFC 5321 §4.5.3.2.6), and deliver again", "set it to less than 10m")
	}
	v.delimiter(l.RecipientDelimiter)
	v.localDomains(l.LocalDomains)
	v.user("lmtp.postmaster", l.Postmaster)
	v.user("lmtp.catch_all", l.CatchAll)
}

// delimiters are the characters that may stand in a local part without quotes
// (atext, RFC 5322 §3.2.3), but for letters and digits.
const delimiters = "!#$%&'*+-/=?^_`{|}~"

func (v *validation) delimiter(d string) {
	const path = "lmtp.recipient_delimiter"
	switch {
	case d == "":
	case len(d) > 1 || !strings.Contains(delimiters, d):
		v.faultAt(path, quote(d)+" cannot begin a detail", `use one of `+delimiters+`, or "" for no details`)
	case v.listens(ProtocolLMTP) && strings.Contains(v.cfg.Usernames.Allow, d):
		at := path
		if !v.written(at) {
			at = "usernames.allow"
		}
		v.faultAt(at, quote(d)+" would end users' names in recipients (lmtp.recipient_delimiter), and be a part of them at logins (usernames.allow)",
			"remove it from usernames.allow, or choose another delimiter, or \"\" for no details")
	}
}

// localDomains checks the domains, and puts them into lower case.
func (v *validation) localDomains(list []string) {
	for i, domain := range list {
		at := fmt.Sprintf("lmtp.local_domains[%d]", i)
		list[i] = strings.ToLower(domain)
		_, err := netip.ParseAddr(domain)
		switch {
		case domain == "*" && len(list) > 1:
			v.faultAt(at, `"*" beside other domains`, "keep it alone, or remove it")
		case domain == "*":
		case err == nil || !hostnameShape.MatchString(domain):
			v.faultAt(at, quote(domain)+" is not a domain", `write a domain such as example.org, or "*" alone for every domain`)
		case slices.Contains(list[:i], list[i]):
			v.faultAt(at, quote(list[i])+" is listed twice", "delete one of them")
		}
	}
}

// user reports a name that no user can have. Whether one has it, the directory
// says.
func (v *validation) user(path, name string) {
	if strings.ContainsFunc(name, func(r rune) bool { return unicode.IsSpace(r) || unicode.IsControl(r) }) {
		v.faultAt(path, quote(name)+" is not a user's name: it holds white space or a control character", "name a user of the directory, or remove it")
	}
}

// hold shortens the default to a short hold_window: who did not choose it must
// not be told to correct it.
func (v *validation) hold() {
	h, window := &v.cfg.Hold, v.cfg.Limits.HoldWindow
	v.positive("hold", *h)
	if h.LMTP <= window || window <= 0 {
		return
	}
	if !v.written("hold.lmtp") {
		h.LMTP = window
		return
	}
	v.faultAt("hold.lmtp", fmt.Sprintf("%s is too long for limits.hold_window (%s), which ends every wait", h.LMTP, window), "lower hold.lmtp or raise hold_window")
}
