package proxy

import (
	"bytes"
	"encoding/base64"
	"fmt"
	"slices"
	"strconv"
	"strings"

	"github.com/emersion/go-imap/v2"

	"github.com/posthouse/posthouse/proxy/auth"
)

// A login over STARTTLS, to a backend that wants STARTTLS too (RFC 9051, 4959,
// 2971, 5530). S and C are we and the client, < and > the backend and we:
//
//	S: * OK [CAPABILITY IMAP4rev1 SASL-IR LITERAL- ID STARTTLS LOGINDISABLED] mail.example.org ready
//	C: a STARTTLS
//	S: a OK Begin TLS negotiation now
//	C: b AUTHENTICATE PLAIN AGFsaWNlAHNlY3JldA==
//	<: * OK [CAPABILITY IMAP4rev1 LITERAL+ ID STARTTLS] be1 ready
//	>: p1 STARTTLS
//	<: p1 OK
//	>: p2 CAPABILITY
//	<: * CAPABILITY IMAP4rev1 LITERAL+ ID SASL-IR AUTH=PLAIN
//	<: p2 OK
//	>: p3 ID ("name" "posthouse" "x-originating-ip" "192.0.2.77" …)
//	<: * ID ("name" "Cyrus IMAPD")
//	<: p3 OK
//	>: p4 AUTHENTICATE PLAIN YWxpY2UAcHJveHkAc2VjcmV0
//	<: p4 OK [CAPABILITY IMAP4rev1 LITERAL+ IDLE …] User logged in
//	S: b OK [CAPABILITY IMAP4rev1 LITERAL+ IDLE …] User logged in

// imapDialect is IMAP's words (RFC 3501, RFC 9051).
type imapDialect struct {
	asked bool // the client has asked for CAPABILITY
	tags  int  // ours, towards the backend
}

// imapShared are the capabilities that we announce before login if every
// active backend has them. All others a client learns after its login.
var imapShared = []imap.Cap{imap.CapIMAP4rev2, imap.CapEnable, imap.CapIdle, imap.CapUTF8Accept}

// capabilities before login (G2, G8).
func (d *imapDialect) capabilities(o offer) string {
	caps := []string{string(imap.CapIMAP4rev1)}
	for _, c := range imapShared {
		if has(o.shared, string(c)) {
			caps = append(caps, string(c))
		}
	}
	caps = append(caps, string(imap.CapSASLIR), string(imap.CapLiteralMinus), string(imap.CapID))
	if o.startTLS {
		caps = append(caps, string(imap.CapStartTLS))
	}
	if len(o.mechanisms) == 0 {
		caps = append(caps, string(imap.CapLoginDisabled))
	}
	for _, m := range o.mechanisms {
		caps = append(caps, "AUTH="+m)
	}
	return strings.Join(caps, " ")
}

func (d *imapDialect) greet(c *lineConn, o offer, again bool) error {
	if again {
		return nil
	}
	return c.writeLines("* OK [CAPABILITY " + d.capabilities(o) + "] " + o.hostname + " ready")
}

func (d *imapDialect) next(c *lineConn, o offer) (request, error) {
	for {
		cmd, err := readIMAPCommand(c)
		req := request{tag: cmd.tag}
		if err != nil {
			return req, err
		}
		if cmd.fault != "" {
			err = d.bad(c, cmd.tag, cmd.fault)
		} else {
			var done bool
			if done, req, err = d.command(c, o, cmd); done {
				return req, err
			}
		}
		if err != nil {
			return req, err
		}
	}
}

// command handles one command; done says that session.go has to decide.
func (d *imapDialect) command(c *lineConn, o offer, cmd imapCommand) (done bool, req request, err error) {
	req.tag = cmd.tag
	switch cmd.verb {
	case "CAPABILITY":
		d.asked = true
		return false, req, c.writeLines("* CAPABILITY "+d.capabilities(o), cmd.tag+" OK CAPABILITY completed")
	case "NOOP":
		return false, req, c.writeLines(cmd.tag + " OK NOOP completed")
	case "ID": // RFC 2971
		if !cmd.isID() {
			return false, req, d.bad(c, cmd.tag, "ID takes NIL or a list of string pairs")
		}
		return false, req, c.writeLines(`* ID ("name" "posthouse")`, cmd.tag+" OK ID completed")
	case "LOGOUT":
		_ = c.writeLines("* BYE Logging out", cmd.tag+" OK LOGOUT completed")
		return true, req, errClientLeft
	case "ENABLE": // RFC 5161 §3.1: only after login
		return false, req, c.writeLines(cmd.tag + " BAD ENABLE is for after the login")
	case "STARTTLS":
		if !o.startTLS {
			return false, req, d.bad(c, cmd.tag, "TLS is on already")
		}
		req.startTLS = true
		return true, req, nil
	case "LOGIN":
		if len(cmd.args) != 2 || cmd.args[0].list || cmd.args[1].list {
			return false, req, d.bad(c, cmd.tag, "LOGIN takes a user name and a password")
		}
		user, password := cmd.args[0].text, cmd.args[1].text
		if bytes.IndexByte(user, 0) >= 0 || bytes.IndexByte(password, 0) >= 0 {
			return false, req, d.bad(c, cmd.tag, "NUL in a string")
		}
		req.mechanism = "PLAIN"
		req.initial = fmt.Appendf(nil, "\x00%s\x00%s", user, password)
		return true, req, nil
	case "AUTHENTICATE":
		if len(cmd.args) == 0 || len(cmd.args) > 2 {
			return false, req, d.bad(c, cmd.tag, "AUTHENTICATE takes a mechanism and at most an initial response")
		}
		req.mechanism = strings.ToUpper(string(cmd.args[0].text))
		if len(cmd.args) == 2 {
			if req.initial, err = saslInitial(cmd.args[1].text); err != nil {
				return false, req, d.bad(c, cmd.tag, "the initial response is not base64")
			}
		}
		return true, req, nil
	}
	return false, req, d.bad(c, cmd.tag, "unknown command, or not before the login")
}

func (d *imapDialect) bad(c *lineConn, tag, why string) error {
	if tag == "" {
		tag = "*"
	}
	if err := c.strike(); err != nil {
		return err
	}
	return c.writeLines(tag + " BAD " + why)
}

// saslInitial decodes an initial response; "=" is the empty one (RFC 4959 §3).
func saslInitial(text []byte) ([]byte, error) {
	if string(text) == "=" {
		return []byte{}, nil
	}
	p, err := base64.StdEncoding.DecodeString(string(text))
	if err != nil {
		return nil, err
	}
	if len(p) == 0 {
		return nil, fmt.Errorf("empty initial response must be %q", "=")
	}
	return p, nil
}

func (d *imapDialect) challenge(c *lineConn, text []byte) ([]byte, error) {
	if err := c.writeLines("+ " + base64.StdEncoding.EncodeToString(text)); err != nil {
		return nil, err
	}
	return readSASLResponse(c)
}

// readSASLResponse reads a line of base64, or "*" (RFC 9051 §6.2.2, RFC 5034
// §4).
func readSASLResponse(c *lineConn) ([]byte, error) {
	line, err := c.readLine(maxLine)
	if err != nil {
		return nil, err
	}
	if string(line) == "*" {
		return nil, &Error{Reason: Cancelled, Op: "authenticate"}
	}
	p, err := base64.StdEncoding.DecodeString(string(line))
	if err != nil {
		return nil, failf(Malformed, "authenticate", "the response is not base64")
	}
	return p, nil
}

func (d *imapDialect) proceed(c *lineConn, req request) error {
	return c.writeLines(req.tag + " OK Begin TLS negotiation now")
}

// imapAnswers are the tagged answers to a refusal (RFC 5530).
var imapAnswers = map[Reason]string{
	Unavailable:      "NO [UNAVAILABLE] Account is temporarily unavailable.",
	Misconfigured:    "NO [UNAVAILABLE] Account is temporarily unavailable.",
	RoleDisagreement: "NO [UNAVAILABLE] Account is temporarily unavailable.",
	WrongCredentials: "NO [AUTHENTICATIONFAILED] Authentication failed.",
	NotAuthorized:    "NO [AUTHORIZATIONFAILED] Not authorized to act as this user.",
	PrivacyRequired:  "NO [PRIVACYREQUIRED] Use STARTTLS first.",
	TooMany:          "NO [LIMIT] Too many failures.",
	TooLong:          "BAD [TOOBIG] The command is too long.",
	Cancelled:        "BAD Authentication cancelled.",
	Malformed:        "BAD Malformed authentication response.",
	UnknownMechanism: "NO [CANNOT] Unsupported authentication mechanism.",
	Pipelined:        "BAD STARTTLS cannot be pipelined.",
	InUse:            "NO [INUSE] The mailbox is in use.",
	LoginDelay:       "NO [LIMIT] Too many logins, try again later.",
	ShuttingDown:     "NO [UNAVAILABLE] This frontend is being restarted, try again.",
	TimedOut:         "NO [UNAVAILABLE] No login in time.",
	Overloaded:       "NO [LIMIT] Too many connections.",
}

func (d *imapDialect) refuse(c *lineConn, req request, why Reason) error {
	answer := imapAnswers[why]
	_, text, _ := strings.Cut(answer, " ")
	switch {
	case !why.closes():
		return c.writeLines(req.tag + " " + answer)
	case req.tag == "":
		return c.writeLines("* BYE " + text)
	}
	return c.writeLines("* BYE "+text, req.tag+" "+answer)
}

// untold are capabilities that the client must not see after its login:
// before-login ones, and those that would lead it past the role table (RFC
// 8437, 2221, 2193).
func untold(token string) bool {
	token = strings.ToUpper(token)
	switch imap.Cap(token) {
	case imap.CapStartTLS, imap.CapLoginDisabled, imap.CapUnauthenticate, "LOGIN-REFERRALS", "MAILBOX-REFERRALS":
		return true
	}
	return strings.HasPrefix(token, "AUTH=")
}

func (d *imapDialect) admit(c *lineConn, req request, w welcome) error {
	caps := strings.Join(w.capabilities, " ")
	text := w.text
	if text == "" {
		text = "Logged in"
	}
	ok := req.tag + " OK [CAPABILITY " + caps + "] " + text
	if d.asked {
		return c.writeLines("* CAPABILITY "+caps, ok)
	}
	return c.writeLines(ok)
}

func (d *imapDialect) partingWords() string { return "p0 LOGOUT" }

func (d *imapDialect) meet(b *lineConn) ([]string, error) {
	greeting, err := readIMAPResponse(b)
	if err != nil {
		return nil, err
	}
	switch {
	case greeting.tag == "*" && greeting.word == "PREAUTH":
		return nil, failf(Misconfigured, "greeting", "the backend says PREAUTH: it would take anybody for one user")
	case greeting.tag == "*" && greeting.word == "BYE":
		return nil, failf(Unavailable, "greeting", "the backend says BYE %q", greeting.text)
	case greeting.tag != "*" || greeting.word != "OK":
		return nil, failf(Unavailable, "greeting", "no IMAP greeting: %q", clip(greeting.line))
	}
	caps := greeting.capabilities()
	if b.mustStartTLS {
		if caps, err = nil, d.secure(b); err != nil {
			return nil, err
		}
	}
	if caps == nil {
		if _, caps, err = d.ask(b, "CAPABILITY"); err != nil {
			return nil, err
		}
	}
	return caps, nil
}

// secure starts TLS towards a backend. What it said before is forgotten.
func (d *imapDialect) secure(b *lineConn) error {
	answer, _, err := d.ask(b, "STARTTLS")
	if err != nil {
		return err
	}
	if answer.word != "OK" {
		return failf(Misconfigured, "STARTTLS", "the backend refuses TLS: %q", clip(answer.line))
	}
	return b.startTLS()
}

// ask sends a command and returns the tagged answer, with the capabilities
// that came along.
func (d *imapDialect) ask(b *lineConn, command string) (imapResponse, []string, error) {
	d.tags++
	tag := "p" + strconv.Itoa(d.tags)
	if err := b.writeLines(tag + " " + command); err != nil {
		return imapResponse{}, nil, err
	}
	return d.answer(b, tag, nil)
}

// mostUntagged bounds what a backend may say before it answers.
const mostUntagged = 100

// answer reads until the answer tagged so. A continuation request is answered
// by proceed, once.
func (d *imapDialect) answer(b *lineConn, tag string, proceed func() error) (imapResponse, []string, error) {
	var caps []string
	for range mostUntagged {
		r, err := readIMAPResponse(b)
		if err != nil {
			return r, nil, err
		}
		if more := r.capabilities(); more != nil {
			caps = more
		}
		switch {
		case r.tag == tag:
			return r, caps, nil
		case r.tag == "+" && proceed != nil:
			if err := proceed(); err != nil {
				return r, nil, err
			}
			proceed = nil
		case r.tag == "*" && r.word == "BYE":
			b.claimed = false // it ends before it has let anybody in
			return r, nil, failf(Unavailable, "answer", "the backend says BYE %q", clip(r.line))
		case r.tag != "*":
			return r, nil, failf(Unavailable, "answer", "the backend answers what nobody asked: %q", clip(r.line))
		}
	}
	return imapResponse{}, nil, failf(Unavailable, "answer", "more than %d untagged lines", mostUntagged)
}

func (d *imapDialect) logIn(b *lineConn, announced []string, as auth.Credentials, from origin) (welcome, error) {
	if has(announced, string(imap.CapLoginDisabled)) || !has(announced, "AUTH=PLAIN") {
		return welcome{}, failf(Misconfigured, "AUTHENTICATE",
			"the backend offers no AUTH=PLAIN: allow it there, or set tls.mode to what it demands")
	}
	if has(announced, string(imap.CapID)) {
		if _, _, err := d.ask(b, "ID ("+from.imapID()+")"); err != nil {
			return welcome{}, err
		}
	}
	d.tags++
	tag := "p" + strconv.Itoa(d.tags)
	message := base64.StdEncoding.EncodeToString(plainMessage(as))
	command := tag + " AUTHENTICATE PLAIN"
	var proceed func() error
	if has(announced, string(imap.CapSASLIR)) {
		command += " " + message
		b.claimed = true
	} else {
		proceed = func() error {
			b.claimed = true
			return b.writeLines(message)
		}
	}
	if err := b.writeLines(command); err != nil {
		return welcome{}, err
	}
	r, caps, err := d.answer(b, tag, proceed)
	if err != nil {
		return welcome{}, err
	}
	if r.word != "OK" {
		b.claimed = false
		return welcome{}, imapRefusal(r)
	}
	if word, _, _ := strings.Cut(r.code, " "); strings.EqualFold(word, "REFERRAL") { // RFC 2221 §4.1
		return welcome{}, failf(RoleDisagreement, "AUTHENTICATE", "the backend refers to another: %q", clip(r.line))
	}
	if !b.claimed {
		return welcome{}, failf(Misconfigured, "AUTHENTICATE", "the backend lets in without credentials: %q", clip(r.line))
	}
	if caps == nil {
		if _, caps, err = d.ask(b, "CAPABILITY"); err != nil {
			return welcome{}, err
		}
	}
	caps = slices.DeleteFunc(caps, func(token string) bool {
		return untold(token) || b.provenByWords && strings.HasPrefix(strings.ToUpper(token), "COMPRESS=")
	})
	return welcome{text: printable(r.text), capabilities: caps}, nil
}

// plainMessage is RFC 4616's; the credentials hold no NUL.
func plainMessage(as auth.Credentials) []byte {
	return fmt.Appendf(nil, "%s\x00%s\x00%s", as.Authzid, as.Authcid, as.Password)
}

// imapRefusal gives a backend's refusal its reason. Its words never reach the
// client.
func imapRefusal(r imapResponse) error {
	reason := Unavailable
	code, _, _ := strings.Cut(r.code, " ")
	switch imap.ResponseCode(strings.ToUpper(code)) {
	case "", imap.ResponseCodeAuthenticationFailed, imap.ResponseCodeAuthorizationFailed, imap.ResponseCodeExpired:
		if r.word == "NO" && !soundsTemporary(r.text) {
			reason = WrongCredentials
		}
	case imap.ResponseCodeInUse:
		reason = InUse
	case "REFERRAL": // RFC 2221: the backend sends elsewhere; only the role table does
		return failf(RoleDisagreement, "AUTHENTICATE", "the backend refers to another: %q", clip(r.line))
	}
	return failf(reason, "AUTHENTICATE", "the backend refuses: %q", clip(r.line))
}

// imapID tells a backend that trusts us who the client is (RFC 2971, Dovecot's
// x- keys; proxyTTL ends loops).
func (o origin) imapID() string {
	transport := "insecure"
	if o.secure {
		transport = "TLS"
	}
	pairs := []string{
		"name", "posthouse", "x-session-id", o.session, "x-proxy-ttl", proxyTTL, "x-client-transport", transport,
		"x-originating-ip", o.client.Addr().String(), "x-originating-port", strconv.Itoa(int(o.client.Port())),
		"x-connected-ip", o.local.Addr().String(), "x-connected-port", strconv.Itoa(int(o.local.Port())),
	}
	return `"` + strings.Join(pairs, `" "`) + `"`
}

// proxyTTL is how many more proxies may follow, ours not counted.
const proxyTTL = "6"
